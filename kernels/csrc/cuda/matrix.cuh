// Second tier, coarse levels of 16-bit values: the bilinear weights of 64 queries become a matrix
// W[query, pixel] in shared memory, and tensor cores do the rest:
//   output  O = W V,   gradient of the value  dV = W^T dO,   of the weights  dW = dO V^T.
// A level is worked through in pieces of 64 pixels. No block adds to what another writes: this tier
// is deterministic. It pays where queries sample around one centre, many to a pixel.
#pragma once

#include "gather.cuh"

namespace mmi {

constexpr int kTile = 64;           // queries and pixels a matrix has
constexpr int kWide = kTile + 8;    // row of 16-bit numbers: eight rows' 16 bytes meet no bank twice
constexpr int kLong = kTile + 1;    // row of floats: a column's accesses meet no bank twice
constexpr int kMatrixChannels = 64;  // at most

// Shared memory: W or dW, two tiles of 16-bit numbers, 64 integers, and three gradients a sample.
constexpr int64_t kTilesAt = kTile * kLong * 4;
constexpr int64_t kIntervalsAt = kTilesAt + 2 * kTile * kWide * 2;
constexpr int64_t kGradientsAt = kIntervalsAt + 2 * kTile * 8;
constexpr int64_t matrix_bytes(int points) { return kGradientsAt + 3ll * kTile * points * 4; }

template <typename T>
struct Tiles {
  Array<float> weights = shared_array<float>(0, kTile * kLong);
  Array<T> first = shared_array<T>(kTilesAt, kTile * kWide);
  Array<T> second = shared_array<T>(kTilesAt + kTile * kWide * 2, kTile * kWide);
  Array<int64_t> intervals = shared_array<int64_t>(kIntervalsAt, 2 * kTile);
};

__device__ __forceinline__ int row_of_thread() { return int(threadIdx.x) % kTile; }

// The query whose row of W a thread fills, half of it.
struct RowQuery {
  int row, half;
  int64_t q;
  bool valid;
  Interval seen;
  Softmax<float> softmax;

  // `query`: of the thread's row.
  template <typename P>
  __device__ __forceinline__ RowQuery(const P& p, int64_t query, int head) {
    row = row_of_thread();
    half = int(threadIdx.x) / kTile;
    q = query;
    valid = q < p.queries;
    seen = valid ? seen_by(p, q / p.group_size) : Interval{0, 0, 0};
    softmax = valid ? saved_softmax(p, q, head) : Softmax<float>{0, 1};
  }
  __device__ __forceinline__ bool sees(int64_t image) const { return image >= seen.first && image < seen.last; }
};

// The images that any query of the tile sees; `intervals` [64, 2] keeps each one's.
__device__ __forceinline__ Interval seen_by_tile(const Array<int64_t>& intervals, const RowQuery& mine) {
  if (mine.half == 0) {
    const bool any = mine.seen.first < mine.seen.last;
    intervals[2 * mine.row] = any ? mine.seen.first : INT64_MAX;
    intervals[2 * mine.row + 1] = any ? mine.seen.last : 0;
  }
  __syncthreads();
  Interval all{INT64_MAX, 0, 0};
  for (int row = 0; row < kTile; ++row) {
    const int64_t first = intervals[2 * row], last = intervals[2 * row + 1];
    all.first = first < all.first ? first : all.first;
    all.last = last > all.last ? last : all.last;
  }
  return all;
}

// Fills a thread's half row of W for the pixels [from, from + 64) of a level.
template <bool FUSED, typename T>
__device__ __forceinline__ void fill_weights(const Arguments<T, float>& p, const Array<float>& weights,
                                             const RowQuery& mine, int64_t image, int head, int level, int from) {
  const int begin = mine.half * (kTile / 2);
  const Array<float> row = weights + mine.row * kLong;
  for (int i = begin; i < begin + kTile / 2; ++i) row[i] = 0.0f;
  if (!mine.sees(image)) return;
  const int64_t rel = mine.seen.end - image;
  for (int point = 0; point < p.points; ++point) {
    const float weight = weight_of<FUSED>(p, mine.softmax, mine.q, head, rel, level, point);
    const Sample<float> s = sample_at(location_of<FUSED>(p, mine.q, head, rel, level, point), weight, p.width[level],
                                      p.height[level], 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = s.row + corner_step(k, p.width[level]) - from;
      if ((s.inside >> k & 1) && at >= begin && at < begin + kTile / 2) row[at] = row[at] + s.weight * corner_share(s, k);
    }
  }
}

// Copies 64 rows of channels into a tile; what is beyond `rows` or the channels is zero. Row r begins at
// place(r), aligned to 16 bytes. Returns whether the thread met infinity or NaN.
template <typename T, typename F>
__device__ __forceinline__ bool copy_tile(Array<const T> from, F place, int rows, int channels, Array<T> to) {
  constexpr int kPieces = kMatrixChannels / kVector<T>;
  bool finite = true;
  for (int i = int(threadIdx.x); i < kTile * kPieces; i += kThreads) {
    const int row = i / kPieces, channel = i % kPieces * kVector<T>;
    Vector<T, kVector<T>> loaded{};
    if (row < rows && channel < channels) loaded = load_vector<kVector<T>>(from, place(row) + channel);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float x = to_arithmetic(loaded.at[j]);
      finite &= x - x == 0;
    }
    store_vector<kVector<T>>(to, row * kWide + channel, loaded);
  }
  return !finite;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  T a, b;
  narrow(low, a);
  narrow(high, b);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}

