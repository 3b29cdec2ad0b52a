// The deformable-attention kernels for CPUs; compiled once per instruction set (MMI_KERNELS names
// the table to define).
//
// A task handles one head and a run of queries, image by image. An image's maps of one head are
// first copied into a dense tile [S, D] (whose rows of adjacent pixels are adjacent, in the type
// of the arithmetic), unless too few samples are taken from it to pay for the copy. Every sum is
// formed by one task in a fixed order, so results do not depend on the number of threads.
#include <initializer_list>

#include "../common/bilinear.h"
#include "problem.h"
#include "simd.h"

namespace mmi {
namespace {

// Hands out pieces of a task's scratch; with a null base it only adds up their sizes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename E>
  E* take(int64_t count) {
    E* piece = reinterpret_cast<E*>(base + used);
    used += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
    return piece;
  }
};

template <typename A>
struct Scratch {
  Samples<A> s;
  A *tile, *sums, *grad, *out, *peak, *inverse, *delta;
  int64_t used;

  Scratch(const Problem& p, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    const int64_t n = padded(p.samples()), channels = padded(p.channels);
    s.n = p.samples();
    for (A** array : {&s.x, &s.y, &s.weight, &s.dx, &s.dy}) *array = arena.take<A>(n);
    for (int k = 0; k < 4; ++k) {
      s.row[k] = arena.take<int32_t>(n);
      s.share[k] = arena.take<A>(n);
      s.dot[k] = arena.take<A>(n);
    }
    grad = arena.take<A>(channels);
    out = arena.take<A>(channels);
    for (A** array : {&peak, &inverse, &delta}) *array = arena.take<A>(p.chunk);
    sums = arena.take<A>(p.chunk * channels);
    tile = arena.take<A>(p.positions * channels);
    used = arena.used;
  }
};

template <typename A, typename T>
void copy_row(const T* from, A* to, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) to[d] = widen(from[d]);
  for (int64_t d = channels; d < padded(channels); ++d) to[d] = 0;
}

template <typename A, typename T>
void fill_tile(const Problem& p, const T* maps, A* tile) {
  const int64_t channels = padded(p.channels);
  for (int64_t i = 0; i < p.positions; ++i)
    copy_row(maps + i * p.stride_position, tile + i * channels, p.channels);
}

// Rows, fractions and shares of all samples, from x, y and weight.
template <typename A>
void find_corners(const Problem& p, const Samples<A>& s) {
  const int64_t n = padded(s.n);
  // Plain locals: the compiler vectorises the loop only when no pointer is read in it.
  const int32_t *width = p.width, *height = p.height, *start = p.start;
  const A *x = s.x, *y = s.y, *weight = s.weight;
  A *dx = s.dx, *dy = s.dy;
  int32_t *row0 = s.row[0], *row1 = s.row[1], *row2 = s.row[2], *row3 = s.row[3];
  A *share0 = s.share[0], *share1 = s.share[1], *share2 = s.share[2], *share3 = s.share[3];
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const Corners<A> c = locate(x[j], y[j], width[j], height[j], start[j]);
    const A low = weight[j] * c.dy, high = weight[j] - low;
    dx[j] = c.dx;
    dy[j] = c.dy;
    row0[j] = c.row00;
    row1[j] = c.row01;
    row2[j] = c.row10;
    row3[j] = c.row11;
    share0[j] = high - high * c.dx;
    share1[j] = high * c.dx;
    share2[j] = low - low * c.dx;
    share3[j] = low * c.dx;
  }
}

// MMFS: locations and weights from projections and table, a softmax over all that a query sees.
template <typename A>
struct Fused {
  const Problem& p;
  int64_t head;

  const A* at(const void* from, int64_t row, int64_t size) const {
    return static_cast<const A*>(from) + (row * p.heads + head) * size;
  }

  // Fills s.weight with the logits of query q and the image rel back, padded with -infinity.
  void logits(int64_t q, int64_t rel, const Samples<A>& s) const {
    const A *own = at(p.logits, q, s.n), *table = at(p.table_logits, rel, s.n);
    for (int64_t j = 0; j < s.n; ++j) s.weight[j] = own[j] + table[j];
    for (int64_t j = s.n; j < padded(s.n); ++j) s.weight[j] = -A(INFINITY);
  }

  template <typename F>
  void over_visible(int64_t q, F visit) const {
    const int64_t group = q / p.group_size, last = p.last(group);
    int64_t first = p.first(group);
    if (first < last - (p.rows - 1)) first = last - (p.rows - 1);
    for (int64_t image = first; image < last; ++image) visit(last - image);
  }

