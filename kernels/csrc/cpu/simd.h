// The three loops over channels: gather, dot products and scatter, in the widest vectors of the
// instruction set this file is compiled for (GCC's and Clang's vector extension).
#pragma once

#include "../common/scalar.h"
#include "problem.h"

namespace mmi {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kMaxRun = 4;  // vectors of channels handled together: those and their sums fit the registers
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kMaxRun = 8;
#else
constexpr int kBytes = 16;
constexpr int kMaxRun = 8;
#endif

template <typename A>
constexpr int kWidth = kBytes / sizeof(A);

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <typename A>
using Vec = typename Vector<A>::type;

typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

// 16-bit numbers, each in the low half of a lane.
MMI_FN void load_halves(const void* from, Words& to) {
  Halves halves;
  memcpy(&halves, from, sizeof(halves));
  to = __builtin_convertvector(halves, Words);
}

template <typename A>
MMI_FN void load(const A* from, Vec<A>& to) {
  memcpy(&to, from, sizeof(to));
}

MMI_FN void load(const BFloat16* from, Vec<float>& to) {
  Words bits;
  load_halves(from, bits);
  bits <<= 16;
  memcpy(&to, &bits, sizeof(to));
}

MMI_FN void load(const Float16* from, Vec<float>& to) {
  Words half, bits;
  load_halves(from, half);
  const Words magnitude = (half & 0x7fff) << 13;
  Vec<float> scaled;
  memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  memcpy(&bits, &scaled, sizeof(bits));
  bits |= Words(magnitude >= 0x0f800000u) & 0x7f800000u;
  bits |= (half & 0x8000) << 16;
  memcpy(&to, &bits, sizeof(to));
}

template <typename A>
MMI_FN void store(const Vec<A>& from, A* to) {
  memcpy(to, &from, sizeof(from));
}

// a and b interleaved within each group of four lanes, so that MMI_PAIRS adds lanes 0, 2 and 1, 3 of
// both: (a0 + a2, b0 + b2, a1 + a3, b1 + b3). MMI_QUADS then finishes two such pairs.
#if defined(__clang__)
#define MMI_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMI_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif
#if defined(__AVX512F__)
#define MMI_PAIRS(a, b)                                                            \
  (MMI_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +   \
   MMI_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
#define MMI_QUADS(a, b)                                                            \
  (MMI_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +   \
   MMI_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#elif defined(__AVX2__)
#define MMI_PAIRS(a, b) \
  (MMI_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + MMI_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15))
#define MMI_QUADS(a, b) \
  (MMI_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + MMI_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#else
#define MMI_PAIRS(a, b) (MMI_SHUFFLE(a, b, 0, 4, 1, 5) + MMI_SHUFFLE(a, b, 2, 6, 3, 7))
#define MMI_QUADS(a, b) (MMI_SHUFFLE(a, b, 0, 1, 4, 5) + MMI_SHUFFLE(a, b, 2, 3, 6, 7))
#endif

// Sums of the lanes of each of four vectors.
MMI_FN void sum_lanes(const Vec<float>* v, float* sums) {
  const Vec<float> ab = MMI_PAIRS(v[0], v[1]), cd = MMI_PAIRS(v[2], v[3]);
  const Vec<float> all = MMI_QUADS(ab, cd);  // in each group of four lanes, shares of the four sums
  float parts[kWidth<float>];
  memcpy(parts, &all, sizeof(parts));
  for (int k = 0; k < 4; ++k) {
    sums[k] = parts[k];
    for (int i = k + 4; i < kWidth<float>; i += 4) sums[k] += parts[i];
  }
}

MMI_FN void sum_lanes(const Vec<double>* v, double* sums) {
  for (int k = 0; k < 4; ++k) {
    sums[k] = v[k][0];
    for (int i = 1; i < kWidth<double>; ++i) sums[k] += v[k][i];
  }
}

// The samples of one (query, image, head). Arrays are padded(n) long.
template <typename A>
struct Samples {
  int64_t n;
  A *x, *y, *weight;  // location in 0..1 and attention weight
  A *dx, *dy;
  int32_t* row[4];  // negative: outside
  A* share[4];      // weight times the corner's bilinear weight
  A* dot[4];        // the output's gradient times the corner's value
};

// out[0..B vectors) += sum over corners of share * value. With few vectors the corners go to
// several sums, so that additions need not wait for each other.
template <int B, typename T, typename A>
MMI_FN void gather_block(const T* value, int64_t stride, const Samples<A>& s, A* out) {
  constexpr int chains = B == 1 ? 4 : B == 2 ? 2 : 1;
  Vec<A> sum[chains][B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) load(out + b * kWidth<A>, sum[0][b]);
  for (int c = 1; c < chains; ++c)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) sum[c][b] = Vec<A>{};
  for (int64_t j = 0; j < s.n; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      const T* from = value + row * stride;
      const A share = s.share[k][j];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        Vec<A> v;
        load(from + b * kWidth<A>, v);
        sum[k % chains][b] += share * v;
      }
    }
  }
  for (int c = 1; c < chains; ++c)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) sum[0][b] += sum[c][b];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) store(sum[0][b], out + b * kWidth<A>);
}

