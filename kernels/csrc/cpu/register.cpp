// The operators as the dispatcher sees them, on libtorch's stable ABI, and their CPU entry points:
// they check, allocate, choose the instruction set and spread tasks over torch's threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "problem.h"

namespace {

using mmi::Dtype;
using mmi::Problem;
using mmi::ScalarType;
using mmi::Shapes;
using mmi::Tensor;
using mmi::arithmetic_type;
using mmi::data;

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const mmi::Kernels& (*kernels)();
};

// Best first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     mmi::kernels_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, mmi::kernels_avx2},
#endif
    {"baseline", [] { return true; }, mmi::kernels_baseline},
};

const InstructionSet* best_instruction_set() {
  const InstructionSet* set = kInstructionSets;
  while (!set->supported()) ++set;
  return set;
}

const InstructionSet* instruction_set = best_instruction_set();

Dtype dtype_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: return Dtype::f32;
  }
}

// Level tables spread over the samples of a (query, image, head).
struct LevelTables {
  std::vector<int32_t> width, height, start;

  LevelTables(Problem& p, const Shapes& shapes, int64_t points) {
    p.levels = int64_t(shapes.size()) / 2;
    p.points = points;
    const size_t padded = mmi::padded(p.samples());
    for (auto* table : {&width, &height, &start}) table->assign(padded, 0);
    mmi::over_levels(p, shapes, [&](int64_t level, int64_t h, int64_t w, int64_t from) {
      for (int64_t i = level * points; i < (level + 1) * points; ++i) {
        height[i] = int32_t(h);
        width[i] = int32_t(w);
        start[i] = int32_t(from);
      }
    });
    p.width = width.data();
    p.height = height.data();
    p.start = start.data();
  }
};

void set_value(Problem& p, const Tensor& value) {
  mmi::set_value(p, value);
  p.dtype = dtype_of(value);
}

// Queries a task handles: a function of the problem alone, as it fixes the order of sums.
int64_t choose_chunk(const Problem& p) {
  return std::clamp<int64_t>(p.queries * p.heads / 16, 64, 512);
}

using Pass = void (*)(const Problem&, int64_t, int64_t, void*);

void spread(const Problem& p, int64_t tasks, Pass pass) {
  const int64_t bytes = (instruction_set->kernels().scratch_bytes(p) + 63) / 64 * 64;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), std::free);
    STD_TORCH_CHECK(scratch, "out of memory: ", bytes, " bytes of scratch");
    pass(p, begin, end, scratch.get());
  });
}

void set_projections(Problem& p, const Tensor& value, const mmi::Projections& in) {
  mmi::set_projections(p, value, in);
  p.chunk = choose_chunk(p);
}

std::tuple<Tensor, Tensor> mmfs_forward(Tensor value, Shapes spatial_shapes, Tensor offsets, Tensor logits,
                                        Tensor table_offsets, Tensor table_logits, Tensor reference_points,
                                        Tensor visible, std::optional<Tensor> sink_value, double base, bool sink) {
  Problem p{};
  set_value(p, value);
  STD_TORCH_CHECK(offsets.dim() == 4, "offsets: expected 4 axes");
  p.queries = offsets.size(0);
  const LevelTables levels(p, spatial_shapes, offsets.size(2));
  set_projections(p, value, {offsets, logits, table_offsets, table_logits, reference_points, visible, sink_value,
                             base, sink});
  Tensor out = torch::stable::new_empty(value, {p.queries, p.heads, p.channels});
  Tensor stats = torch::stable::new_empty(value, {2, p.queries, p.heads}, arithmetic_type(value));
  p.out = out.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  spread(p, p.heads * p.chunks(), instruction_set->kernels().forward);
  return {out, stats};
}

