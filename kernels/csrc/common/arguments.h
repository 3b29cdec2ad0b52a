// The operators' schemas, and the checks of their arguments, on libtorch's stable ABI. The CPU's
// and the GPU's Problem name the same things by the same fields, so one set of checks fills both.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shapes = std::vector<int64_t>;  // height, width, height, width, ...

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "mmfs_forward(Tensor value, int[] spatial_shapes, Tensor offsets, Tensor logits, Tensor table_offsets, "
      "Tensor table_logits, Tensor reference_points, Tensor visible, Tensor? sink_value, float base, bool sink) "
      "-> (Tensor out, Tensor stats)");
  m.def(
      "mmfs_backward(Tensor grad_out, Tensor out, Tensor stats, Tensor value, int[] spatial_shapes, Tensor offsets, "
      "Tensor logits, Tensor table_offsets, Tensor table_logits, Tensor reference_points, Tensor visible, float base, "
      "bool sink, bool for_value, bool for_query, bool deterministic=False) -> (Tensor value, Tensor offsets, "
      "Tensor logits, Tensor table_offsets, Tensor table_logits)");
  m.def("deform_forward(Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "deform_backward(Tensor grad_out, Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights, "
      "bool for_value, bool for_query, bool deterministic=False) -> (Tensor value, Tensor locations, Tensor weights)");
}

inline void check_value_type(const Tensor& value) {
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "value: expected float32, float64, bfloat16 or float16");
}

inline ScalarType arithmetic_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The address of a contiguous tensor of this type and shape that lies where `value` does.
inline const void* data(const Tensor& tensor, const char* name, const Tensor& value, ScalarType type,
                        const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.is_cpu() == value.is_cpu() && tensor.get_device_index() == value.get_device_index(), name,
                  ": lies on another device than value");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(tensor.dim() == int64_t(shape.size()), name, ": expected ", shape.size(), " axes");
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, ": axis ", i, " is ", tensor.size(i), ", not ", shape[i]);
  return tensor.const_data_ptr();
}

template <typename P>
void set_value(P& p, const Tensor& value) {
  STD_TORCH_CHECK(value.dim() == 4, "value: expected 4 axes");
  STD_TORCH_CHECK(value.size(3) < 2 || value.stride(3) == 1, "value: channels must be adjacent");
  check_value_type(value);
  p.images = value.size(0);
  p.positions = value.size(1);
  p.heads = value.size(2);
  p.channels = value.size(3);
  p.value = value.const_data_ptr();
  p.stride_image = value.stride(0);
  p.stride_position = value.stride(1);
  p.stride_head = value.stride(2);
}

// Calls visit(level, height, width, first position) for each level.
template <typename P, typename F>
void over_levels(const P& p, const Shapes& shapes, F visit) {
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "spatial_shapes: expected pairs of height and width");
  int64_t from = 0;
  for (int64_t level = 0; level < int64_t(shapes.size()) / 2; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0, "spatial_shapes: negative size");
    visit(level, height, width, from);
    from += height * width;
  }
  STD_TORCH_CHECK(from == p.positions, "spatial_shapes: levels hold ", from, " positions, value has ", p.positions);
  STD_TORCH_CHECK(from < INT32_MAX, "spatial_shapes: more than 2^31 positions an image");
}

struct Projections {
  const Tensor &offsets, &logits, &table_offsets, &table_logits, &reference_points, &visible;
  const std::optional<Tensor>& sink_value;
  double base;
  bool sink;
};

// Needs what set_value and over_levels give. Intervals are only read where that costs no wait for a
// device.
template <typename P>
void set_projections(P& p, const Tensor& value, const Projections& in) {
  const ScalarType real = arithmetic_type(value);
  const int64_t q = p.queries, h = p.heads, l = p.levels, n = p.points;
  p.rows = in.table_offsets.size(0);
  p.offsets = data(in.offsets, "offsets", value, real, {q, h, n, 2});
  p.logits = data(in.logits, "logits", value, real, {q, h, l, n});
  p.table_offsets = data(in.table_offsets, "table_offsets", value, real, {p.rows, h, n, 2});
  p.table_logits = data(in.table_logits, "table_logits", value, real, {p.rows, h, l, n});
  const int64_t references = in.reference_points.size(0);
  STD_TORCH_CHECK(references == q || references == 1, "reference_points: expected one, or one a query");
  p.reference = data(in.reference_points, "reference_points", value, real, {references, 2});
  p.reference_stride = references == 1 ? 0 : 2;
  p.groups = in.visible.size(0);
  STD_TORCH_CHECK(q == 0 || (p.groups > 0 && q % p.groups == 0), "visible: queries do not divide into groups");
  p.group_size = p.groups ? q / p.groups : 0;
  const void* visible = data(in.visible, "visible", value, ScalarType::Int, {p.groups, 2});
  p.visible = static_cast<const int32_t*>(visible);
  if (value.is_cpu()) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int32_t first = p.visible[2 * g], last = p.visible[2 * g + 1];
      STD_TORCH_CHECK(first >= last || (first >= 0 && last <= p.images), "visible: group ", g, " sees images ", first,
                      " to ", last, ", but value holds ", p.images);
    }
  }
  if (in.sink_value) p.sink_value = data(*in.sink_value, "sink_value", value, real, {h, p.channels});
  p.base = in.base;
  p.sink = in.sink;
}

template <typename P>
void set_general(P& p, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  const ScalarType real = arithmetic_type(value);
  const int64_t n = p.images, q = locations.size(1), h = p.heads, l = p.levels, k = p.points;
  p.queries = n * q;
  p.groups = n;
  p.group_size = q;
  p.rows = 2;  // group g sees image g, one back from the end of its interval
  p.weights = data(weights, "attention_weights", value, real, {n, q, h, l, k});
  p.locations = data(locations, "sampling_locations", value, real, {n, q, h, l, k, 2});
}

}  // namespace mmi
