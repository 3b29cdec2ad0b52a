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
  A dx, dy;                            // fractions: distance from the left and the upper corner
  int32_t row00, row01, row10, row11;  // position (y, x) in the image's maps; negative: outside
};

// Ternaries and integer ors only, so that loops over it vectorise.
template <typename A>
MMI_FN Corners<A> locate(A location_x, A location_y, int32_t width, int32_t height, int32_t start) {
  A x = location_x * A(width) - A(0.5), y = location_y * A(height) - A(0.5);
  // To where no corner lies on the map; NaN fails the first comparison.
  x = x < A(width) ? x : A(width);
  y = y < A(height) ? y : A(height);
  x = x < A(-1) ? A(-2) : x;
  y = y < A(-1) ? A(-2) : y;
  const A left = std::floor(x), top = std::floor(y);
  const int32_t ix = int32_t(left), iy = int32_t(top);
  const int32_t at_left = uint32_t(ix) < uint32_t(width) ? 0 : INT32_MIN;
  const int32_t at_right = uint32_t(ix + 1) < uint32_t(width) ? 0 : INT32_MIN;
  const int32_t at_top = uint32_t(iy) < uint32_t(height) ? 0 : INT32_MIN;
  const int32_t at_bottom = uint32_t(iy + 1) < uint32_t(height) ? 0 : INT32_MIN;
  const int32_t row = start + iy * width + ix;
  Corners<A> c;
  c.dx = x - left;
  c.dy = y - top;
  c.row00 = row | at_top | at_left;
  c.row01 = (row + 1) | at_top | at_right;
  c.row10 = (row + width) | at_bottom | at_left;
  c.row11 = (row + width + 1) | at_bottom | at_right;
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
