// torch.ops.quest.quantize, dequantize and quantize_backward
#include "quantize.h"

#include "quest/grid.h"

namespace quest::bindings {

Shape codes_shape(const Quantizer& quantizer, Layout layout, const Shape& lead, int64_t k) {
  Shape shape = with_last(lead, row_bytes(layout, stored_codes(quantizer, layout, k)));
  if (layout == Layout::kPlanes) shape.insert(shape.begin(), quantizer.grid.bits);
  return shape;
}

namespace {

bool is_sparse(const Quantizer& quantizer) { return quantizer.sparsity == Sparsity::kFourEight; }

ScalarType codes_dtype(Layout layout) { return layout == Layout::kValues ? ScalarType::Char : ScalarType::Byte; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_op(const Tensor& x, std::string quantizer, std::string layout, bool mask,
                                                               std::string prologue, std::optional<Tensor> norm_weight,
                                                               double norm_epsilon) {
  Quantized result = quantize("quantize", x, parse_quantizer(quantizer), parse_layout(layout), mask,
                              {parse_prologue(prologue), norm_weight, norm_epsilon});
  return {result.codes, result.scale, result.code_sum, result.mask, result.index};
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, std::optional<Tensor> index, std::string quantizer_text,
                  std::string layout_text, int64_t k, ScalarType dtype) {
  const char* op = "dequantize";
  const Quantizer quantizer = parse_quantizer(quantizer_text);
  const Layout layout = parse_layout(layout_text);
  check_layout(op, quantizer, layout, product(shape_of(scale)), k);
  check_index(op, quantizer, index.has_value());
  const DType out = real_dtype(op, "dtype", dtype);
  const Shape lead = shape_of(scale);
  check_dtype(op, "codes", codes, {codes_dtype(layout)});
  check_shape(op,
              concat("codes (quantizer ", quantizer_text, ", layout ", layout_text, ", k = ", k, ", scale ", to_text(lead), ")").c_str(),
              codes, codes_shape(quantizer, layout, lead, k));
  check_dtype(op, "scale", scale, {ScalarType::Float});
  check_same_device(op, "scale", scale, "codes", codes);
  const bool needs_index = is_sparse(quantizer);
  if (needs_index) {
    check_dtype(op, "index", *index, {ScalarType::Byte});
    check_shape(op, "index", *index, with_last(lead, index_row_bytes(k)));
    check_same_device(op, "index", *index, "codes", codes);
    index = readable(*index);
  }
  const Tensor input = readable(codes);
  const Tensor scales = readable(scale);
  Tensor output = empty_on(codes, with_last(lead, k), dtype);
  const Execution execution(codes);
  backend::dequantize(quantizer, layout, input.const_data_ptr(), static_cast<const float*>(scales.const_data_ptr()),
                      needs_index ? static_cast<const uint8_t*>(index->const_data_ptr()) : nullptr, output.mutable_data_ptr(), out,
                      product(lead), k, execution);
  return output;
}

Tensor quantize_backward(const Tensor& grad, const Tensor& mask, std::string quantizer_text) {
  const char* op = "quantize_backward";
  const Quantizer quantizer = parse_quantizer(quantizer_text);
  check_rank(op, "grad", grad, 1);
  const DType dtype = real_dtype(op, "grad", grad.scalar_type());
  const int64_t k = grad.size(grad.dim() - 1);
  const Shape lead = lead_shape(grad);
  check_dtype(op, "mask", mask, {ScalarType::Byte});
  check_shape(op, "mask", mask, with_last(lead, plane_row_bytes(k)));
  check_same_device(op, "mask", mask, "grad", grad);
  const Tensor input = readable(grad);
  const Tensor bits = readable(mask);
  Tensor dx = empty_on(grad, shape_of(grad), grad.scalar_type());
  const Execution execution(grad);
  backend::quantize_backward(quantizer, input.const_data_ptr(), static_cast<const uint8_t*>(bits.const_data_ptr()), dx.mutable_data_ptr(),
                             dtype, product(lead), k, execution);
  return dx;
}

}  // namespace

int64_t quantized_width(const char* op, const Tensor& x, PrologueKind prologue) {
  check_rank(op, "x", x, 1);
  const int64_t width = x.size(x.dim() - 1);
  if (prologue != PrologueKind::kSiluMul) return width;
  check(width % 2 == 0, op, ": expected x with an even last dimension, gate and up, for prologue silu_mul, got shape ",
        to_text(shape_of(x)), "; concatenate the two");
  return width / 2;
}

Quantized quantize(const char* op, const Tensor& x, const Quantizer& quantizer, Layout layout, bool mask,
                   const PrologueArguments& prologue) {
  const int64_t k = quantized_width(op, x, prologue.kind);
  const DType dtype = real_dtype(op, "x", x.scalar_type());
  const Shape lead = lead_shape(x);
  check_layout(op, quantizer, layout, product(lead), k);
  Prologue first{prologue.kind, nullptr, static_cast<float>(prologue.epsilon)};
  std::optional<Tensor> weight;
  if (prologue.weight) {
    check_dtype(op, "norm_weight", *prologue.weight, {x.scalar_type()});
    check_shape(op, "norm_weight", *prologue.weight, {k});
    check_same_device(op, "norm_weight", *prologue.weight, "x", x);
    weight = readable(*prologue.weight);
    first.weight = weight->const_data_ptr();
  }
  check_prologue(op, first);
  const Tensor input = readable(x);
  Quantized result{
      empty_on(x, codes_shape(quantizer, layout, lead, k), codes_dtype(layout)),
      empty_on(x, lead, ScalarType::Float),
      empty_on(x, lead, ScalarType::Int),
      empty_on(x, mask ? with_last(lead, plane_row_bytes(k)) : Shape{0}, ScalarType::Byte),
      empty_on(x, is_sparse(quantizer) ? with_last(lead, index_row_bytes(k)) : Shape{0}, ScalarType::Byte),
  };
  const QuantizeOutput output{
      result.codes.mutable_data_ptr(),
      static_cast<float*>(result.scale.mutable_data_ptr()),
      static_cast<int32_t*>(result.code_sum.mutable_data_ptr()),
      mask ? static_cast<uint8_t*>(result.mask.mutable_data_ptr()) : nullptr,
      is_sparse(quantizer) ? static_cast<uint8_t*>(result.index.mutable_data_ptr()) : nullptr,
  };
  const Execution execution(x);
  backend::quantize(quantizer, layout, input.const_data_ptr(), dtype, product(lead), k, output, execution, first);
  return result;
}

QUEST_IMPL(m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("quantize_backward", TORCH_BOX(&quantize_backward));
}

}  // namespace quest::bindings