// A lane's coordinates in the fragments of mma.m16n8k16.
struct Lane {
  int warp = int(threadIdx.x) / 32, group = int(threadIdx.x) % 32 / 4, pair = int(threadIdx.x) % 4 * 2;
};

// sums[n] += A[16 rows of the warp, depth] B[depth, 8 n ..], A by a(row, k) -> two numbers packed, B a
// tile or, TRANSPOSED, the transpose of one.
template <bool TRANSPOSED, typename T, typename F>
__device__ __forceinline__ void multiply(F a_pair, const Array<T>& b, int depth, float (&sums)[8][4]) {
  __syncwarp();  // matrix instructions want all lanes at once, wherever they went before
  const Lane lane;
  const int row = int(threadIdx.x) % 8, down = int(threadIdx.x) / 8 % 2 * 8, right = int(threadIdx.x) / 16 % 2 * 8;
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = a_pair(lane.warp * 16 + lane.group + (i & 1) * 8, k + lane.pair + (i >> 1) * 8);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      // Of B, k to k + 15 at the columns of sums[n] and of sums[n + 1].
      uint32_t both[4];
      load_matrices<!TRANSPOSED>(
          both, b, TRANSPOSED ? (n * 8 + right + row) * kWide + k + down : (k + down + row) * kWide + n * 8 + right);
      matrix_multiply_add<T>(sums[n], a, {both[0], both[1]});
      matrix_multiply_add<T>(sums[n + 1], a, {both[2], both[3]});
    }
  }
}

// Calls visit(row, column, number) for the numbers a lane holds.
template <typename Sums, typename F>
__device__ __forceinline__ void over_fragment(Sums& sums, F visit) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      visit(lane.warp * 16 + lane.group + (i >> 1) * 8, n * 8 + lane.pair + (i & 1), sums[n][i]);
}

// sums += W B, W by weight(row, k). Where B holds infinity or NaN, ordinary multiplications leave out
// the zeros of W: what lies under no sample must not matter.
template <typename T, typename F>
__device__ __forceinline__ void multiply_weights(bool finite, F weight, const Array<T>& b, float (&sums)[8][4]) {
  if (finite) {
    multiply<false>([&](int row, int k) { return pack<T>(weight(row, k), weight(row, k + 1)); }, b, kTile, sums);
    return;
  }
  over_fragment(sums, [&](int row, int column, float& sum) {
    for (int k = 0; k < kTile; ++k) {
      const float w = weight(row, k);
      if (w != 0) sum += w * to_arithmetic(T(b[k * kWide + column]));
    }
  });
}

