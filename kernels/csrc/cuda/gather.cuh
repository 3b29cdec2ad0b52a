// First tier: each group of lanes gathers the samples of one (query, head) with 16-byte loads.
#pragma once

#include "sampling.cuh"

namespace mmi {

// The softmax while its logits arrive; `total` is a lane's own share.
template <typename A>
struct RunningSoftmax {
  A peak, total;

  // Takes a batch of logits, one a lane; returns the weight of the lane's own relative to the new
  // peak. What was summed so far has to be multiplied by `rescale`.
  __device__ __forceinline__ A take(const Group& group, bool valid, A logit, A& rescale) {
    const A most = group.max(valid && logit == logit ? logit : -A(INFINITY));
    const A next = most > peak ? most : peak;
    rescale = next == peak ? A(1) : exp_nonpositive(peak - next);
    const A weight = valid ? exp_nonpositive(logit - next) : A(0);
    total = total * rescale + weight;
    peak = next;
    return weight;
  }
};

// Adds a sample to the lane's channels.
template <int UNIT, typename T, typename A>
__device__ __forceinline__ void mix(const Arguments<T, A>& p, const Sample<A>& s, int32_t width,
                                    Array<const T> maps, int channel, A (&sum)[kVector<T>]) {
  A corners[4][kVector<T>];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool inside = s.inside >> k & 1;
    load_channels<UNIT>(maps, (s.row + corner_step(k, width)) * p.stride_position, channel,
                        inside ? p.channels : 0, corners[k]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A share = s.weight * corner_share(s, k);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum[i] += share * corners[k][i];
  }
}

// Normalises a (query, head)'s sum, adds the sink's share, and writes output and softmax.
template <bool FUSED, int UNIT, typename T, typename A>
__device__ __forceinline__ void finish_output(const Arguments<T, A>& p, const Group& group,
                                              const RunningSoftmax<A>& softmax, int64_t q, int head, int piece,
                                              const A (&sum)[kVector<T>]) {
  A inverse = 1;
  if constexpr (FUSED) {
    A total = group.sum(softmax.total);
    if (p.sink) total += exp_nonpositive(-softmax.peak);
    if (p.partial) total = p.stats[(p.queries + q) * p.heads + head];
    inverse = invert(total);
    if (piece == 0 && group.rank == 0 && !p.partial) {
      p.stats[q * p.heads + head] = softmax.peak;
      p.stats[(p.queries + q) * p.heads + head] = total;
    }
  }
  const A share = p.sink ? exp_nonpositive(-softmax.peak) * inverse : A(inverse == 0);
  const int channel = (piece * p.lanes + group.rank) * kVector<T>;
#pragma unroll
  for (int i = 0; i < kVector<T>; i += UNIT) {
    if (channel + i >= p.channels) break;
    Vector<T, UNIT> rounded;
#pragma unroll
    for (int j = 0; j < UNIT; ++j) {
      A result = sum[i + j] * inverse;
      if (p.sink_value) result += share * p.sink_value[head * p.channels + channel + i + j];
      narrow(result, rounded.at[j]);
    }
    store_vector<UNIT>(p.out, (q * p.heads + head) * p.channels + channel + i, rounded);
  }
}

// One group a (query, head, piece of its channels).
template <typename T, typename A, int UNIT, int LEVELS, bool FUSED>
__global__ void __launch_bounds__(kThreads, UNIT == 1 ? 3 : 4) gather_forward(const __grid_constant__ Arguments<T, A> p) {
  const Group group(p.lanes);
  const int64_t index = int64_t(blockIdx.x) * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  if (index >= p.queries * p.heads * p.pieces) return;
  const int piece = int(index % p.pieces), head = int(index / p.pieces % p.heads);
  const int64_t q = index / p.pieces / p.heads;
  const int channel = (piece * p.lanes + group.rank) * kVector<T>;
  A sum[kVector<T>] = {};
  RunningSoftmax<A> softmax{FUSED && !p.sink ? -A(INFINITY) : A(0), 0};
  if (p.partial) {  // the second tier has been here
    if (FUSED) softmax.peak = p.stats[q * p.heads + head];
    for (int i = 0; i < kVector<T>; ++i)
      if (channel + i < p.channels) sum[i] = p.partial[(q * p.heads + head) * p.channels + channel + i];
  }
  const Interval seen = seen_by(p, q / p.group_size);
  const int levels = LEVELS ? LEVELS : p.levels;
  for (int64_t image = seen.first; image < seen.last; ++image) {
    const int64_t rel = seen.end - image;
    const Array<const T> maps = p.value + (image * p.stride_image + head * p.stride_head + channel);
    for (int batch = 0; batch < p.points; batch += p.lanes) {
      const int point = batch + group.rank;
      const bool valid = point < p.points;
      Location<A> at{};
      if (FUSED && valid) at = location_of<FUSED>(p, q, head, rel, 0, point);
#pragma unroll (LEVELS ? LEVELS : 1)
      for (int level = 0; level < levels; ++level) {
        if (p.matrix_levels >> level & 1) continue;
        A score = 0;
        if (valid) score = score_of<FUSED>(p, q, head, rel, level, point);
        if (!FUSED && valid) at = location_of<FUSED>(p, q, head, rel, level, point);
        if constexpr (FUSED) {
          A rescale;
          score = softmax.take(group, valid, score, rescale);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) sum[i] *= rescale;
        }
        Sample<A> mine = sample_at(at, score, p.width[level], p.height[level], p.start[level]);
        if (!valid) mine.inside = 0;
        const int count = p.points - batch < p.lanes ? p.points - batch : p.lanes;
        for (int source = 0; source < count; ++source) {
          const Sample<A> sample = sample_from(group, mine, source);
          if (sample.inside) mix<UNIT>(p, sample, p.width[level], maps, channel, sum);
        }
      }
    }
  }
  finish_output<FUSED, UNIT>(p, group, softmax, q, head, piece, sum);
}

