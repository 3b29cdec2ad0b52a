// Which levels take the second tier. The bounds follow from counting operations; they are to be
// measured on a GPU before they are trusted (benchmarks/kernels.py).
#pragma once

#include "problem.h"

namespace mmi {

// But for `automatic`, for tests and measurements: the first tier alone, or a half of the second wherever it
// can run.
enum class Tier { automatic, first, matrices, windows };

struct Plan {
  // A pixel of a matrix level costs two multiplications a channel and query on tensor cores, a
  // sample of the first tier four on ordinary ones and four loads: 16 x 16 pixels pay from about 8
  // points on, if a tile of 64 queries is full.
  static constexpr int64_t kMatrixPixels = 256, kMatrixQueries = 64;
  static constexpr int kMatrixPoints = 32;  // at most: shared memory holds the gradients of 64 x points samples
  // A window pays where many neighbouring queries add to the same positions: the pixels of a drawn
  // image, or tokens that look around one point.
  static constexpr int64_t kWindowQueries = 1024, kWindowPixels = 1024;

  static uint32_t matrix_levels(const DeviceProblem& p, bool sixteen_bits, bool aligned, Tier tier) {
    if (tier == Tier::first || tier == Tier::windows || !sixteen_bits || !aligned) return 0;
    if (p.heads == 0 || p.channels == 0 || p.channels > 64 || p.points > kMatrixPoints) return 0;
    if (tier == Tier::automatic && p.queries < kMatrixQueries) return 0;
    uint32_t levels = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int64_t pixels = int64_t(p.width[l]) * p.height[l];
      const bool pays = pixels <= kMatrixPixels && pixels <= 32 * p.points;
      levels |= uint32_t(pixels > 0 && (pays || tier == Tier::matrices)) << l;
    }
    return levels;
  }

  // The fused operator's alone: the general one has no reference points to put a window around.
  static uint32_t window_levels(const DeviceProblem& p, bool sixteen_bits, bool aligned, Tier tier) {
    if (tier == Tier::first || p.locations || !p.added_value) return 0;
    if (!sixteen_bits || !aligned || p.channels == 0 || p.channels > 64) return 0;
    const int64_t neighbours = p.reference_stride == 0 ? p.queries : p.group_size;
    if (tier == Tier::automatic && neighbours < kWindowQueries) return 0;
    uint32_t levels = 0;
    for (int l = 0; l < p.levels; ++l) {
      const bool pays = int64_t(p.width[l]) * p.height[l] >= kWindowPixels;
      levels |= uint32_t(!(p.matrix_levels >> l & 1) && (pays || tier == Tier::windows)) << l;
    }
    return levels;
  }
};

}  // namespace mmi
