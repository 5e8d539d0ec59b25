// torch.ops.quest.hadamard
#include "arguments.h"
#include "backend.h"

namespace quest::bindings {
namespace {

Tensor hadamard(const Tensor& x, std::optional<int64_t> block) {
  check_rank("hadamard", "x", x, 1);
  const DType dtype = real_dtype("hadamard", "x", x.scalar_type());
  const int64_t k = x.size(x.dim() - 1);
  const int64_t rows = product(lead_shape(x));
  const Tensor input = readable(x);
  Tensor output = empty_on(x, shape_of(x), x.scalar_type());
  const Execution execution(x);
  backend::hadamard(input.const_data_ptr(), output.mutable_data_ptr(), dtype, rows, k, block.value_or(k > 0 ? default_block(k) : 1),
                    execution);
  return output;
}

}  // namespace

QUEST_IMPL(m) { m.impl("hadamard", TORCH_BOX(&hadamard)); }

}  // namespace quest::bindings
