// What every kernel shares: typed arguments, groups of lanes, and where a sample falls and what it
// weighs. A group of lanes works on one (query, head); each lane holds `kVector` channels and
// prepares another sample than its neighbours, which get it by a shuffle.
#pragma once

#include "device.cuh"
#include "problem.h"

namespace mmi {

constexpr int kThreads = 128;

// DeviceProblem with types and bounds. T: the value's, A: the arithmetic's.
template <typename T, typename A>
struct Arguments {
  int64_t images, positions, queries, group_size;
  int32_t heads, channels, levels, points, rows, share_rows;
  int32_t lanes, pieces;  // of a group; channels are cut into pieces of lanes * kVector
  int32_t width[kMaxLevels], height[kMaxLevels], start[kMaxLevels];
  int64_t stride_image, stride_position, stride_head;
  Array<const T> value;
  Array<const int32_t> visible;
  Array<const A> offsets, logits, table_offsets, table_logits, reference, sink_value, locations, weights;
  int64_t reference_stride;
  A base;
  bool sink;
  Array<A> stats;
  Array<T> out;
  Array<const T> result, grad_out;
  Array<A> added_value, grad_offsets, grad_logits, table_shares, grad_table_offsets, grad_table_logits;
  Array<T> owned_value;
  int64_t chunk, chunks;
  uint32_t matrix_levels, window_levels;
  Array<float> partial;
};

// Channels a lane holds: 16 bytes of them.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, typename A>
Arguments<T, A> arguments(const DeviceProblem& p) {
  Arguments<T, A> a{};
  a.images = p.images;
  a.positions = p.positions;
  a.queries = p.queries;
  a.group_size = p.group_size;
  a.heads = int32_t(p.heads);
  a.channels = int32_t(p.channels);
  a.levels = p.levels;
  a.points = p.points;
  a.rows = int32_t(p.rows);
  a.share_rows = int32_t(p.share_rows());
  a.lanes = 4;
  while (a.lanes < 32 && a.lanes * kVector<T> < a.channels) a.lanes *= 2;
  a.pieces = (a.channels + a.lanes * kVector<T> - 1) / (a.lanes * kVector<T>);
  std::copy_n(p.width, kMaxLevels, a.width);
  std::copy_n(p.height, kMaxLevels, a.height);
  std::copy_n(p.start, kMaxLevels, a.start);
  a.stride_image = p.stride_image;
  a.stride_position = p.stride_position;
  a.stride_head = p.stride_head;
  const bool some = p.images && p.positions && p.heads && p.channels;
  const int64_t extent = (p.images - 1) * p.stride_image + (p.positions - 1) * p.stride_position +
                         (p.heads - 1) * p.stride_head + p.channels;
  const int64_t q = p.queries, h = p.heads, n = p.samples(), twice = 2 * p.points, d = p.channels;
  const int64_t k = p.rows, maps = p.images * p.positions * h * d;
  a.value = array(static_cast<const T*>(p.value), some ? extent : 0);
  a.visible = array(p.visible, 2 * p.groups);
  a.offsets = array(static_cast<const A*>(p.offsets), q * h * twice);
  a.logits = array(static_cast<const A*>(p.logits), q * h * n);
  a.table_offsets = array(static_cast<const A*>(p.table_offsets), k * h * twice);
  a.table_logits = array(static_cast<const A*>(p.table_logits), k * h * n);
  a.reference = array(static_cast<const A*>(p.reference), p.reference_stride ? 2 * q : 2);
  a.reference_stride = p.reference_stride;
  a.sink_value = array(static_cast<const A*>(p.sink_value), h * d);
  a.locations = array(static_cast<const A*>(p.locations), 2 * q * h * n);
  a.weights = array(static_cast<const A*>(p.weights), q * h * n);
  a.base = A(p.base);
  a.sink = p.sink;
  a.stats = array(static_cast<A*>(p.stats), 2 * q * h);
  a.out = array(static_cast<T*>(p.out), q * h * d);
  a.result = array(static_cast<const T*>(p.out), q * h * d);
  a.grad_out = array(static_cast<const T*>(p.grad_out), q * h * d);
  a.added_value = array(static_cast<A*>(p.added_value), maps);
  a.owned_value = array(static_cast<T*>(p.owned_value), maps);
  a.grad_offsets = array(static_cast<A*>(p.grad_offsets), q * h * (p.locations ? 2 * n : twice));
  a.grad_logits = array(static_cast<A*>(p.grad_logits), q * h * n);
  a.chunk = p.chunk;
  a.chunks = p.chunks();
  a.table_shares = array(static_cast<A*>(p.table_shares), a.chunks * h * p.share_rows() * (twice + n));
  a.grad_table_offsets = array(static_cast<A*>(p.grad_table_offsets), k * h * twice);
  a.grad_table_logits = array(static_cast<A*>(p.grad_table_logits), k * h * n);
  a.matrix_levels = p.matrix_levels;
  a.window_levels = p.window_levels;
  a.partial = array(static_cast<float*>(p.partial), q * h * d);
  return a;
}

// Adjacent lanes of a warp, a power of two of them.
struct Group {
  int lanes, rank, first;
  uint32_t mask;