// Adds up the chunks' shares of the table's gradients, in double.
template <typename A>
void reduce_table(const Problem& p, const void* shares, void* offsets, void* logits) {
  const int64_t twice = 2 * p.points, n = p.samples(), row = twice + n;
  torch::stable::parallel_for(0, p.heads * p.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(row);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % p.heads, rel = i / p.heads;
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
        const A* share = static_cast<const A*>(shares) + ((chunk * p.heads + head) * p.rows + rel) * row;
        for (int64_t j = 0; j < row; ++j) sum[j] += share[j];
      }
      std::copy_n(sum.begin(), twice, static_cast<A*>(offsets) + i * twice);
      std::copy_n(sum.begin() + twice, n, static_cast<A*>(logits) + i * n);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mmfs_backward(
    Tensor grad_out, Tensor out, Tensor stats, Tensor value, Shapes spatial_shapes, Tensor offsets, Tensor logits,
    Tensor table_offsets, Tensor table_logits, Tensor reference_points, Tensor visible, double base, bool sink,
    bool for_value, bool for_query, bool /*deterministic: always*/) {
  Problem p{};
  set_value(p, value);
  STD_TORCH_CHECK(offsets.dim() == 4, "offsets: expected 4 axes");
  p.queries = offsets.size(0);
  const LevelTables levels(p, spatial_shapes, offsets.size(2));
  set_projections(p, value, {offsets, logits, table_offsets, table_logits, reference_points, visible, std::nullopt,
                             base, sink});
  const ScalarType real = arithmetic_type(value);
  p.grad_out = data(grad_out, "grad_out", value, value.scalar_type(), {p.queries, p.heads, p.channels});
  p.out = const_cast<void*>(data(out, "out", value, value.scalar_type(), {p.queries, p.heads, p.channels}));
  p.stats = const_cast<void*>(data(stats, "stats", value, real, {2, p.queries, p.heads}));

  auto like = [&](std::vector<int64_t> shape, bool wanted, ScalarType type) {
    return torch::stable::new_empty(value, wanted ? shape : std::vector<int64_t>{0}, type);
  };
  Tensor grad_value = like({p.images, p.positions, p.heads, p.channels}, for_value, value.scalar_type());
  Tensor grad_offsets = like({p.queries, p.heads, p.points, 2}, for_query, real);
  Tensor grad_logits = like({p.queries, p.heads, p.levels, p.points}, for_query, real);
  Tensor grad_table_offsets = like({p.rows, p.heads, p.points, 2}, for_query, real);
  Tensor grad_table_logits = like({p.rows, p.heads, p.levels, p.points}, for_query, real);
  if (for_query) {
    Tensor shares = like({p.chunks(), p.heads, p.rows, 2 * p.points + p.samples()}, true, real);
    p.grad_offsets = grad_offsets.mutable_data_ptr();
    p.grad_logits = grad_logits.mutable_data_ptr();
    p.grad_table = shares.mutable_data_ptr();
    spread(p, p.heads * p.chunks(), instruction_set->kernels().backward_query);
    auto* reduce = p.dtype == Dtype::f64 ? reduce_table<double> : reduce_table<float>;
    reduce(p, p.grad_table, grad_table_offsets.mutable_data_ptr(), grad_table_logits.mutable_data_ptr());
  }
  if (for_value) {
    p.grad_value = grad_value.mutable_data_ptr();
    spread(p, p.images * p.heads, instruction_set->kernels().backward_value);
  }
  return {grad_value, grad_offsets, grad_logits, grad_table_offsets, grad_table_logits};
}

void set_general(Problem& p, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  mmi::set_general(p, value, locations, weights);
  p.chunk = choose_chunk(p);
}

Tensor deform_forward(Tensor value, Shapes spatial_shapes, Tensor locations, Tensor weights) {
  Problem p{};
  set_value(p, value);
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 axes");
  const LevelTables levels(p, spatial_shapes, locations.size(4));
  set_general(p, value, locations, weights);
  Tensor out = torch::stable::new_empty(value, {p.images, p.group_size, p.heads * p.channels});
  p.out = out.mutable_data_ptr();
  spread(p, p.heads * p.chunks(), instruction_set->kernels().forward);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> deform_backward(Tensor grad_out, Tensor value, Shapes spatial_shapes,
                                                   Tensor locations, Tensor weights, bool for_value, bool for_query,
                                                   bool /*deterministic: always*/) {
  Problem p{};
  set_value(p, value);
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 axes");
  const LevelTables levels(p, spatial_shapes, locations.size(4));
  set_general(p, value, locations, weights);
  p.grad_out = data(grad_out, "grad_out", value, value.scalar_type(), {p.images, p.group_size, p.heads * p.channels});

  auto like = [&](const Tensor& of, bool wanted) {
    const auto sizes = of.sizes();
    const Shapes shape = wanted ? Shapes(sizes.begin(), sizes.end()) : Shapes{0};
    return torch::stable::new_empty(of, shape);
  };
  Tensor grad_value = like(value, for_value), grad_locations = like(locations, for_query);
  Tensor grad_weights = like(weights, for_query);
  if (for_query) {
    p.grad_offsets = grad_locations.mutable_data_ptr();
    p.grad_logits = grad_weights.mutable_data_ptr();
    spread(p, p.heads * p.chunks(), instruction_set->kernels().backward_query);
  }
  if (for_value) {
    p.grad_value = grad_value.mutable_data_ptr();
    spread(p, p.images * p.heads, instruction_set->kernels().backward_value);
  }
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

#define MMI_EXPORT extern "C" __attribute__((visibility("default")))

MMI_EXPORT const char* mmi_cpu_instruction_set() { return instruction_set->name; }

// Chooses an instruction set by name; false when this processor lacks it. For tests.
MMI_EXPORT bool mmi_set_cpu_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.supported()) {
      instruction_set = &set;
      return true;
    }
  }
  return false;
}

STABLE_TORCH_LIBRARY(mmi_kernels, m) { mmi::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(mmi_kernels, CPU, m) {
  m.impl("mmfs_forward", TORCH_BOX(&mmfs_forward));
  m.impl("mmfs_backward", TORCH_BOX(&mmfs_backward));
  m.impl("deform_forward", TORCH_BOX(&deform_forward));
  m.impl("deform_backward", TORCH_BOX(&deform_backward));
}