  // The softmax's largest logit and sum, saved for the backward, which reads them back.
  void measure(int64_t q, const Samples<A>& s) const {
    A peak = p.sink ? A(0) : -A(INFINITY), total = 0;
    const int64_t n = padded(s.n);
    over_visible(q, [&](int64_t rel) {
      logits(q, rel, s);
      A most = peak;
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < n; ++j) most = s.weight[j] > most ? s.weight[j] : most;
      peak = most;
    });
    over_visible(q, [&](int64_t rel) {
      logits(q, rel, s);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += exp_nonpositive(s.weight[j] - peak);
      total += sum;
    });
    if (p.sink) total += exp_nonpositive(-peak);
    A* stats = static_cast<A*>(p.stats) + q * p.heads + head;
    stats[0] = peak;
    stats[p.queries * p.heads] = total;
  }

  void begin(int64_t first, int64_t last, bool forward, Scratch<A>& work) const {
    for (int64_t q = first; q < last; ++q) {
      if (forward) measure(q, work.s);
      const A* stats = static_cast<const A*>(p.stats) + q * p.heads + head;
      const A total = stats[p.queries * p.heads];
      work.peak[q - first] = stats[0];
      work.inverse[q - first] = total > 0 ? 1 / total : total == 0 ? A(0) : total;
    }
  }

  // What the sink, or seeing nothing, adds to the output.
  void end(int64_t at_chunk, const Scratch<A>& work, A* sum) const {
    if (!p.sink_value) return;
    const A inverse = work.inverse[at_chunk];
    const A share = p.sink ? exp_nonpositive(-work.peak[at_chunk]) * inverse : A(inverse == 0);
    const A* value = static_cast<const A*>(p.sink_value) + head * p.channels;
    for (int64_t d = 0; d < p.channels; ++d) sum[d] += share * value[d];
  }

  void samples(int64_t q, int64_t image, A peak, A inverse, const Samples<A>& s) const {
    const int64_t rel = p.last(q / p.group_size) - image, n = padded(s.n);
    const A *own = at(p.offsets, q, 2 * p.points), *table = at(p.table_offsets, rel, 2 * p.points);
    const A* centre = static_cast<const A*>(p.reference) + q * p.reference_stride;
    const A base = A(p.base);
    for (int64_t i = 0; i < p.points; ++i) {
      s.x[i] = centre[0] + (own[2 * i] + table[2 * i]) / base;
      s.y[i] = centre[1] + (own[2 * i + 1] + table[2 * i + 1]) / base;
    }
    for (int64_t j = p.points; j < s.n; ++j) {
      s.x[j] = s.x[j - p.points];
      s.y[j] = s.y[j - p.points];
    }
    for (int64_t j = s.n; j < n; ++j) s.x[j] = s.y[j] = 0;
    logits(q, rel, s);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) s.weight[j] = exp_nonpositive(s.weight[j] - peak) * inverse;
  }

  void clear(int64_t first, int64_t last, int64_t chunk) const {
    const int64_t n = p.samples();
    for (int64_t q = first; q < last; ++q) {
      A *offsets = grad(p.grad_offsets, q, 2 * p.points), *logits = grad(p.grad_logits, q, n);
      for (int64_t i = 0; i < 2 * p.points; ++i) offsets[i] = 0;
      for (int64_t j = 0; j < n; ++j) logits[j] = 0;
    }
    const int64_t size = p.rows * (2 * p.points + n);
    A* table = grad(p.grad_table, chunk, size);
    for (int64_t i = 0; i < size; ++i) table[i] = 0;
  }

  A* grad(void* to, int64_t row, int64_t size) const {
    return static_cast<A*>(to) + (row * p.heads + head) * size;
  }

  // Adds one image's share of the gradients; s.weight, s.x and s.y are used up.
  void accumulate(int64_t q, int64_t image, int64_t chunk, A delta, const Samples<A>& s) const {
    const int64_t n = s.n, twice = 2 * p.points;
    const int64_t rel = p.last(q / p.group_size) - image;
    A *offsets = grad(p.grad_offsets, q, twice), *logits = grad(p.grad_logits, q, n);
    A* table = grad(p.grad_table, chunk, p.rows * (twice + n)) + rel * (twice + n);
    const A* weight = s.share[0];  // holds the derivative with respect to the weight
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const A g = s.weight[j] * (weight[j] - delta);
      logits[j] += g;
      table[twice + j] += g;
    }
    const A base = A(p.base);
    for (int64_t i = 0; i < p.points; ++i) {
      A x = 0, y = 0;
      for (int64_t j = i; j < n; j += p.points) {
        x += s.x[j];
        y += s.y[j];
      }
      x /= base;
      y /= base;
      offsets[2 * i] += x;
      offsets[2 * i + 1] += y;
      table[2 * i] += x;
      table[2 * i + 1] += y;
    }
  }
};