  __device__ __forceinline__ explicit Group(int size) : lanes(size) {
    const int lane = int(threadIdx.x & 31);
    rank = lane & (size - 1);
    first = lane - rank;
    mask = size == 32 ? ~0u : ((1u << size) - 1) << first;
  }

  template <typename T>
  __device__ __forceinline__ T from(T value, int source) const {
    return shuffle(mask, value, first + source);
  }

  template <typename T>
  __device__ __forceinline__ T swapped(T value, int distance) const {
    return shuffle(mask, value, first + (rank ^ distance));
  }

  template <typename A>
  __device__ __forceinline__ A sum(A value) const {
    for (int distance = 1; distance < lanes; distance *= 2) value += swapped(value, distance);
    return value;
  }

  template <typename A>
  __device__ __forceinline__ A max(A value) const {
    for (int distance = 1; distance < lanes; distance *= 2) {
      const A other = swapped(value, distance);
      value = other > value ? other : value;
    }
    return value;
  }

  // Of two numbers, gives one to the lane at `distance` and adds what that lane gives: lanes whose
  // bit is set end with b's sum, the others with a's.
  template <typename A>
  __device__ __forceinline__ A halve(A a, A b, int distance) const {
    const bool second = rank & distance;
    return (second ? b : a) + swapped(second ? a : b, distance);
  }
};

struct Interval {
  int64_t first, last;  // images that are seen
  int64_t end;          // image m lies end - m back
};

template <typename T, typename A>
__device__ __forceinline__ Interval seen_by(const Arguments<T, A>& p, int64_t group) {
  if (!p.visible) return {group, group + 1, group + 1};
  // Intervals beyond the images are the caller's error; they are cut, so that no kernel reads there.
  int64_t first = p.visible[2 * group], end = p.visible[2 * group + 1];
  end = end < p.images ? end : p.images;
  first = first < end - (p.rows - 1) ? end - (p.rows - 1) : first;
  return {first < 0 ? 0 : first, end, end};
}

template <typename A>
struct Location {
  A x, y;
};

// Of (query, head, point) in the image rel back.
template <bool FUSED, typename T, typename A>
__device__ __forceinline__ Location<A> location_of(const Arguments<T, A>& p, int64_t q, int head, int64_t rel,
                                                   int level, int point) {
  if constexpr (FUSED) {
    const int64_t own = 2 * ((q * p.heads + head) * p.points + point);
    const int64_t table = 2 * ((rel * p.heads + head) * p.points + point);
    const int64_t centre = q * p.reference_stride;
    return {p.reference[centre] + (p.offsets[own] + p.table_offsets[table]) / p.base,
            p.reference[centre + 1] + (p.offsets[own + 1] + p.table_offsets[table + 1]) / p.base};
  } else {
    const int64_t at = 2 * (((q * p.heads + head) * p.levels + level) * p.points + point);
    return {p.locations[at], p.locations[at + 1]};
  }
}

// Its logit, or the general operator's weight.
template <bool FUSED, typename T, typename A>
__device__ __forceinline__ A score_of(const Arguments<T, A>& p, int64_t q, int head, int64_t rel, int level,
                                      int point) {
  const int64_t own = ((q * p.heads + head) * p.levels + level) * p.points + point;
  if constexpr (FUSED) {
    return p.logits[own] + p.table_logits[((rel * p.heads + head) * p.levels + level) * p.points + point];
  } else {
    return p.weights[own];
  }
}

// The softmax of a (query, head), as the forward saved it.
template <typename A>
struct Softmax {
  A peak, inverse;