// The softmax alone: its peak and sum over all levels. One group a (query, head).
template <typename T>
__global__ void __launch_bounds__(kThreads, 8) measure_softmax(const __grid_constant__ Arguments<T, float> p) {
  const Group group(p.lanes);
  const int64_t index = int64_t(blockIdx.x) * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  if (index >= p.queries * p.heads) return;
  const int head = int(index % p.heads);
  const int64_t q = index / p.heads;
  RunningSoftmax<float> softmax{p.sink ? 0.0f : -INFINITY, 0};
  const Interval seen = seen_by(p, q / p.group_size);
  for (int64_t image = seen.first; image < seen.last; ++image) {
    for (int level = 0; level < p.levels; ++level) {
      for (int batch = 0; batch < p.points; batch += p.lanes) {
        const int point = batch + group.rank;
        const bool valid = point < p.points;
        float rescale;
        softmax.take(group, valid, valid ? score_of<true>(p, q, head, seen.end - image, level, point) : 0.0f, rescale);
      }
    }
  }
  float total = group.sum(softmax.total);
  if (p.sink) total += exp_nonpositive(-softmax.peak);
  if (group.rank) return;
  p.stats[q * p.heads + head] = softmax.peak;
  p.stats[(p.queries + q) * p.heads + head] = total;
}

// What the matrix levels add to the output of 64 queries, relative to the softmax's peak.
template <typename T, bool FUSED>
__global__ void __launch_bounds__(kThreads, 4) matrix_forward(const __grid_constant__ Arguments<T, float> p) {
  const Tiles<T> tiles;
  const int head = int(int64_t(blockIdx.x) % p.heads);
  const int64_t first = int64_t(blockIdx.x) / p.heads * kTile;
  RowQuery mine(p, first + row_of_thread(), head);
  mine.softmax.inverse = 1;
  const Interval all = seen_by_tile(tiles.intervals, mine);
  float sums[8][4] = {};
  for (int64_t image = all.first; image < all.last; ++image) {
    if (!any_thread(mine.sees(image))) continue;
    for (int level = 0; level < p.levels; ++level) {
      if (!(p.matrix_levels >> level & 1)) continue;
      const int pixels = p.width[level] * p.height[level];
      for (int from = 0; from < pixels; from += kTile) {
        __syncthreads();  // the matrices before have been multiplied
        fill_weights<FUSED>(p, tiles.weights, mine, image, head, level, from);
        const bool strange = copy_tile(
            p.value + (image * p.stride_image + (p.start[level] + from) * p.stride_position + head * p.stride_head),
            [&](int row) { return row * p.stride_position; }, pixels - from, p.channels, tiles.first);
        const bool finite = !any_thread(strange);  // also: both matrices are complete
        multiply_weights<T>(
            finite, [&](int row, int k) { return float(tiles.weights[row * kLong + k]); }, tiles.first, sums);
      }
    }
  }
  over_fragment(sums, [&](int row, int channel, float sum) {
    if (first + row < p.queries && channel < p.channels)
      p.partial[((first + row) * p.heads + head) * p.channels + channel] = sum;
  });
}

