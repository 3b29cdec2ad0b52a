// What benchmarks compare the kernels with: deformable attention in the design that the published
// kernels share (Deformable DETR, mmcv, GroundingDINO, the release of MM-Interleaved). No part of
// the library.
//
// Forward: one thread an output channel, scalar loads, every thread works out every location.
// Backward: one block a (query, head) with one thread a channel; four scalar atomics a channel and
// sample; a sample's three scalar gradients are summed over the block between barriers, by thread 0
// alone up to 32 channels, else by halving. Indices are 32-bit, as theirs are. The softmax and the
// locations are made before, elsewhere.
#include "../cuda/device.cuh"

// Plain pointers, as ctypes gives them; see benchmarks/classic.py. "real": double for float64
// values, else float. All contiguous.
struct ClassicCall {
  int64_t batch, positions, heads, channels, queries, levels, points;
  const void* value;       // [N, S, H, D]
  const int64_t* shapes;   // [L, 3]: height, width, first position
  const void* locations;   // real [N, Q, H, L, P, 2]
  const void* weights;     // real [N, Q, H, L, P]
  const void* grad_out;    // [N, Q, H, D]
  void* out;               // [N, Q, H, D]
  void* grad_value;        // real [N, S, H, D], zero to begin with
  void* grad_locations;    // like locations
  void* grad_weights;      // like weights
};