  __device__ __forceinline__ A weight(A logit) const { return exp_nonpositive(logit - peak) * inverse; }
};

// 1 / total; 0 where nothing is seen, NaN for NaN.
template <typename A>
__device__ __forceinline__ A invert(A total) {
  return total > 0 ? 1 / total : total == 0 ? A(0) : total;
}

template <typename T, typename A>
__device__ __forceinline__ Softmax<A> saved_softmax(const Arguments<T, A>& p, int64_t q, int head) {
  if (!p.stats) return {0, 1};
  const A peak = p.stats[q * p.heads + head], total = p.stats[(p.queries + q) * p.heads + head];
  return {peak, invert(total)};
}

template <bool FUSED, typename T, typename A>
__device__ __forceinline__ A weight_of(const Arguments<T, A>& p, const Softmax<A>& softmax, int64_t q, int head,
                                       int64_t rel, int level, int point) {
  const A score = score_of<FUSED>(p, q, head, rel, level, point);
  if constexpr (FUSED) return softmax.weight(score);
  return score;
}

// Where a sample falls: the position of its upper left corner, whether or not that lies on the
// map, and which corners do (bits 0 to 3: upper left, upper right, lower left, lower right).
template <typename A>
struct Sample {
  int32_t row, inside;
  A dx, dy, weight;
};

template <typename A>
__device__ __forceinline__ Sample<A> sample_at(Location<A> at, A weight, int32_t width, int32_t height,
                                               int32_t start) {
  const Corners<A> c = locate(at.x, at.y, width, height, start);
  Sample<A> s;
  s.inside = int(c.row00 >= 0) | int(c.row01 >= 0) << 1 | int(c.row10 >= 0) << 2 | int(c.row11 >= 0) << 3;
  s.row = c.row00 >= 0   ? c.row00
          : c.row01 >= 0 ? c.row01 - 1
          : c.row10 >= 0 ? c.row10 - width
                         : c.row11 - width - 1;
  s.dx = c.dx;
  s.dy = c.dy;
  s.weight = weight;
  return s;
}

// How far a corner's row lies from the upper left one's.
__device__ __forceinline__ int32_t corner_step(int corner, int32_t width) {
  return (corner & 1) + (corner & 2 ? width : 0);
}

// The bilinear share of a corner.
template <typename A>
__device__ __forceinline__ A corner_share(const Sample<A>& s, int corner) {
  return (corner & 1 ? s.dx : 1 - s.dx) * (corner & 2 ? s.dy : 1 - s.dy);
}

template <typename A>
__device__ __forceinline__ Sample<A> sample_from(const Group& group, const Sample<A>& mine, int source) {
  return {group.from(mine.row, source), group.from(mine.inside, source), group.from(mine.dx, source),
          group.from(mine.dy, source), group.from(mine.weight, source)};
}

// A lane's channels, UNIT of them a load; those beyond the last are zero.
template <int UNIT, typename T, typename A>
__device__ __forceinline__ void load_channels(Array<const T> from, int64_t at, int channel, int channels, A* to) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += UNIT) {
    Vector<T, UNIT> loaded{};
    if (channel + i < channels) loaded = load_vector<UNIT>(from, at + i);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) to[i + j] = to_arithmetic(loaded.at[j]);
  }
}

// The largest UNIT that the channels and the value's address and strides allow.
template <typename T>
int unit_of(const DeviceProblem& p) {
  auto fits = [&](int64_t unit) {
    const auto address = reinterpret_cast<uintptr_t>(p.value) | reinterpret_cast<uintptr_t>(p.grad_out);
    return p.channels % unit == 0 && p.stride_image % unit == 0 && p.stride_position % unit == 0 &&
           p.stride_head % unit == 0 && address % (unit * sizeof(T)) == 0;
  };
  return fits(kVector<T>) ? kVector<T> : fits(4) && kVector<T> > 4 ? 4 : 1;
}

}  // namespace mmi