// The value's gradient at 64 pixels of one (image, head); `pieces` of them in all matrix levels.
template <typename T, bool FUSED>
__global__ void __launch_bounds__(kThreads, 4)
    matrix_backward_value(const __grid_constant__ Arguments<T, float> p, int64_t pieces) {
  const Tiles<T> tiles;
  const int64_t image = int64_t(blockIdx.x) / pieces / p.heads;
  const int head = int(int64_t(blockIdx.x) / pieces % p.heads);
  int piece = int(int64_t(blockIdx.x) % pieces), level = 0;
  for (;; ++level) {
    if (!(p.matrix_levels >> level & 1)) continue;
    const int here = (p.width[level] * p.height[level] + kTile - 1) / kTile;
    if (piece < here) break;
    piece -= here;
  }
  const int from = piece * kTile, pixels = p.width[level] * p.height[level];
  float sums[8][4] = {};
  for (int64_t first = 0; first < p.queries; first += kTile) {
    const RowQuery mine(p, first + row_of_thread(), head);
    if (!any_thread(mine.sees(image))) continue;  // also: the matrices before have been multiplied
    fill_weights<FUSED>(p, tiles.weights, mine, image, head, level, from);
    const int64_t left = p.queries - first;
    const bool strange = copy_tile(
        p.grad_out + (first * p.heads + head) * p.channels,
        [&](int row) { return int64_t(row) * p.heads * p.channels; }, left < kTile ? int(left) : kTile, p.channels,
        tiles.first);
    const bool finite = !any_thread(strange);  // also: both matrices are complete
    multiply_weights<T>(
        finite, [&](int pixel, int k) { return float(tiles.weights[k * kLong + pixel]); }, tiles.first, sums);
  }
  over_fragment(sums, [&](int pixel, int channel, float sum) {
    if (from + pixel >= pixels || channel >= p.channels) return;
    const int64_t row = image * p.positions + p.start[level] + from + pixel;
    const int64_t to = (row * p.heads + head) * p.channels + channel;
    if (p.owned_value) {
      T rounded;
      narrow(sum, rounded);
      p.owned_value[to] = rounded;
    } else {
      p.added_value[to] = sum;
    }
  });
}

// What a thread keeps of a sample for the table's gradients: [3, queries of the tile, points].
template <typename T>
__device__ __forceinline__ Array<float> sample_gradients(const Arguments<T, float>& p) {
  return shared_array<float>(kGradientsAt, 3ll * kTile * p.points);
}

// Turns dW into gradients of the samples, each by one thread; dW of a corner in another piece of the
// level counts there.
template <bool FUSED, typename T>
__device__ __forceinline__ void sample_backward(const Arguments<T, float>& p, const Tiles<T>& tiles,
                                                const RowQuery& mine, int64_t image, int head, int level, int from,
                                                float delta) {
  const Array<float> kept = sample_gradients(p);
  const int32_t width = p.width[level], height = p.height[level];
  const int64_t rel = mine.seen.end - image;
  for (int point = mine.half; point < p.points; point += 2) {
    SampleGradient<float> g{0, 0, 0};
    float weight = 0;
    if (mine.sees(image)) {
      weight = weight_of<FUSED>(p, mine.softmax, mine.q, head, rel, level, point);
      const Sample<float> s =
          sample_at(location_of<FUSED>(p, mine.q, head, rel, level, point), weight, width, height, 0);
      float dots[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = s.row + corner_step(k, width) - from;
        const bool here = (s.inside >> k & 1) && at >= 0 && at < kTile;
        dots[k] = here ? float(tiles.weights[mine.row * kLong + at]) : 0.0f;
      }
      g = differentiate(s.dx, s.dy, weight, dots[0], dots[1], dots[2], dots[3], float(width), float(height));
      const int64_t to = ((mine.q * p.heads + head) * p.levels + level) * p.points + point;
      if constexpr (FUSED) {
        g = {weight * (g.weight - (from == 0 ? delta : 0.0f)), g.x / p.base, g.y / p.base};
        const int64_t own = 2 * ((mine.q * p.heads + head) * p.points + point);
        add_to(p.grad_logits, to, g.weight);
        add_to(p.grad_offsets, own, g.x);
        add_to(p.grad_offsets, own + 1, g.y);
      } else {
        add_to(p.grad_logits, to, g.weight);
        add_to(p.grad_offsets, 2 * to, g.x);
        add_to(p.grad_offsets, 2 * to + 1, g.y);
      }
    }
    const int at = mine.row * p.points + point, size = kTile * p.points;
    kept[at] = g.weight;
    kept[size + at] = g.x;
    kept[2 * size + at] = g.y;
  }
}

