// What the CPU kernels are asked to do, as plain pointers and sizes.
//
// The kernels are compiled once per instruction set; this header is all that they share with the
// code that registers them, and it needs nothing from libtorch.
#pragma once

#include <cstdint>

// Always inlined: a copy left out of line by one instruction set's object could be the one that
// the linker keeps for all of them.
#define MMI_METHOD inline __attribute__((always_inline))

namespace mmi {

enum class Dtype { f32, f64, bf16, f16 };

constexpr int64_t kLanes = 16;  // per-sample arrays and channels are padded to multiples of this

constexpr MMI_METHOD int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// "real" below: double when the dtype is f64, else float. Tensors are contiguous but for value.
struct Problem {
  Dtype dtype;  // of value, out, grad_out and grad_value
  int64_t images, positions, heads, channels, levels, points, queries;

  const void* value;  // [I, S, H, D] with these strides, in elements; the last is 1
  int64_t stride_image, stride_position, stride_head;

  // Per sample of a (query, image, head), levels * points of them, padded with empty levels.
  const int32_t *width, *height, *start;

  // Which images a query sees. visible: [G, 2] half-open; the general operator has none and
  // group g sees image g.
  const int32_t* visible;
  int64_t groups, group_size;
  int64_t rows;  // rows of the table: an image further back is not visible

  // The fused operator (real): see mmi_kernels.ops.
  const void *offsets, *logits, *table_offsets, *table_logits, *reference, *sink_value;
  int64_t reference_stride;  // 0 where all queries share one point
  double base;
  bool sink;
  void* stats;  // [2, Q, H]: the largest logit and the sum of exponentials relative to it

  // The general operator (real): [Q, H, L, P, 2] and [Q, H, L, P], Q over all images.
  const void *locations, *weights;

  void* out;  // [Q, H, D]

  const void* grad_out;  // [Q, H, D]
  void* grad_value;      // [I, S, H, D] contiguous
  // Like offsets and logits, or like locations and weights (real).
  void *grad_offsets, *grad_logits;
  void* grad_table;  // [chunks, H, K, 2 P + L P] (real): each chunk's share of both tables' gradients

  int64_t chunk;  // queries handled together by one task

  MMI_METHOD int64_t samples() const { return levels * points; }
  MMI_METHOD int64_t chunks() const { return (queries + chunk - 1) / chunk; }
  MMI_METHOD int64_t first(int64_t group) const { return visible ? visible[2 * group] : group; }
  MMI_METHOD int64_t last(int64_t group) const { return visible ? visible[2 * group + 1] : group + 1; }
  MMI_METHOD bool sees(int64_t group, int64_t image) const {
    return image >= first(group) && image < last(group) && last(group) - image < rows;
  }
};

// Each runs tasks [begin, end) in scratch of scratch_bytes(problem), aligned to 64 bytes.
// forward and backward_query: task = head * chunks + chunk. backward_value: image * heads + head.
struct Kernels {
  int64_t (*scratch_bytes)(const Problem&);
  void (*forward)(const Problem&, int64_t begin, int64_t end, void* scratch);
  void (*backward_query)(const Problem&, int64_t begin, int64_t end, void* scratch);
  void (*backward_value)(const Problem&, int64_t begin, int64_t end, void* scratch);
};

const Kernels& kernels_baseline();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace mmi
