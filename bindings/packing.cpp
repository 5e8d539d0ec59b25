// torch.ops.quest.pack and unpack
#include "arguments.h"
#include "backend.h"

namespace quest::bindings {
namespace {

Layout packed_layout(const char* op, const std::string& text) {
  const Layout layout = parse_layout(text);
  check(layout == Layout::kPacked || layout == Layout::kPlanes, op, ": expected layout \"packed\" or \"planes\", got \"", text, "\"");
  return layout;
}

Tensor pack(const Tensor& codes, std::string grid_text, std::string layout_text) {
  const Grid grid = parse_grid(grid_text);
  const Layout layout = packed_layout("pack", layout_text);
  check_rank("pack", "codes", codes, 1);
  check_dtype("pack", "codes", codes, {ScalarType::Byte});
  const int64_t k = codes.size(codes.dim() - 1);
  const Shape lead = lead_shape(codes);
  Shape shape = with_last(lead, row_bytes(layout, k));
  if (layout == Layout::kPlanes) shape.insert(shape.begin(), grid.bits);
  const Tensor input = readable(codes);
  Tensor packed = empty_on(codes, shape, ScalarType::Byte);
  const Execution execution(codes);
  backend::pack(grid, layout, static_cast<const uint8_t*>(input.const_data_ptr()), static_cast<uint8_t*>(packed.mutable_data_ptr()),
                product(lead), k, execution);
  return packed;
}

Tensor unpack(const Tensor& packed, std::string grid_text, std::string layout_text, int64_t k) {
  const Grid grid = parse_grid(grid_text);
  const Layout layout = packed_layout("unpack", layout_text);
  const bool planes = layout == Layout::kPlanes;
  check_rank("unpack", "packed", packed, planes ? 2 : 1);
  check_dtype("unpack", "packed", packed, {ScalarType::Byte});
  check(k >= 0, "unpack: expected k >= 0, got ", k);
  Shape lead = lead_shape(packed);
  Shape expected = with_last(lead, row_bytes(layout, k));
  if (planes) {
    lead.erase(lead.begin());
    expected.front() = grid.bits;
  }
  check_shape("unpack", concat("packed (k = ", k, ")").c_str(), packed, expected);
  const Tensor input = readable(packed);
  Tensor codes = empty_on(packed, with_last(lead, k), ScalarType::Byte);
  const Execution execution(packed);
  backend::unpack(grid, layout, static_cast<const uint8_t*>(input.const_data_ptr()), static_cast<uint8_t*>(codes.mutable_data_ptr()),
                  product(lead), k, execution);
  return codes;
}

}  // namespace

QUEST_IMPL(m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace quest::bindings
