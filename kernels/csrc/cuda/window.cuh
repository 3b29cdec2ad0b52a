// Second tier, fine levels of 16-bit values: the value's gradient of a tile of 64 neighbouring queries is
// added up by tensor cores, dV = W^T dO, in a window of 16 x 16 pixels around them, and goes to global
// memory once. Corners outside the window are added there one by one. (Sums of floats in shared memory
// instead would be loops of compare and swap: no GPU adds floats there by itself.)
#pragma once

#include "matrix.cuh"

namespace mmi {

constexpr int kSide = 8;                          // of a tile, in queries
constexpr int kWindow = 16;                       // of a window, in positions
constexpr int kWindowRow = kWindow * kWindow + 1;  // row of floats: a column's accesses meet no bank twice

// Shared memory: W [64, 256], a tile of the output's gradient, 64 intervals.
constexpr int64_t kWindowGradsAt = kTile * kWindowRow * 4;
constexpr int64_t kWindowIntervalsAt = kWindowGradsAt + kTile * kWide * 2;
constexpr int64_t kWindowBytes = kWindowIntervalsAt + 2 * kTile * 8;

// The query at place i of a tile: 8 x 8 of a group that is a square grid with `side` queries a row, or,
// where groups are no such grids (side 0), 64 that follow each other. Any assignment is correct.
__device__ __forceinline__ int64_t tile_query(int64_t tile, int i, int64_t side) {
  if (side == 0) return tile * kTile + i;
  const int64_t across = side / kSide, group = tile / (across * across), here = tile % (across * across);
  return group * side * side + (here / across * kSide + i / kSide) * side + here % across * kSide + i % kSide;
}

struct Window {
  int32_t x, y;  // of its upper left position, on the map or not
};

// Around the middle of the tile's first and last reference point.
template <typename T>
__device__ __forceinline__ Window place_window(const Arguments<T, float>& p, int64_t first, int64_t last, int level) {
  auto origin = [&](int axis, int32_t size) {
    const float middle =
        (p.reference[first * p.reference_stride + axis] + p.reference[last * p.reference_stride + axis]) / 2;
    const float safe = middle > -1 && middle < 2 ? middle : 0.5f;
    return int32_t(std::floor(safe * float(size))) - kWindow / 2;
  };
  return {origin(0, p.width[level]), origin(1, p.height[level])};
}

// Where the upper left corner of a sample with a corner on the map lies in a window.
struct InWindow {
  int32_t x, y;

  __device__ __forceinline__ InWindow(const Sample<float>& s, int32_t width, Window window) {
    const int corner = s.inside & 1 ? 0 : s.inside & 2 ? 1 : s.inside & 4 ? 2 : 3;
    const int32_t at = s.row + corner_step(corner, width);
    x = at % width - (corner & 1) - window.x;
    y = at / width - (corner >> 1) - window.y;
  }
  // The place of a corner, negative outside the window.
  __device__ __forceinline__ int32_t place(int corner) const {
    const int32_t column = x + (corner & 1), row = y + (corner >> 1);
    const bool within = column >= 0 && column < kWindow && row >= 0 && row < kWindow;
    return within ? row * kWindow + column : -1;
  }
};

// Fills a thread's half row of W: the upper or the lower half of the window.
template <typename T>
__device__ __forceinline__ void fill_window(const Arguments<T, float>& p, const Array<float>& weights, Window window,
                                            const RowQuery& mine, int64_t image, int head, int level) {
  constexpr int kHalf = kWindow * kWindow / 2;
  const int begin = mine.half * kHalf;
  const Array<float> row = weights + mine.row * kWindowRow;
  for (int i = begin; i < begin + kHalf; ++i) row[i] = 0.0f;
  if (!mine.sees(image)) return;
  const int64_t rel = mine.seen.end - image;
  for (int point = 0; point < p.points; ++point) {
    const float weight = weight_of<true>(p, mine.softmax, mine.q, head, rel, level, point);
    const Sample<float> s = sample_at(location_of<true>(p, mine.q, head, rel, level, point), weight, p.width[level],
                                      p.height[level], 0);
    if (!s.inside) continue;
    const InWindow at(s, p.width[level], window);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int place = at.place(k);
      if ((s.inside >> k & 1) && place >= begin && place < begin + kHalf)
        row[place] = row[place] + s.weight * corner_share(s, k);
    }
  }
}

