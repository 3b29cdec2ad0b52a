// Where a sample falls: the one definition of bilinear sampling that every kernel uses.
//
// pixel = location * size - 0.5; what lies outside a map is zero. A location that is not finite, or
// lies too far outside, touches no corner: it adds nothing and gets no gradient. On a pixel line the
// derivative is the one to the right and below (as in grid_sample).
#pragma once

#include "scalar.h"

namespace mmi {

template <typename A>
struct Corners {
  A dx, dy;                       // fractions: distance from the left and the upper corner
  int32_t row00, row01, row10, row11;  // position (y, x) in the image's maps; -1 outside
};

template <typename A>
MMI_FN Corners<A> locate(A location_x, A location_y, int32_t width, int32_t height, int32_t start) {
  const A x = location_x * A(width) - A(0.5), y = location_y * A(height) - A(0.5);
  // NaN and infinity fail these comparisons. Single & keeps the function free of branches.
  const bool close = (x >= A(-1)) & (x < A(width)) & (y >= A(-1)) & (y < A(height));
  const A px = close ? x : A(0), py = close ? y : A(0);
  const A left = std::floor(px), top = std::floor(py);
  const int32_t ix = int32_t(left), iy = int32_t(top);
  const int32_t row = start + iy * width + ix;
  const bool has_left = close & (ix >= 0), has_right = close & (ix + 1 < width);
  const bool has_top = iy >= 0, has_bottom = iy + 1 < height;
  Corners<A> c;
  c.dx = px - left;
  c.dy = py - top;
  c.row00 = (has_top & has_left) ? row : -1;
  c.row01 = (has_top & has_right) ? row + 1 : -1;
  c.row10 = (has_bottom & has_left) ? row + width : -1;
  c.row11 = (has_bottom & has_right) ? row + width + 1 : -1;
  return c;
}

// Derivatives of one sample's share w * sum_k b_k v_k, from the products d_k = g . v_k of the
// output's gradient with the four corners (0 outside).
template <typename A>
struct SampleGradient {
  A weight, x, y;  // with respect to w and to the location in 0..1
};

template <typename A>
MMI_FN SampleGradient<A> differentiate(
    A dx, A dy, A w, A d00, A d01, A d10, A d11, A width, A height) {
  const A upper = d00 + dx * (d01 - d00), lower = d10 + dx * (d11 - d10);
  SampleGradient<A> g;
  g.weight = upper + dy * (lower - upper);
  g.x = w * width * ((d01 - d00) + dy * ((d11 - d10) - (d01 - d00)));
  g.y = w * height * (lower - upper);
  return g;
}

}  // namespace mmi
