// The operators' GPU entry points on libtorch's stable ABI: they check, allocate, plan and launch on
// the current stream of the value's device. Compiled a second time with MMI_EMULATED, they register
// the same kernels, run by the emulation on CPU tensors, as torch.ops.mmi_kernels_emulated.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "../common/arguments.h"
#include "plan.h"
#include "problem.h"

#define MMI_EXPORT extern "C" __attribute__((visibility("default")))

MMI_EXPORT const mmi::DeviceKernels* mmi_device_kernels_f32();
MMI_EXPORT const mmi::DeviceKernels* mmi_device_kernels_f64();
MMI_EXPORT const mmi::DeviceKernels* mmi_device_kernels_bf16();
MMI_EXPORT const mmi::DeviceKernels* mmi_device_kernels_f16();

namespace {

using mmi::arithmetic_type;
using mmi::data;
using mmi::DeviceKernels;
using mmi::DeviceProblem;
using mmi::ScalarType;
using mmi::Shapes;
using mmi::Tensor;

using Find = const DeviceKernels* (*)();

struct KernelsOfType {
  ScalarType type;
  const char* name;
  Find find;
};

KernelsOfType kernel_table[] = {
    {ScalarType::Float, "mmi_device_kernels_f32", mmi_device_kernels_f32},
    {ScalarType::Double, "mmi_device_kernels_f64", mmi_device_kernels_f64},
    {ScalarType::BFloat16, "mmi_device_kernels_bf16", mmi_device_kernels_bf16},
    {ScalarType::Half, "mmi_device_kernels_f16", mmi_device_kernels_f16},
};

const DeviceKernels& kernels_for(const Tensor& value) {
  for (const KernelsOfType& entry : kernel_table)
    if (entry.type == value.scalar_type()) return *entry.find();
  STD_TORCH_CHECK(false, "value: expected float32, float64, bfloat16 or float16");
}

#if defined(MMI_EMULATED)

struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

// libtorch's stable ABI has no way to the current CUDA stream that all versions share but this
// function of libtorch_cuda, which is looked up where it is loaded: the library then needs neither
// CUDA's libtorch to be linked nor to be there.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(found);
  }();
  STD_TORCH_CHECK(function, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "no current stream on device ", device);
  return stream;
}

// Makes the value's device the current one while it lives.
class Device {
 public:
  explicit Device(const Tensor& value) : index_(value.get_device_index()), guard_(index_) {}
  void* stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

void set_levels(DeviceProblem& p, const Shapes& shapes, int64_t points) {
  STD_TORCH_CHECK(shapes.size() <= 2 * mmi::kMaxLevels, "spatial_shapes: at most ", mmi::kMaxLevels,
                  " levels on a GPU, got ", shapes.size() / 2);
  p.levels = int32_t(shapes.size() / 2);
  p.points = int32_t(points);
  mmi::over_levels(p, shapes, [&](int64_t level, int64_t height, int64_t width, int64_t from) {
    p.height[level] = int32_t(height);
    p.width[level] = int32_t(width);
    p.start[level] = int32_t(from);
  });
}

// Queries whose share of the table's gradients is kept together: few enough for 2^15 groups of lanes,
// which fill a GPU, and a power of two of at most a tile of the second tier. A function of the problem
// alone, as it fixes the order of sums.
int64_t choose_chunk(const DeviceProblem& p) {
  int64_t chunk = 4;
  while (chunk < 64 && chunk << 15 < p.queries * p.heads) chunk *= 2;
  return chunk;
}

mmi::Tier tier = mmi::Tier::automatic;

// Whether rows of the value (and of grad_out) can be read in pieces of 16 bytes.
bool aligned(const DeviceProblem& p, const Tensor& value) {
  const auto address = reinterpret_cast<uintptr_t>(p.value) | reinterpret_cast<uintptr_t>(p.grad_out);
  const int64_t bytes = int64_t(value.element_size());
  const int64_t sizes = p.channels | p.stride_image | p.stride_position | p.stride_head;
  return address % 16 == 0 && sizes * bytes % 16 == 0;
}

void plan(DeviceProblem& p, const Tensor& value) {
  p.chunk = choose_chunk(p);
  const ScalarType type = value.scalar_type();
  const bool sixteen_bits = type == ScalarType::BFloat16 || type == ScalarType::Half;
  p.matrix_levels = mmi::Plan::matrix_levels(p, sixteen_bits, aligned(p, value), tier);
  p.window_levels = mmi::Plan::window_levels(p, sixteen_bits, aligned(p, value), tier);
}

// Runs the forward; the matrix levels' share of the output needs memory of its own.
void run_forward(DeviceProblem& p, const Tensor& value, void* stream) {
  plan(p, value);
  const Shapes shape = p.matrix_levels ? Shapes{p.queries, p.heads, p.channels} : Shapes{0};
  Tensor partial = torch::stable::new_empty(value, shape, ScalarType::Float);
  if (p.matrix_levels) p.partial = partial.mutable_data_ptr();
  kernels_for(value).forward(p, stream);
}

void run_backward(DeviceProblem& p, const Tensor& value, void* stream) {
  plan(p, value);
  kernels_for(value).backward(p, stream);
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, bool wanted, ScalarType type) {
  return torch::stable::new_zeros(like, wanted ? shape : std::vector<int64_t>{0}, type);
}

// The value's gradient: added to in the type of the arithmetic and rounded at the end, or written
// once by each element's owner.
class ValueGradient {
 public:
  ValueGradient(DeviceProblem& p, const Tensor& value, bool wanted, bool deterministic)
      : type_(value.scalar_type()),
        tensor_(deterministic ? torch::stable::new_empty(value, wanted ? shape(p) : Shapes{0})
                              : zeros(value, shape(p), wanted, arithmetic_type(value))) {
    if (wanted) (deterministic ? p.owned_value : p.added_value) = tensor_.mutable_data_ptr();
  }
  Tensor finish() const { return tensor_.scalar_type() == type_ ? tensor_ : torch::stable::to(tensor_, type_); }

