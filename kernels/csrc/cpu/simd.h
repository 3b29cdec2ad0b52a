// The three loops over channels: gather, dot products and scatter, in 64-byte vectors.
//
// GCC's and Clang's vector extension is lowered to whatever the instruction set of the including
// file has: one AVX-512 register, two AVX, four SSE or NEON.
#pragma once

#include "../common/scalar.h"
#include "problem.h"

namespace mmi {

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename A>
using Vec = typename Vector<A>::type;
template <typename A>
constexpr int kWidth = 64 / sizeof(A);

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

// Sixteen 16-bit numbers, each in the low half of a lane.
MMI_FN void load_halves(const void* from, u32x16& to) {
  u16x16 halves;
  memcpy(&halves, from, sizeof(halves));
  to = __builtin_convertvector(halves, u32x16);
}

template <typename A>
MMI_FN void load(const A* from, Vec<A>& to) {
  memcpy(&to, from, sizeof(to));
}

MMI_FN void load(const BFloat16* from, Vec<float>& to) {
  u32x16 bits;
  load_halves(from, bits);
  bits <<= 16;
  memcpy(&to, &bits, sizeof(to));
}

MMI_FN void load(const Float16* from, Vec<float>& to) {
  u32x16 half, bits;
  load_halves(from, half);
  const u32x16 magnitude = (half & 0x7fff) << 13;
  Vec<float> scaled;
  memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  memcpy(&bits, &scaled, sizeof(bits));
  bits |= u32x16(magnitude >= 0x0f800000u) & 0x7f800000u;
  bits |= (half & 0x8000) << 16;
  memcpy(&to, &bits, sizeof(to));
}

template <typename A>
MMI_FN void store(const Vec<A>& from, A* to) {
  memcpy(to, &from, sizeof(from));
}

// Sums of the lanes of each of four vectors.
MMI_FN void sum_lanes(const Vec<float>* v, float* sums) {
  Vec<float> ab = __builtin_shuffle(v[0], v[1], (u32x16){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}) +
                  __builtin_shuffle(v[0], v[1], (u32x16){2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
  Vec<float> cd = __builtin_shuffle(v[2], v[3], (u32x16){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}) +
                  __builtin_shuffle(v[2], v[3], (u32x16){2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
  // Each group of four lanes now holds shares of (a, b, c, d).
  Vec<float> all = __builtin_shuffle(ab, cd, (u32x16){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
                   __builtin_shuffle(ab, cd, (u32x16){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  for (int k = 0; k < 4; ++k) sums[k] = (all[k] + all[k + 4]) + (all[k + 8] + all[k + 12]);
}

MMI_FN void sum_lanes(const Vec<double>* v, double* sums) {
  for (int k = 0; k < 4; ++k)
    sums[k] = ((v[k][0] + v[k][1]) + (v[k][2] + v[k][3])) + ((v[k][4] + v[k][5]) + (v[k][6] + v[k][7]));
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
  for (int b = 0; b < B; ++b) load(out + b * kWidth<A>, sum[0][b]);
  for (int c = 1; c < chains; ++c)
    for (int b = 0; b < B; ++b) sum[c][b] = Vec<A>{};
  for (int64_t j = 0; j < s.n; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      const T* from = value + row * stride;
      const A share = s.share[k][j];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        Vec<A> v;
        load(from + b * kWidth<A>, v);
        sum[k % chains][b] += share * v;
      }
    }
  }
  for (int c = 1; c < chains; ++c)
    for (int b = 0; b < B; ++b) sum[0][b] += sum[c][b];
  for (int b = 0; b < B; ++b) store(sum[0][b], out + b * kWidth<A>);
}

// dot[k][j] (+)= g . value of corner k of sample j, over B vectors.
template <int B, typename T, typename A>
MMI_FN void dot_block(const T* value, int64_t stride, const Samples<A>& s, const A* grad, bool first) {
  Vec<A> g[B];
  for (int b = 0; b < B; ++b) load(grad + b * kWidth<A>, g[b]);
  for (int64_t j = 0; j < s.n; ++j) {
    Vec<A> sum[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sum[k] = Vec<A>{};
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      const T* from = value + row * stride;
#pragma GCC unroll 4
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
  for (int b = 0; b < B; ++b) load(grad + b * kWidth<A>, g[b]);
  for (int64_t j = 0; j < s.n; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32_t row = s.row[k][j];
      if (row < 0) continue;
      A* to = tile + row * stride;
      const A share = s.share[k][j];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        Vec<A> v;
        load(to + b * kWidth<A>, v);
        v += share * g[b];
        store(v, to + b * kWidth<A>);
      }
    }
  }
}

// Calls block(std::integral_constant-like width, channel) over channels in runs of 4, 2 and 1 vectors.
template <int B>
struct Run {
  static constexpr int value = B;
};

template <typename A, typename F>
MMI_FN void over_channels(int64_t channels, F block) {
  constexpr int64_t w = kWidth<A>;
  int64_t d = 0;
  for (; d + 4 * w <= channels; d += 4 * w) block(Run<4>{}, d);
  for (; d + 2 * w <= channels; d += 2 * w) block(Run<2>{}, d);
  for (; d < channels; d += w) block(Run<1>{}, d);
}

template <typename T, typename A>
MMI_FN void gather(const T* value, int64_t stride, const Samples<A>& s, A* out, int64_t channels) {
  over_channels<A>(channels, [&](auto run, int64_t d) {
    gather_block<decltype(run)::value>(value + d, stride, s, out + d);
  });
}

template <typename T, typename A>
MMI_FN void dot(const T* value, int64_t stride, const Samples<A>& s, const A* grad, int64_t channels) {
  over_channels<A>(channels, [&](auto run, int64_t d) {
    dot_block<decltype(run)::value>(value + d, stride, s, grad + d, d == 0);
  });
}

template <typename A>
MMI_FN void scatter(A* tile, int64_t stride, const Samples<A>& s, const A* grad, int64_t channels) {
  over_channels<A>(channels, [&](auto run, int64_t d) {
    scatter_block<decltype(run)::value>(tile + d, stride, s, grad + d);
  });
}

}  // namespace mmi