// dot[k][j] (+)= g . value of corner k of sample j, over B vectors.
template <int B, typename T, typename A>
MMI_FN void dot_block(const T* value, int64_t stride, const Samples<A>& s, const A* grad, bool first) {
  Vec<A> g[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) load(grad + b * kWidth<A>, g[b]);
  for (int64_t j = 0; j < s.n; ++j) {
    Vec<A> sum[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sum[k] = Vec<A>{};
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      const T* from = value + row * stride;
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        Vec<A> v;
        load(from + b * kWidth<A>, v);
        sum[k] += g[b] * v;
      }
    }
    A total[4];
    sum_lanes(sum, total);
    for (int k = 0; k < 4; ++k) s.dot[k][j] = first ? total[k] : s.dot[k][j] + total[k];
  }
}

// tile[row] += share * g, over B vectors.
template <int B, typename A>
MMI_FN void scatter_block(A* tile, int64_t stride, const Samples<A>& s, const A* grad) {
  Vec<A> g[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) load(grad + b * kWidth<A>, g[b]);
  for (int64_t j = 0; j < s.n; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      A* to = tile + row * stride;
      const A share = s.share[k][j];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        Vec<A> v;
        load(to + b * kWidth<A>, v);
        v += share * g[b];
        store(v, to + b * kWidth<A>);
      }
    }
  }
}

template <int B>
struct Run {
  static constexpr int value = B;
};

// Calls block(Run<B>, channel) over channels in runs of B vectors, the longest first.
template <int B, typename A, typename F>
MMI_FN void over_channels(int64_t channels, F block, int64_t d = 0) {
  for (; d + B * kWidth<A> <= channels; d += B * kWidth<A>) block(Run<B>{}, d);
  if constexpr (B > 1) over_channels<B / 2, A>(channels, block, d);
}

template <typename T, typename A>
MMI_FN void gather(const T* value, int64_t stride, const Samples<A>& s, A* out, int64_t channels) {
  over_channels<kMaxRun, A>(channels, [&](auto run, int64_t d) {
    gather_block<decltype(run)::value>(value + d, stride, s, out + d);
  });
}

template <typename T, typename A>
MMI_FN void dot(const T* value, int64_t stride, const Samples<A>& s, const A* grad, int64_t channels) {
  over_channels<kMaxRun, A>(channels, [&](auto run, int64_t d) {
    dot_block<decltype(run)::value>(value + d, stride, s, grad + d, d == 0);
  });
}

template <typename A>
MMI_FN void scatter(A* tile, int64_t stride, const Samples<A>& s, const A* grad, int64_t channels) {
  over_channels<kMaxRun, A>(channels, [&](auto run, int64_t d) {
    scatter_block<decltype(run)::value>(tile + d, stride, s, grad + d);
  });
}

}  // namespace mmi