// The general operator: locations and weights are given.
template <typename A>
struct General {
  const Problem& p;
  int64_t head;

  void begin(int64_t, int64_t, bool, Scratch<A>&) const {}
  void end(int64_t, const Scratch<A>&, A*) const {}
  void clear(int64_t, int64_t, int64_t) const {}

  void samples(int64_t q, int64_t, A, A, const Samples<A>& s) const {
    const int64_t first = (q * p.heads + head) * s.n;
    const A* locations = static_cast<const A*>(p.locations) + 2 * first;
    const A* weights = static_cast<const A*>(p.weights) + first;
    const int64_t n = s.n;
    A *x = s.x, *y = s.y, *weight = s.weight;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      x[j] = locations[2 * j];
      y[j] = locations[2 * j + 1];
      weight[j] = weights[j];
    }
    for (int64_t j = n; j < padded(n); ++j) x[j] = y[j] = weight[j] = 0;
  }

  void accumulate(int64_t q, int64_t, int64_t, A, const Samples<A>& s) const {
    const int64_t first = (q * p.heads + head) * s.n;
    A* locations = static_cast<A*>(p.grad_offsets) + 2 * first;
    A* weights = static_cast<A*>(p.grad_logits) + first;
    const int64_t n = s.n;
    const A *x = s.x, *y = s.y, *weight = s.share[0];
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      locations[2 * j] = x[j];
      locations[2 * j + 1] = y[j];
      weights[j] = weight[j];
    }
  }
};

// Turns the corners' dot products into gradients: share[0] with respect to the weight, x and y
// with respect to the location.
template <typename A>
void differentiate_samples(const Problem& p, const Samples<A>& s) {
  const A *dot0 = s.dot[0], *dot1 = s.dot[1], *dot2 = s.dot[2], *dot3 = s.dot[3];
  A* weight = s.share[0];
#pragma GCC ivdep
  for (int64_t j = 0; j < s.n; ++j) {
    const SampleGradient<A> g = differentiate(s.dx[j], s.dy[j], s.weight[j], dot0[j], dot1[j], dot2[j], dot3[j],
                                              A(p.width[j]), A(p.height[j]));
    weight[j] = g.weight;
    s.x[j] = g.x;
    s.y[j] = g.y;
  }
}

// Visits the images that any query of [first, last) sees: visit(image, number of queries).
template <typename F>
void over_images(const Problem& p, int64_t first, int64_t last, F visit) {
  int64_t low = p.images, high = 0;
  for (int64_t g = first / p.group_size; g * p.group_size < last; ++g) {
    if (p.first(g) < low) low = p.first(g);
    if (p.last(g) > high) high = p.last(g);
  }
  for (int64_t image = low; image < high; ++image) {
    int64_t seen = 0;
    for (int64_t q = first; q < last; ++q) seen += p.sees(q / p.group_size, image);
    if (seen) visit(image, seen);
  }
}

// Calls use(maps, stride, padded channels) with the head's maps of an image: copied into the tile,
// or where they lie when only a few samples are taken (measured on Zen 4, three levels of 1,344
// positions and 64 channels: copying pays from about one sample a position on).
template <typename T, typename A, typename F>
void with_maps(const Problem& p, int64_t image, int64_t head, int64_t seen, Scratch<A>& work, F use) {
  const T* maps = static_cast<const T*>(p.value) + image * p.stride_image + head * p.stride_head;
  const int64_t channels = padded(p.channels);
  if (channels == p.channels && seen * p.samples() < p.positions) {
    use(maps, p.stride_position, channels);
  } else {
    fill_tile(p, maps, work.tile);
    use(static_cast<const A*>(work.tile), channels, channels);
  }
}

template <typename T, typename A, typename Op>
void forward_task(const Problem& p, const Op& op, int64_t head, int64_t chunk, Scratch<A>& work) {
  const int64_t first = chunk * p.chunk, last = first + p.chunk < p.queries ? first + p.chunk : p.queries;
  const int64_t channels = padded(p.channels);
  for (int64_t i = 0; i < (last - first) * channels; ++i) work.sums[i] = 0;
  op.begin(first, last, true, work);
  over_images(p, first, last, [&](int64_t image, int64_t seen) {
    with_maps<T>(p, image, head, seen, work, [&](const auto* maps, int64_t stride, int64_t) {
      for (int64_t q = first; q < last; ++q) {
        if (!p.sees(q / p.group_size, image)) continue;
        op.samples(q, image, work.peak[q - first], work.inverse[q - first], work.s);
        find_corners(p, work.s);
        gather(maps, stride, work.s, work.sums + (q - first) * channels, channels);
      }
    });
  });
  for (int64_t q = first; q < last; ++q) {
    A* sum = work.sums + (q - first) * channels;
    op.end(q - first, work, sum);
    T* out = static_cast<T*>(p.out) + (q * p.heads + head) * p.channels;
    for (int64_t d = 0; d < p.channels; ++d) narrow(sum[d], out[d]);
  }
}