// Adds the samples' gradients to the table's, one thread an element, queries in their order; a sum
// is written where the next query belongs to another row.
template <typename T>
__device__ __forceinline__ void add_to_table(const Arguments<T, float>& p, const Tiles<T>& tiles, int64_t first,
                                             int64_t image, int head, int level) {
  const Array<float> kept = sample_gradients(p);
  const int64_t size = (2 + p.levels) * p.points;
  for (int element = int(threadIdx.x); element < 3 * p.points; element += kThreads) {
    const int kind = element / p.points, point = element % p.points;
    const int64_t at = kind == 0 ? 2 * p.points + level * p.points + point : 2 * point + kind - 1;
    float sum = 0;
    int64_t row = -1;
    for (int i = 0; i < kTile && first + i < p.queries; ++i) {
      const int64_t begin = tiles.intervals[2 * i], end = tiles.intervals[2 * i + 1];
      if (image < begin || image >= end) continue;
      const Interval seen = seen_by(p, (first + i) / p.group_size);
      const int64_t next = ((first + i) / p.chunk * p.heads + head) * p.share_rows + seen.end - image;
      if (next != row && row >= 0) add_to(p.table_shares, row * size + at, sum);
      sum = next == row ? sum : 0;
      row = next;
      sum += kept[(kind * kTile + i) * p.points + point];
    }
    if (row >= 0) add_to(p.table_shares, row * size + at, sum);
  }
}

// The gradients of 64 queries' projections on the matrix levels. p.chunk divides 64.
template <typename T, bool FUSED>
__global__ void __launch_bounds__(kThreads, 4) matrix_backward_query(const __grid_constant__ Arguments<T, float> p) {
  const Tiles<T> tiles;
  const int head = int(int64_t(blockIdx.x) % p.heads);
  const int64_t first = int64_t(blockIdx.x) / p.heads * kTile;
  const RowQuery mine(p, first + row_of_thread(), head);
  const Interval all = seen_by_tile(tiles.intervals, mine);
  const int64_t left = p.queries - first, base = (first * p.heads + head) * p.channels;
  copy_tile(
      p.grad_out + base, [&](int row) { return int64_t(row) * p.heads * p.channels; },
      left < kTile ? int(left) : kTile, p.channels, tiles.second);
  float delta = 0;
  if (FUSED && mine.valid) {
    for (int channel = 0; channel < p.channels; ++channel) {
      const int64_t at = base + int64_t(mine.row) * p.heads * p.channels + channel;
      delta += to_arithmetic(p.grad_out[at]) * to_arithmetic(p.result[at]);
    }
  }
  for (int64_t image = all.first; image < all.last; ++image) {
    if (!any_thread(mine.sees(image))) continue;
    for (int level = 0; level < p.levels; ++level) {
      if (!(p.matrix_levels >> level & 1)) continue;
      const int pixels = p.width[level] * p.height[level];
      for (int from = 0; from < pixels; from += kTile) {
        copy_tile(
            p.value + (image * p.stride_image + (p.start[level] + from) * p.stride_position + head * p.stride_head),
            [&](int row) { return row * p.stride_position; }, pixels - from, p.channels, tiles.first);
        __syncthreads();  // both matrices are complete
        float sums[8][4] = {};
        multiply<true>([&](int row, int k) { return load_pair(tiles.second, row * kWide + k); }, tiles.first,
                       (p.channels + 15) / 16 * 16, sums);
        over_fragment(sums, [&](int row, int pixel, float sum) { tiles.weights[row * kLong + pixel] = sum; });
        __syncthreads();  // dW is complete, the values have been read
        sample_backward<FUSED>(p, tiles, mine, image, head, level, from, delta);
        __syncthreads();  // dW has been read, the samples' gradients are complete
        if constexpr (FUSED) add_to_table(p, tiles, first, image, head, level);
      }
    }
  }
}

}  // namespace mmi