// Adds W^T dO to global memory, 64 pixels at a time.
template <typename T>
__device__ __forceinline__ void flush_window(const Arguments<T, float>& p, const Array<float>& weights,
                                             const Array<T>& grads, bool finite, Window window, int64_t image,
                                             int head, int level) {
  const Lane lane;
#pragma unroll 1
  for (int from = 0; from < kWindow * kWindow; from += kTile) {
    float sums[8][4] = {};
    multiply_weights<T>(
        finite, [&](int pixel, int k) { return float(weights[k * kWindowRow + from + pixel]); }, grads, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = from + lane.warp * 16 + lane.group + half * 8;
      const int32_t x = window.x + pixel % kWindow, y = window.y + pixel / kWindow;
      if (x < 0 || y < 0 || x >= p.width[level] || y >= p.height[level]) continue;
      const int64_t row = image * p.positions + p.start[level] + int64_t(y) * p.width[level] + x;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int channel = n * 8 + lane.pair;
        const float pair[2] = {sums[n][half * 2], sums[n][half * 2 + 1]};
        if (channel < p.channels && (pair[0] != 0 || pair[1] != 0))
          atomic_add_vector<2>(p.added_value, (row * p.heads + head) * p.channels + channel, pair);
      }
    }
  }
}

// Adds the corners outside the window to global memory; a group of lanes a query.
template <typename T>
__device__ __forceinline__ void add_beyond(const Arguments<T, float>& p, int64_t tile, int64_t side, Window window,
                                           int64_t image, int head, int level) {
  const Group group(p.lanes);
  const int channel = group.rank * kVector<T>;
  const int32_t width = p.width[level];
  for (int i = int(threadIdx.x) / p.lanes; i < kTile; i += kThreads / p.lanes) {
    const int64_t q = tile_query(tile, i, side);
    if (q >= p.queries) break;
    const Interval seen = seen_by(p, q / p.group_size);
    if (image < seen.first || image >= seen.last) continue;
    const Softmax<float> softmax = saved_softmax(p, q, head);
    for (int batch = 0; batch < p.points; batch += p.lanes) {
      const int point = batch + group.rank;
      Sample<float> mine{};
      if (point < p.points) {
        const int64_t rel = seen.end - image;
        const float weight = weight_of<true>(p, softmax, q, head, rel, level, point);
        mine = sample_at(location_of<true>(p, q, head, rel, level, point), weight, width, p.height[level], 0);
        const InWindow at(mine, width, window);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (at.place(k) >= 0) mine.inside &= ~(1 << k);
      }
      if (group.max(mine.inside) == 0) continue;
      float g[kVector<T>];
      load_channels<kVector<T>>(p.grad_out, (q * p.heads + head) * p.channels + channel, channel, p.channels, g);
      const int count = p.points - batch < p.lanes ? p.points - batch : p.lanes;
#pragma unroll 1
      for (int source = 0; source < count; ++source) {
        const Sample<float> s = sample_from(group, mine, source);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!(s.inside >> k & 1) || channel >= p.channels) continue;
          const int64_t row = image * p.positions + p.start[level] + s.row + corner_step(k, width);
          const float share = s.weight * corner_share(s, k);
          float part[kVector<T>];
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) part[j] = share * g[j];
          atomic_add_vector<kVector<T>>(p.added_value, (row * p.heads + head) * p.channels + channel, part);
        }
      }
    }
  }
}

// One block a (tile of queries, head, window level).
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    window_backward(const __grid_constant__ Arguments<T, float> p, int64_t side, int windows) {
  const Array<float> weights = shared_array<float>(0, kTile * kWindowRow);
  const Array<T> grads = shared_array<T>(kWindowGradsAt, kTile * kWide);
  const Array<int64_t> intervals = shared_array<int64_t>(kWindowIntervalsAt, 2 * kTile);
  int level = 0;
  for (int rank = int(int64_t(blockIdx.x) % windows); rank > 0 || !(p.window_levels >> level & 1); ++level)
    rank -= p.window_levels >> level & 1;
  const int64_t index = int64_t(blockIdx.x) / windows, tile = index / p.heads;
  const int head = int(index % p.heads);
  const int64_t left = p.queries - tile * kTile;  // a tile that is cut off has queries in a row
  const int count = left < kTile ? int(left) : kTile;
  const RowQuery mine(p, tile_query(tile, row_of_thread(), side), head);
  const Interval all = seen_by_tile(intervals, mine);
  const Window window = place_window(p, tile_query(tile, 0, side), tile_query(tile, count - 1, side), level);
  const bool strange = copy_tile(
      p.grad_out + head * p.channels,
      [&](int row) { return tile_query(tile, row, side) * p.heads * p.channels; }, count, p.channels, grads);
  const bool finite = !any_thread(strange);
  for (int64_t image = all.first; image < all.last; ++image) {
    if (!any_thread(mine.sees(image))) continue;  // also: the weights before have been multiplied
    fill_window(p, weights, window, mine, image, head, level);
    __syncthreads();  // the window's weights are complete
    flush_window(p, weights, grads, finite, window, image, head, level);
    add_beyond(p, tile, side, window, image, head, level);
  }
}

}  // namespace mmi