// What a batch of samples has to know of its place in the backward.
struct Place {
  int64_t q, image, rel;
  int head, channel;
  bool first_piece;
};

// The gradients of a batch of samples, one a lane, with respect to weight and location; adds the
// value's gradients. Four samples at a time, so that their dot products are reduced together.
template <int UNIT, typename T, typename A>
__device__ __forceinline__ SampleGradient<A> backward_batch(const Arguments<T, A>& p, const Group& group,
                                                            const Place& place, const Sample<A>& mine, int level,
                                                            int count, const A (&g)[kVector<T>]) {
  const int32_t width = p.width[level];
  const bool add = bool(p.added_value) && !(p.window_levels >> level & 1);
  const Array<const T> maps =
      p.value + (place.image * p.stride_image + place.head * p.stride_head + place.channel);
  A own[4] = {};
  for (int source = 0; source < count; source += 4) {
    A dots[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const Sample<A> sample = sample_from(group, mine, source + s);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!(sample.inside >> k & 1)) continue;
        const int64_t row = sample.row + corner_step(k, width);
        A corner[kVector<T>], share = sample.weight * corner_share(sample, k);
        load_channels<UNIT>(maps, row * p.stride_position, place.channel, p.channels, corner);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) dots[s][k] += g[i] * corner[i];
        if (!add) continue;
        const int64_t to = ((place.image * p.positions + row) * p.heads + place.head) * p.channels + place.channel;
#pragma unroll
        for (int i = 0; i < kVector<T>; i += UNIT) {
          if (place.channel + i >= p.channels) continue;
          A part[UNIT];
#pragma unroll
          for (int j = 0; j < UNIT; ++j) part[j] = share * g[i + j];
          atomic_add_vector<UNIT>(p.added_value, to + i, part);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A even = group.halve(dots[0][k], dots[1][k], 1), odd = group.halve(dots[2][k], dots[3][k], 1);
      A total = group.halve(even, odd, 2);
      for (int distance = 4; distance < p.lanes; distance *= 2) total += group.swapped(total, distance);
      if (group.rank / 4 == source / 4) own[k] = total;
    }
  }
  return differentiate(mine.dx, mine.dy, mine.weight, own[0], own[1], own[2], own[3], A(width), A(p.height[level]));
}

template <typename A>
__device__ __forceinline__ void add_to(Array<A> array, int64_t at, A value) {
  array[at] = array[at] + value;
}

// Adds a sample's gradient to its logit's and the table's: elements that this lane alone touches.
template <typename T, typename A>
__device__ __forceinline__ void add_logit(const Arguments<T, A>& p, const Place& place, int64_t share_row, int level,
                                          int point, A gradient) {
  const int at = level * p.points + point, samples = p.levels * p.points;
  add_to(p.grad_logits, (place.q * p.heads + place.head) * samples + at, gradient);
  add_to(p.table_shares, share_row * (2 * p.points + samples) + 2 * p.points + at, gradient);
}

template <typename T, typename A>
__device__ __forceinline__ void add_offset(const Arguments<T, A>& p, const Place& place, int64_t share_row, int point,
                                           A x, A y) {
  const int64_t own = 2 * ((place.q * p.heads + place.head) * p.points + point);
  const int64_t table = share_row * (2 + p.levels) * p.points + 2 * point;
  add_to(p.grad_offsets, own, x / p.base);
  add_to(p.grad_offsets, own + 1, y / p.base);
  add_to(p.table_shares, table, x / p.base);
  add_to(p.table_shares, table + 1, y / p.base);
}