 private:
  ScalarType type_;
  Tensor tensor_;

  static Shapes shape(const DeviceProblem& p) { return {p.images, p.positions, p.heads, p.channels}; }
};

std::tuple<Tensor, Tensor> mmfs_forward(Tensor value, Shapes spatial_shapes, Tensor offsets, Tensor logits,
                                        Tensor table_offsets, Tensor table_logits, Tensor reference_points,
                                        Tensor visible, std::optional<Tensor> sink_value, double base, bool sink) {
  DeviceProblem p{};
  mmi::set_value(p, value);
  STD_TORCH_CHECK(offsets.dim() == 4, "offsets: expected 4 axes");
  p.queries = offsets.size(0);
  set_levels(p, spatial_shapes, offsets.size(2));
  mmi::set_projections(p, value, {offsets, logits, table_offsets, table_logits, reference_points, visible, sink_value,
                                  base, sink});
  const Device device(value);
  Tensor out = torch::stable::new_empty(value, {p.queries, p.heads, p.channels});
  Tensor stats = torch::stable::new_empty(value, {2, p.queries, p.heads}, arithmetic_type(value));
  p.out = out.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  run_forward(p, value, device.stream());
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mmfs_backward(
    Tensor grad_out, Tensor out, Tensor stats, Tensor value, Shapes spatial_shapes, Tensor offsets, Tensor logits,
    Tensor table_offsets, Tensor table_logits, Tensor reference_points, Tensor visible, double base, bool sink,
    bool for_value, bool for_query, bool deterministic) {
  DeviceProblem p{};
  mmi::set_value(p, value);
  STD_TORCH_CHECK(offsets.dim() == 4, "offsets: expected 4 axes");
  p.queries = offsets.size(0);
  set_levels(p, spatial_shapes, offsets.size(2));
  mmi::set_projections(p, value, {offsets, logits, table_offsets, table_logits, reference_points, visible,
                                  std::nullopt, base, sink});
  const ScalarType real = arithmetic_type(value), type = value.scalar_type();
  p.grad_out = data(grad_out, "grad_out", value, type, {p.queries, p.heads, p.channels});
  p.out = const_cast<void*>(data(out, "out", value, type, {p.queries, p.heads, p.channels}));
  p.stats = const_cast<void*>(data(stats, "stats", value, real, {2, p.queries, p.heads}));
  p.chunk = choose_chunk(p);

  const Device device(value);
  const ValueGradient grad_value(p, value, for_value, deterministic);
  Tensor grad_offsets = zeros(value, {p.queries, p.heads, p.points, 2}, for_query, real);
  Tensor grad_logits = zeros(value, {p.queries, p.heads, p.levels, p.points}, for_query, real);
  Tensor grad_table_offsets = zeros(value, {p.rows, p.heads, p.points, 2}, for_query, real);
  Tensor grad_table_logits = zeros(value, {p.rows, p.heads, p.levels, p.points}, for_query, real);
  const int64_t share = 2 * p.points + p.samples();
  Tensor shares = zeros(value, {p.chunks(), p.heads, p.share_rows(), share}, for_query, real);
  if (for_query) {
    p.grad_offsets = grad_offsets.mutable_data_ptr();
    p.grad_logits = grad_logits.mutable_data_ptr();
    p.grad_table_offsets = grad_table_offsets.mutable_data_ptr();
    p.grad_table_logits = grad_table_logits.mutable_data_ptr();
    p.table_shares = shares.mutable_data_ptr();
  }
  run_backward(p, value, device.stream());
  return {grad_value.finish(), grad_offsets, grad_logits, grad_table_offsets, grad_table_logits};
}

Tensor deform_forward(Tensor value, Shapes spatial_shapes, Tensor locations, Tensor weights) {
  DeviceProblem p{};
  mmi::set_value(p, value);
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 axes");
  set_levels(p, spatial_shapes, locations.size(4));
  mmi::set_general(p, value, locations, weights);
  const Device device(value);
  Tensor out = torch::stable::new_empty(value, {p.images, p.group_size, p.heads * p.channels});
  p.out = out.mutable_data_ptr();
  run_forward(p, value, device.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> deform_backward(Tensor grad_out, Tensor value, Shapes spatial_shapes,
                                                   Tensor locations, Tensor weights, bool for_value, bool for_query,
                                                   bool deterministic) {
  DeviceProblem p{};
  mmi::set_value(p, value);
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 axes");
  set_levels(p, spatial_shapes, locations.size(4));
  mmi::set_general(p, value, locations, weights);
  const std::vector<int64_t> shape{p.images, p.group_size, p.heads * p.channels};
  p.grad_out = data(grad_out, "grad_out", value, value.scalar_type(), shape);

  const Device device(value);
  const ValueGradient grad_value(p, value, for_value, deterministic);
  const ScalarType real = arithmetic_type(value);
  const std::vector<int64_t> samples{p.images, p.group_size, p.heads, p.levels, p.points};
  Tensor grad_locations = zeros(value, {samples[0], samples[1], samples[2], samples[3], samples[4], 2}, for_query, real);
  Tensor grad_weights = zeros(value, samples, for_query, real);
  if (for_query) {
    p.grad_offsets = grad_locations.mutable_data_ptr();
    p.grad_logits = grad_weights.mutable_data_ptr();
  }
  run_backward(p, value, device.stream());
  return {grad_value.finish(), grad_locations, grad_weights};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("mmfs_forward", TORCH_BOX(&mmfs_forward));
  m.impl("mmfs_backward", TORCH_BOX(&mmfs_backward));
  m.impl("deform_forward", TORCH_BOX(&deform_forward));
  m.impl("deform_backward", TORCH_BOX(&deform_backward));
}

}  // namespace

// 0: the rule of plan.h; 1: the first tier alone; 2, 3: matrices, windows wherever they can run (mmi::Tier).
MMI_EXPORT void mmi_set_device_tier(int number) { tier = mmi::Tier(number); }

#if defined(MMI_EMULATED)

STABLE_TORCH_LIBRARY(mmi_kernels_emulated, m) { mmi::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(mmi_kernels_emulated, CPU, m) { implement(m); }

// From now on runs the kernels of another library (with one deleted barrier, say), for the types
// that it has; with null the own ones again. Returns how many types it has, -1 if it does not load.
MMI_EXPORT int mmi_emulated_use(const char* path) {
  static const std::vector<KernelsOfType> own(std::begin(kernel_table), std::end(kernel_table));
  std::copy(own.begin(), own.end(), kernel_table);
  if (path == nullptr) return int(own.size());
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return -1;
  int found = 0;
  for (KernelsOfType& entry : kernel_table)
    if (void* find = dlsym(library, entry.name)) {
      entry.find = reinterpret_cast<Find>(find);
      ++found;
    }
  return found;
}

#else

STABLE_TORCH_LIBRARY_IMPL(mmi_kernels, CUDA, m) { implement(m); }

#endif
