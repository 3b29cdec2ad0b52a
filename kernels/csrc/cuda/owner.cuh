// The deterministic mode's gradient of the value: a block owns a tile of one level of one (image,
// head) and goes through all queries that see the image, always in the same order. Nothing is added
// atomically, so every run gives the same bits.
#pragma once

#include "sampling.cuh"

namespace mmi {

constexpr int64_t kTileBytes = 32 << 10;

// Positions a block owns.
template <typename A>
__host__ __device__ __forceinline__ int tile_positions(int channels) {
  const int64_t fit = kTileBytes / (channels * int64_t(sizeof(A)));
  return fit < 1 ? 1 : fit > 1024 ? 1024 : int(fit);
}

// The batch of samples that a block's threads prepare for each other.
template <typename A>
struct Batch {
  Array<A> shares;     // [4, threads]
  Array<int32_t> rows;  // [4, threads]: position within the tile, negative where there is none

  __device__ __forceinline__ explicit Batch(int64_t offset)
      : shares(shared_array<A>(offset, 4 * kThreads)),
        rows(shared_array<int32_t>(offset + 4 * kThreads * sizeof(A), 4 * kThreads)) {}
  static constexpr int64_t kBytes = 4 * kThreads * (sizeof(A) + sizeof(int32_t));

  __device__ __forceinline__ void put(const Sample<A>& s, const int32_t (&owned)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      rows[k * kThreads + threadIdx.x] = owned[k];
      shares[k * kThreads + threadIdx.x] = s.weight * corner_share(s, k);
    }
  }
};

// Which positions of the tile a sample's corners touch, negative where none; returns whether any does.
template <typename A>
__device__ __forceinline__ bool find_owned(const Sample<A>& s, int32_t width, int32_t from, int32_t count,
                                           int32_t (&owned)[4]) {
  bool any = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int32_t row = s.row + corner_step(k, width) - from;
    const bool here = (s.inside >> k & 1) && row >= 0 && row < count;
    owned[k] = here ? row : -1;
    any |= here;
  }
  return any;
}

// A thread owns one channel of every `threads a channel`-th position of the tile.
template <typename T, typename A, bool FUSED>
__global__ void __launch_bounds__(kThreads, 4)
    owner_backward(const __grid_constant__ Arguments<T, A> p, int64_t tiles) {
  const int64_t image = int64_t(blockIdx.x) / tiles / p.heads;
  const int head = int(int64_t(blockIdx.x) / tiles % p.heads);
  const int size = tile_positions<A>(p.channels);
  int tile = int(int64_t(blockIdx.x) % tiles), level = 0;
  for (;; ++level) {
    const int here = (p.width[level] * p.height[level] + size - 1) / size;
    if (tile < here) break;
    tile -= here;
  }
  if (p.matrix_levels >> level & 1) return;
  const int32_t from = p.start[level] + tile * size;
  const int32_t left = p.start[level] + p.width[level] * p.height[level] - from;
  const int32_t count = left < size ? left : size;

  const Batch<A> batch(0);
  const Array<A> sums = shared_array<A>(Batch<A>::kBytes, count * p.channels);
  for (int i = int(threadIdx.x); i < count * p.channels; i += kThreads) sums[i] = 0;
  const int across = p.channels < kThreads ? p.channels : kThreads;
  const int down = kThreads / across, part = int(threadIdx.x) / across;

  const int64_t samples = p.queries * p.points;
  for (int64_t begin = 0; begin < samples; begin += kThreads) {
    const int64_t index = begin + threadIdx.x, q = index / p.points;
    Sample<A> mine{};
    if (index < samples) {
      const Interval seen = seen_by(p, q / p.group_size);
      if (image >= seen.first && image < seen.last) {
        const int point = int(index % p.points);
        const int64_t rel = seen.end - image;
        const A weight = weight_of<FUSED>(p, saved_softmax(p, q, head), q, head, rel, level, point);
        mine = sample_at(location_of<FUSED>(p, q, head, rel, level, point), weight, p.width[level], p.height[level],
                         p.start[level]);
      }
    }
    int32_t owned[4];
    const bool touches = find_owned(mine, p.width[level], from, count, owned);
    if (!any_thread(touches)) continue;  // also: the batch before has been read, and the sums are zero
    batch.put(mine, owned);
    __syncthreads();  // what the batch holds is complete
    const int there = samples - begin < kThreads ? int(samples - begin) : kThreads;
    for (int s = 0; s < there && part < down; ++s) {
      for (int k = 0; k < 4; ++k) {
        const int32_t row = batch.rows[k * kThreads + s];
        if (row < 0 || row % down != part) continue;
        const A share = batch.shares[k * kThreads + s];
        const int64_t to = ((begin + s) / p.points * p.heads + head) * p.channels;
        for (int c = int(threadIdx.x) % across; c < p.channels; c += across)
          sums[row * p.channels + c] = sums[row * p.channels + c] + share * to_arithmetic(p.grad_out[to + c]);
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < count * p.channels; i += kThreads) {
    const int64_t row = image * p.positions + from + i / p.channels;
    T rounded;
    narrow(A(sums[i]), rounded);
    p.owned_value[(row * p.heads + head) * p.channels + i % p.channels] = rounded;
  }
}

}  // namespace mmi
