// Launches the kernels for one type of value; compiled once a type, with MMI_TYPE f32, f64, bf16 or
// f16.
#include "gather.cuh"
#include "matrix.cuh"
#include "owner.cuh"
#include "window.cuh"

namespace mmi {
namespace {

namespace types {
using f32 = float;
using f64 = double;
using bf16 = BFloat16;
using f16 = Float16;
}  // namespace types

using T = types::MMI_TYPE;
using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

int64_t blocks_for(int64_t items, int64_t a_block) { return (items + a_block - 1) / a_block; }

// Calls run(unit, levels) with compile-time numbers: the kernels of the model's shapes, and one that
// takes any. Doubles are for checks and have that one alone.
template <typename F>
void specialise(const DeviceProblem& p, F run) {
  using std::integral_constant;
  const int unit = unit_of<T>(p);
  if constexpr (sizeof(T) < 8) {
    constexpr integral_constant<int, kVector<T>> full;
    if (unit == full && p.levels == 3) return run(full, integral_constant<int, 3>());
    if (unit == full && p.levels == 4) return run(full, integral_constant<int, 4>());
    if (unit == full) return run(full, integral_constant<int, 0>());
  }
  if constexpr (sizeof(T) == 2)
    if (unit == 4) return run(integral_constant<int, 4>(), integral_constant<int, 0>());
  return run(integral_constant<int, 1>(), integral_constant<int, 0>());
}

int64_t tiles_of(int64_t queries) { return blocks_for(queries, kTile); }

// The second tier's kernels exist for 16-bit values.
template <bool FUSED>
void matrix_levels_forward(const DeviceProblem& p, const Arguments<T, A>& a, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (FUSED)
      launch(measure_softmax<T>, blocks_for(p.queries * p.heads, kThreads / a.lanes), kThreads, 0, stream, a);
    launch(matrix_forward<T, FUSED>, tiles_of(p.queries) * p.heads, kThreads, matrix_bytes(0), stream, a);
  }
}

template <bool FUSED>
void matrix_levels_backward(const DeviceProblem& p, const Arguments<T, A>& a, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    int64_t pieces = 0;
    for (int l = 0; l < p.levels; ++l)
      if (p.matrix_levels >> l & 1) pieces += blocks_for(int64_t(p.width[l]) * p.height[l], kTile);
    const int64_t blocks = pieces * p.images * p.heads;
    if (p.added_value || p.owned_value)
      launch(matrix_backward_value<T, FUSED>, blocks, kThreads, matrix_bytes(0), stream, a, pieces);
    if (p.grad_logits)
      launch(matrix_backward_query<T, FUSED>, tiles_of(p.queries) * p.heads, kThreads, matrix_bytes(p.points), stream,
             a);
  }
}

void window_levels_backward(const DeviceProblem& p, const Arguments<T, A>& a, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    int64_t side = 0, windows = 0;
    while ((side + 1) * (side + 1) <= p.group_size) ++side;
    if (side * side != p.group_size || side % kSide) side = 0;
    for (int l = 0; l < p.levels; ++l) windows += p.window_levels >> l & 1;
    const int64_t blocks = tiles_of(p.queries) * p.heads * windows;
    launch(window_backward<T>, blocks, kThreads, kWindowBytes, stream, a, side, int(windows));
  }
}

template <bool FUSED>
void forward(const DeviceProblem& p, Stream stream) {
  const Arguments<T, A> a = arguments<T, A>(p);
  const int64_t groups = p.queries * p.heads * a.pieces;
  if (groups == 0) return;
  if (p.matrix_levels) matrix_levels_forward<FUSED>(p, a, stream);
  specialise(p, [&](auto unit, auto levels) {
    launch(gather_forward<T, A, unit, levels, FUSED>, blocks_for(groups, kThreads / a.lanes), kThreads, 0, stream, a);
  });
}

template <bool FUSED>
void owner(const DeviceProblem& p, const Arguments<T, A>& a, Stream stream) {
  if (p.channels == 0) return;
  const int64_t size = tile_positions<A>(a.channels);
  int64_t tiles = 0;
  for (int level = 0; level < p.levels; ++level) tiles += blocks_for(int64_t(p.width[level]) * p.height[level], size);
  const int64_t bytes = Batch<A>::kBytes + size * p.channels * int64_t(sizeof(A));
  launch(owner_backward<T, A, FUSED>, tiles * p.images * p.heads, kThreads, bytes, stream, a, tiles);
}

template <bool FUSED>
void backward(const DeviceProblem& p, Stream stream) {
  const Arguments<T, A> a = arguments<T, A>(p);
  if (p.added_value || p.grad_logits) {
    specialise(p, [&](auto unit, auto levels) {
      launch(gather_backward<T, A, unit, levels, FUSED>, blocks_for(a.chunks * p.heads, kThreads / a.lanes), kThreads,
             0, stream, a);
    });
  }
  if (p.owned_value) owner<FUSED>(p, a, stream);
  if (p.matrix_levels) matrix_levels_backward<FUSED>(p, a, stream);
  if (p.window_levels) window_levels_backward(p, a, stream);
  const int64_t table = p.heads * p.share_rows() * (2 * p.points + p.samples());
  if (p.grad_table_logits)
    launch(add_table_shares<T, A>, blocks_for(table, kAdjacent), kThreads, kThreads * 8, stream, a);
}

const DeviceKernels kernels{
    [](const DeviceProblem& p, void* stream) { (p.locations ? forward<false> : forward<true>)(p, Stream(stream)); },
    [](const DeviceProblem& p, void* stream) { (p.locations ? backward<false> : backward<true>)(p, Stream(stream)); },
};

}  // namespace
}  // namespace mmi

#define MMI_PASTE(a, b) a##b
#define MMI_NAME(a, b) MMI_PASTE(a, b)

// mmi_device_kernels_f32 and so on.
extern "C" __attribute__((visibility("default"))) const mmi::DeviceKernels* MMI_NAME(mmi_device_kernels_, MMI_TYPE)() {
  return &mmi::kernels;
}