namespace mmi {
namespace {

constexpr int kForwardThreads = 256;
constexpr int kSerialChannels = 32;

template <typename T, typename A>
struct Classic {
  int positions, heads, channels, queries, items, levels, points;  // items: queries of the batch x heads
  Array<const T> value, grad_out;
  Array<const int64_t> shapes;
  Array<const A> locations, weights;
  Array<T> out;
  Array<A> grad_value, grad_locations, grad_weights;
};

// One sample as one thread sees it: its four corners in the maps of one channel.
template <typename A>
struct Footprint {
  A dx, dy, width, height;
  int at[4];  // elements of value; upper left, upper right, lower left, lower right
  bool inside[4];
};

template <typename T, typename A>
__device__ __forceinline__ Footprint<A> footprint(const Classic<T, A>& p, int image, int head, int channel, int level,
                                                 A x, A y) {
  const int height = int(p.shapes[3 * level]), width = int(p.shapes[3 * level + 1]);
  const int start = int(p.shapes[3 * level + 2]);
  Footprint<A> f{};
  f.width = A(width);
  f.height = A(height);
  const A px = x * f.width - A(0.5), py = y * f.height - A(0.5);
  if (!(px > A(-1) && py > A(-1) && px < f.width && py < f.height)) return f;
  const int left = int(floor(px)), top = int(floor(py));
  f.dx = px - A(left);
  f.dy = py - A(top);
  for (int k = 0; k < 4; ++k) {
    const int column = left + k % 2, row = top + k / 2;
    f.inside[k] = column >= 0 && column < width && row >= 0 && row < height;
    f.at[k] = ((image * p.positions + start + row * width + column) * p.heads + head) * p.channels + channel;
  }
  return f;
}

template <typename A>
__device__ __forceinline__ A share(const Footprint<A>& f, int k) {
  return (k % 2 ? f.dx : 1 - f.dx) * (k / 2 ? f.dy : 1 - f.dy);
}

template <typename T, typename A>
__device__ __forceinline__ A corner(const Classic<T, A>& p, const Footprint<A>& f, int k) {
  return f.inside[k] ? to_arithmetic(p.value[f.at[k]]) : A(0);
}

template <typename T, typename A>
__global__ void __launch_bounds__(kForwardThreads) classic_forward(const __grid_constant__ Classic<T, A> p) {
  const int index = int(blockIdx.x * kForwardThreads + threadIdx.x);
  if (index >= p.items * p.channels) return;
  const int item = index / p.channels, channel = index % p.channels;
  const int head = item % p.heads, image = item / p.heads / p.queries;
  A sum = 0;
  for (int level = 0; level < p.levels; ++level) {
    for (int point = 0; point < p.points; ++point) {
      const int sample = (item * p.levels + level) * p.points + point;
      const Footprint<A> f =
          footprint(p, image, head, channel, level, p.locations[2 * sample], p.locations[2 * sample + 1]);
      A here = 0;
      for (int k = 0; k < 4; ++k) here += share(f, k) * corner(p, f, k);
      sum += p.weights[sample] * here;
    }
  }
  T rounded;
  narrow(sum, rounded);
  p.out[index] = rounded;
}

// The sum over the block's threads of each of three numbers, in `parts` [3, threads]; thread 0 has it.
template <typename A>
__device__ __forceinline__ void sum_over_block(Array<A> parts, const A (&mine)[3], A (&sums)[3]) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  for (int n = 0; n < 3; ++n) parts[n * threads + thread] = mine[n];
  __syncthreads();
  if (threads <= kSerialChannels) {
    if (thread == 0)
      for (int n = 0; n < 3; ++n)
        for (int other = 1; other < threads; ++other) parts[n * threads] += A(parts[n * threads + other]);
  } else {
    for (int live = threads; live > 1;) {
      const int half = (live + 1) / 2;
      if (thread + half < live)
        for (int n = 0; n < 3; ++n) parts[n * threads + thread] += A(parts[n * threads + thread + half]);
      __syncthreads();
      live = half;
    }
  }
  if (thread == 0)
    for (int n = 0; n < 3; ++n) sums[n] = parts[n * threads];
  __syncthreads();
}

template <typename T, typename A>
__global__ void classic_backward(const __grid_constant__ Classic<T, A> p) {
  const Array<A> parts = shared_array<A>(0, 3 * int64_t(blockDim.x));
  const int item = int(blockIdx.x), channel = int(threadIdx.x);
  const int head = item % p.heads, image = item / p.heads / p.queries;
  const A grad = to_arithmetic(p.grad_out[item * p.channels + channel]);
  for (int level = 0; level < p.levels; ++level) {
    for (int point = 0; point < p.points; ++point) {
      const int sample = (item * p.levels + level) * p.points + point;
      const A weight = p.weights[sample];
      const Footprint<A> f =
          footprint(p, image, head, channel, level, p.locations[2 * sample], p.locations[2 * sample + 1]);
      A products[4];
      for (int k = 0; k < 4; ++k) {
        products[k] = grad * corner(p, f, k);
        if (f.inside[k]) atomic_add(p.grad_value, f.at[k], weight * share(f, k) * grad);
      }
      const SampleGradient<A> g = differentiate(f.dx, f.dy, weight, products[0], products[1], products[2], products[3],
                                                f.width, f.height);
      const A mine[3] = {g.weight, g.x, g.y};
      A sums[3];
      sum_over_block(parts, mine, sums);
      if (threadIdx.x == 0) {
        p.grad_weights[sample] = sums[0];
        p.grad_locations[2 * sample] = sums[1];
        p.grad_locations[2 * sample + 1] = sums[2];
      }
    }
  }
}

template <typename T, typename A>
void run(const ClassicCall& c, bool backward, Stream stream) {
  const int64_t items = c.batch * c.queries * c.heads, samples = items * c.levels * c.points;
  const int64_t values = c.batch * c.positions * c.heads * c.channels, outputs = items * c.channels;
  if (outputs == 0) return;
  if (std::max({values, outputs, 2 * samples}) > INT32_MAX - kForwardThreads)
    throw std::runtime_error("more than 2^31 elements");
  Classic<T, A> p{};
  p.positions = int(c.positions);
  p.heads = int(c.heads);
  p.channels = int(c.channels);
  p.queries = int(c.queries);
  p.items = int(items);
  p.levels = int(c.levels);
  p.points = int(c.points);
  p.value = array(static_cast<const T*>(c.value), values);
  p.shapes = array(c.shapes, 3 * c.levels);
  p.locations = array(static_cast<const A*>(c.locations), 2 * samples);
  p.weights = array(static_cast<const A*>(c.weights), samples);
  if (!backward) {
    p.out = array(static_cast<T*>(c.out), outputs);
    launch(classic_forward<T, A>, (outputs + kForwardThreads - 1) / kForwardThreads, kForwardThreads, 0, stream, p);
    return;
  }
  p.grad_out = array(static_cast<const T*>(c.grad_out), outputs);
  p.grad_value = array(static_cast<A*>(c.grad_value), values);
  p.grad_locations = array(static_cast<A*>(c.grad_locations), 2 * samples);
  p.grad_weights = array(static_cast<A*>(c.grad_weights), samples);
  launch(classic_backward<T, A>, items, int(c.channels), 3 * c.channels * int64_t(sizeof(A)), stream, p);
}

}  // namespace
}  // namespace mmi

// Launches on `stream` of the current device. `type` of the value: 0 float, 1 double, 2 bfloat16, 3
// float16. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* mmi_classic(const ClassicCall* call, int type,
                                                                          bool backward, void* stream) {
  using namespace mmi;
  static std::string problem;
  void (*const runs[])(const ClassicCall&, bool, Stream) = {run<float, float>, run<double, double>,
                                                            run<BFloat16, float>, run<Float16, float>};
  try {
    runs[type](*call, backward, Stream(stream));
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}
