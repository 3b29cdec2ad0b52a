// Second tier, fine levels under a dense grid of queries (the U-Net's): the value's gradient of a
// tile of 64 neighbouring queries is added up in a window of shared memory around them and written
// to global memory once. Samples outside the window go there at once.
#pragma once

#include "sampling.cuh"

namespace mmi {

constexpr int kSide = 8;     // of a tile, in queries
constexpr int kWindow = 16;  // of a window, in positions
constexpr int64_t window_bytes(int64_t channels) { return kWindow * kWindow * channels * 4; }

// The query at place i of a tile: 8 x 8 of a square grid with `side` queries a row, or, where the
// group is no such grid (side 0), 64 that follow each other. Any assignment is correct.
__device__ __forceinline__ int64_t tile_query(int64_t tile, int i, int64_t side) {
  if (side == 0) return tile * kSide * kSide + i;
  const int64_t across = side / kSide;
  return (tile / across * kSide + i / kSide) * side + tile % across * kSide + i % kSide;
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

// Adds one sample's share to the window, or past it.
template <typename T>
__device__ __forceinline__ void add_sample(const Arguments<T, float>& p, const Array<float>& window, Window place,
                                           const Sample<float>& s, int64_t image, int head, int level, int channel,
                                           const float (&g)[kVector<T>]) {
  const int32_t width = p.width[level];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!(s.inside >> k & 1)) continue;
    const int32_t row = s.row + corner_step(k, width);
    const int32_t x = row % width - place.x, y = row / width - place.y;
    const float share = s.weight * corner_share(s, k);
    const bool within = x >= 0 && x < kWindow && y >= 0 && y < kWindow;
    const int64_t far = ((image * p.positions + p.start[level] + row) * p.heads + head) * p.channels + channel;
    const int near = (y * kWindow + x) * p.channels + channel;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (channel + i >= p.channels) continue;
      if (within) {
        atomic_add(window, near + i, share * g[i]);
      } else {
        atomic_add(p.added_value, far + i, share * g[i]);
      }
    }
  }
}

// Adds the window to global memory and clears it.
template <typename T>
__device__ __forceinline__ void flush_window(const Arguments<T, float>& p, const Array<float>& window, Window place,
                                             int64_t image, int head, int level) {
  for (int i = int(threadIdx.x); i < kWindow * kWindow * p.channels; i += kThreads) {
    const int at = i / p.channels, channel = i % p.channels;
    const int32_t x = place.x + at % kWindow, y = place.y + at / kWindow;
    const float sum = window[i];
    if (sum == 0) continue;  // also where the window reaches beyond the map
    window[i] = 0.0f;
    const int64_t row = image * p.positions + p.start[level] + int64_t(y) * p.width[level] + x;
    atomic_add(p.added_value, (row * p.heads + head) * p.channels + channel, sum);
  }
}

// One block a (tile of queries, head, window level).
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    window_backward(const __grid_constant__ Arguments<T, float> p, int64_t tiles, int64_t side, int windows) {
  const Group group(p.lanes);
  const Array<float> window = shared_array<float>(0, kWindow * kWindow * p.channels);
  int level = 0;
  for (int rank = int(int64_t(blockIdx.x) % windows); rank > 0 || !(p.window_levels >> level & 1); ++level)
    rank -= p.window_levels >> level & 1;
  const int64_t index = int64_t(blockIdx.x) / windows;
  const int head = int(index % p.heads);
  const int64_t tile = index / p.heads % tiles, owner = index / p.heads / tiles;
  const int64_t base = owner * p.group_size;
  const int64_t rest = p.group_size - tile * kSide * kSide;
  const int count = rest < kSide * kSide ? int(rest) : kSide * kSide;
  const Window place =
      place_window(p, base + tile_query(tile, 0, side), base + tile_query(tile, count - 1, side), level);
  for (int i = int(threadIdx.x); i < kWindow * kWindow * p.channels; i += kThreads) window[i] = 0.0f;
  const Interval seen = seen_by(p, owner);
  for (int64_t image = seen.first; image < seen.last; ++image) {
    __syncthreads();  // the window is clear
    for (int i = int(threadIdx.x) / p.lanes; i < count; i += kThreads / p.lanes) {
      const int64_t q = base + tile_query(tile, i, side);
      const Softmax<float> softmax = saved_softmax(p, q, head);
      for (int piece = 0; piece < p.pieces; ++piece) {
        const int channel = (piece * p.lanes + group.rank) * kVector<T>;
        float g[kVector<T>];
        load_channels<1>(p.grad_out, (q * p.heads + head) * p.channels + channel, channel, p.channels, g);
        for (int batch = 0; batch < p.points; batch += p.lanes) {
          const int point = batch + group.rank;
          Sample<float> sample{};
          if (point < p.points) {
            const int64_t rel = seen.end - image;
            const float weight = weight_of<true>(p, softmax, q, head, rel, level, point);
            sample = sample_at(location_of<true>(p, q, head, rel, level, point), weight, p.width[level],
                               p.height[level], 0);
          }
          const int there = p.points - batch < p.lanes ? p.points - batch : p.lanes;
          for (int source = 0; source < there; ++source)
            add_sample(p, window, place, sample_from(group, sample, source), image, head, level, channel, g);
        }
      }
    }
    __syncthreads();  // the window is complete
    flush_window(p, window, place, image, head, level);
  }
}

}  // namespace mmi