// Gradients of what belongs to a query: projections, and the chunk's share of the table's.
template <typename T, typename A, typename Op>
void backward_query_task(const Problem& p, const Op& op, int64_t head, int64_t chunk, Scratch<A>& work) {
  const int64_t first = chunk * p.chunk, last = first + p.chunk < p.queries ? first + p.chunk : p.queries;
  op.clear(first, last, chunk);
  op.begin(first, last, false, work);
  const int64_t channels = padded(p.channels);
  for (int64_t q = first; q < last; ++q) {
    const int64_t at = (q * p.heads + head) * p.channels;
    A* grad = work.sums + (q - first) * channels;
    copy_row(static_cast<const T*>(p.grad_out) + at, grad, p.channels);
    A delta = 0;
    if (p.out) {
      const T* out = static_cast<const T*>(p.out) + at;
#pragma omp simd reduction(+ : delta)
      for (int64_t d = 0; d < p.channels; ++d) delta += grad[d] * widen(out[d]);
    }
    work.delta[q - first] = delta;
  }
  over_images(p, first, last, [&](int64_t image, int64_t seen) {
    with_maps<T>(p, image, head, seen, work, [&](const auto* maps, int64_t stride, int64_t) {
      for (int64_t q = first; q < last; ++q) {
        if (!p.sees(q / p.group_size, image)) continue;
        op.samples(q, image, work.peak[q - first], work.inverse[q - first], work.s);
        find_corners(p, work.s);
        dot(maps, stride, work.s, work.sums + (q - first) * channels, channels);
        differentiate_samples(p, work.s);
        op.accumulate(q, image, chunk, work.delta[q - first], work.s);
      }
    });
  });
}

// Gradient of one head's maps of one image.
template <typename T, typename A, typename Op>
void backward_value_task(const Problem& p, const Op& op, int64_t head, int64_t image, Scratch<A>& work) {
  const int64_t channels = padded(p.channels);
  for (int64_t i = 0; i < p.positions * channels; ++i) work.tile[i] = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    if (!p.sees(group, image)) continue;
    for (int64_t q = group * p.group_size; q < (group + 1) * p.group_size; ++q) {
      op.begin(q, q + 1, false, work);
      op.samples(q, image, work.peak[0], work.inverse[0], work.s);
      find_corners(p, work.s);
      copy_row(static_cast<const T*>(p.grad_out) + (q * p.heads + head) * p.channels, work.grad, p.channels);
      scatter(work.tile, channels, work.s, work.grad, channels);
    }
  }
  T* to = static_cast<T*>(p.grad_value) + (image * p.positions * p.heads + head) * p.channels;
  for (int64_t i = 0; i < p.positions; ++i)
    for (int64_t d = 0; d < p.channels; ++d) narrow(work.tile[i * channels + d], to[i * p.heads * p.channels + d]);
}

enum class Pass { forward, query, value };

template <Pass pass, typename T, typename A, template <typename> class Op>
void run_tasks(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  Scratch<A> work(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    if (pass == Pass::value) {
      backward_value_task<T, A>(p, Op<A>{p, task % p.heads}, task % p.heads, task / p.heads, work);
      continue;
    }
    const int64_t head = task / p.chunks(), chunk = task % p.chunks();
    const Op<A> op{p, head};
    if (pass == Pass::forward) forward_task<T, A>(p, op, head, chunk, work);
    if (pass == Pass::query) backward_query_task<T, A>(p, op, head, chunk, work);
  }
}

template <Pass pass, typename T, typename A>
void run_typed(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if (p.locations) {
    run_tasks<pass, T, A, General>(p, begin, end, scratch);
  } else {
    run_tasks<pass, T, A, Fused>(p, begin, end, scratch);
  }
}

template <Pass pass>
void run(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.dtype) {
    case Dtype::f32: return run_typed<pass, float, float>(p, begin, end, scratch);
    case Dtype::f64: return run_typed<pass, double, double>(p, begin, end, scratch);
    case Dtype::bf16: return run_typed<pass, BFloat16, float>(p, begin, end, scratch);
    case Dtype::f16: return run_typed<pass, Float16, float>(p, begin, end, scratch);
  }
}

int64_t scratch_bytes(const Problem& p) {
  return p.dtype == Dtype::f64 ? Scratch<double>(p, nullptr).used : Scratch<float>(p, nullptr).used;
}

const Kernels kernels{scratch_bytes, run<Pass::forward>, run<Pass::query>, run<Pass::value>};

}  // namespace

const Kernels& MMI_KERNELS() { return kernels; }

}  // namespace mmi
