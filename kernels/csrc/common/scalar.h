// Numbers: 16-bit storage types, bit casts and an exponential that vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMI_FN __host__ __device__ static inline
#else
// static: each instruction set's object keeps its own copy, so that the linker never hands one
// compiled for AVX-512 to a processor without it.
#define MMI_FN static inline __attribute__((always_inline))
#endif

namespace mmi {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
MMI_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MMI_FN float widen(float x) { return x; }
MMI_FN double widen(double x) { return x; }
MMI_FN float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

MMI_FN float widen(Float16 x) {
  // The exponent is moved into place as it is and rescaled by a product, which also turns
  // subnormals into normal numbers; infinity and NaN get the full exponent back.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

MMI_FN void narrow(float x, float& to) { to = x; }
MMI_FN void narrow(double x, double& to) { to = x; }

// Both round to nearest, ties to even.
MMI_FN void narrow(float x, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

MMI_FN void narrow(float x, Float16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 the spacing is 2^-24, which is the spacing of floats just above one half.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(sign | half);
}

// exp(x) for x <= 0, within 2 units in the last place; exactly 0 below the smallest normal
// number; NaN stays NaN. Free of branches and calls, so that loops over it vectorise.
MMI_FN float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9841270e-4f;                                           // Taylor, |r| <= 0.35
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t power = int32_t(x != x ? 0.0f : n);
  const float scaled = p * bit_cast<float>((power + 127) << 23);
  return x < -87.0f ? 0.0f : scaled;
}

MMI_FN double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace mmi