// All gradients of one (query, head) and a piece of its channels.
template <typename T, typename A, int UNIT, int LEVELS, bool FUSED>
__device__ __forceinline__ void backward_query(const Arguments<T, A>& p, const Group& group, int64_t q, int head,
                                               int piece, A delta) {
  const int channel = (piece * p.lanes + group.rank) * kVector<T>;
  const Softmax<A> softmax = saved_softmax(p, q, head);
  A g[kVector<T>];
  load_channels<UNIT>(p.grad_out, (q * p.heads + head) * p.channels + channel, channel, p.channels, g);
  const Interval seen = seen_by(p, q / p.group_size);
  const int levels = LEVELS ? LEVELS : p.levels;
  for (int64_t image = seen.first; image < seen.last; ++image) {
    const int64_t rel = seen.end - image;
    const Place place{q, image, rel, head, channel, piece == 0};
    const int64_t share_row = (q / p.chunk * p.heads + head) * p.share_rows + rel;
    for (int batch = 0; batch < p.points; batch += p.lanes) {
      const int point = batch + group.rank;
      const bool valid = point < p.points;
      const int count = p.points - batch < p.lanes ? p.points - batch : p.lanes;
      A x = 0, y = 0;
#pragma unroll (LEVELS ? LEVELS : 1)
      for (int level = 0; level < levels; ++level) {
        if (p.matrix_levels >> level & 1) continue;
        Location<A> at{};
        A weight = 0;
        if (valid) {
          at = location_of<FUSED>(p, q, head, rel, level, point);
          weight = weight_of<FUSED>(p, softmax, q, head, rel, level, point);
        }
        Sample<A> mine = sample_at(at, weight, p.width[level], p.height[level], p.start[level]);
        if (!valid) mine.inside = 0;
        const SampleGradient<A> gradient = backward_batch<UNIT>(p, group, place, mine, level, count, g);
        if (!valid || !p.grad_logits) continue;
        if constexpr (FUSED) {
          add_logit(p, place, share_row, level, point, weight * (gradient.weight - (piece == 0 ? delta : A(0))));
          x += gradient.x;
          y += gradient.y;
        } else {
          const int64_t to = ((q * p.heads + head) * p.levels + level) * p.points + point;
          add_to(p.grad_logits, to, gradient.weight);
          add_to(p.grad_offsets, 2 * to, gradient.x);
          add_to(p.grad_offsets, 2 * to + 1, gradient.y);
        }
      }
      if (FUSED && valid && p.grad_logits) add_offset(p, place, share_row, point, x, y);
    }
  }
}

// One group a (chunk of queries, head): what it adds to the table's gradients has one writer.
template <typename T, typename A, int UNIT, int LEVELS, bool FUSED>
__global__ void __launch_bounds__(kThreads, UNIT == 1 ? 2 : 3) gather_backward(const __grid_constant__ Arguments<T, A> p) {
  const Group group(p.lanes);
  const int64_t index = int64_t(blockIdx.x) * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  if (index >= p.chunks * p.heads) return;
  const int head = int(index % p.heads);
  const int64_t begin = index / p.heads * p.chunk;
  const int64_t end = begin + p.chunk < p.queries ? begin + p.chunk : p.queries;
  for (int64_t q = begin; q < end; ++q) {
    A delta = 0;
    if constexpr (FUSED) {
      for (int channel = group.rank; channel < p.channels; channel += p.lanes) {
        const int64_t at = (q * p.heads + head) * p.channels + channel;
        delta += to_arithmetic(p.grad_out[at]) * to_arithmetic(p.result[at]);
      }
      delta = group.sum(delta);
    }
    for (int piece = 0; piece < p.pieces; ++piece)
      backward_query<T, A, UNIT, LEVELS, FUSED>(p, group, q, head, piece, delta);
  }
}

constexpr int kAdjacent = 32;  // elements of the table that a block adds up, a warp every fourth chunk

// The chunks' shares of the table's gradients, added up in double, always in the same order.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) add_table_shares(const __grid_constant__ Arguments<T, A> p) {
  const Array<double> sums = shared_array<double>(0, kThreads);
  const int64_t twice = 2 * p.points, samples = p.levels * p.points, row = twice + samples;
  const int64_t size = int64_t(p.heads) * p.share_rows * row;
  const int part = int(threadIdx.x) / kAdjacent;
  const int64_t index = int64_t(blockIdx.x) * kAdjacent + threadIdx.x % kAdjacent;
  double total = 0;
  if (index < size) {
#pragma unroll 8
    for (int64_t chunk = part; chunk < p.chunks; chunk += kThreads / kAdjacent)
      total += p.table_shares[chunk * size + index];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (part != 0 || index >= size) return;
  for (int other = int(threadIdx.x) + kAdjacent; other < kThreads; other += kAdjacent) total += double(sums[other]);
  const int64_t j = index % row, rel = index / row % p.share_rows, head = index / row / p.share_rows;
  if (j < twice) {
    p.grad_table_offsets[(rel * p.heads + head) * twice + j] = A(total);
  } else {
    p.grad_table_logits[(rel * p.heads + head) * samples + j - twice] = A(total);
  }
}

}  // namespace mmi
