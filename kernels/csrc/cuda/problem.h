// What the CUDA kernels are asked to do, as plain pointers and sizes: all that they share with the
// code that registers them. Nothing here needs CUDA or libtorch.
#pragma once

#include <cstdint>

namespace mmi {

constexpr int kMaxLevels = 16;

// (Not named as the CPU's: checks shared by both are templates over this type, and one library holds
// both instances.) "real" below: double for float64 values, else float. Tensors are contiguous but for value.
struct DeviceProblem {
  int64_t images, positions, heads, channels, queries;  // queries of all groups
  int32_t levels, points;
  int32_t width[kMaxLevels], height[kMaxLevels], start[kMaxLevels];

  const void* value;  // [I, S, H, D] with these strides, in elements; the last is 1
  int64_t stride_image, stride_position, stride_head;

  // Which images a query sees: half-open intervals [G, 2] of int32. The general operator has none;
  // its group g sees image g.
  const int32_t* visible;
  int64_t groups, group_size;
  int64_t rows;  // rows of the table: an image further back is not visible

  // The fused operator (real): see mmi_kernels.ops.
  const void *offsets, *logits, *table_offsets, *table_logits, *reference, *sink_value;
  int64_t reference_stride;  // 0 where all queries share one point
  double base;
  bool sink;
  void* stats;  // [2, Q, H]: the largest logit and the sum of exponentials relative to it

  // The general operator (real): [Q, H, L, P, 2] and [Q, H, L, P].
  const void *locations, *weights;

  void* out;             // [Q, H, D]
  const void* grad_out;  // [Q, H, D]

  // Gradients, zero to begin with where they are added to. grad_value is [I, S, H, D] of the
  // value's type, owned_value the same where every element has one writer; added_value is real.
  void *added_value, *owned_value;
  void *grad_offsets, *grad_logits;  // like offsets and logits, or locations and weights (real)
  void* table_shares;                // [chunks, H, share_rows, 2 P + L P] (real): each chunk's share of the tables' gradients
  void *grad_table_offsets, *grad_table_logits;
  int64_t chunk;  // queries whose share of the tables' gradients is kept together

  // Second tier: bit l is set where a level takes that way; see plan.h.
  uint32_t matrix_levels;  // forward and backward by tensor cores
  uint32_t window_levels;  // the value's gradient by query tiles
  void* partial;           // [Q, H, D] float: what the matrix levels add to the output

  int64_t samples() const { return int64_t(levels) * points; }
  // Rows of the table that an image can lie back: 0 is none's, and none lies further back than there are images.
  int64_t share_rows() const { return rows < images + 1 ? rows : images + 1; }
  int64_t chunks() const { return (queries + chunk - 1) / chunk; }
};

// Each launches on a stream (a cudaStream_t) of the current device and returns at once.
struct DeviceKernels {
  void (*forward)(const DeviceProblem&, void* stream);
  void (*backward)(const DeviceProblem&, void* stream);
};

}  // namespace mmi
