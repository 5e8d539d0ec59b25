// torch.ops.quest.gemm_* and linear
#include "quest/gemm.h"

#include "quantize.h"
#include "quest/grid.h"
#include "quest/plan.h"

namespace quest::bindings {
namespace {

// A [rows, k] operand whose tensors the kernels can read; keeps copies alive.
class OperandTensors {
 public:
  OperandTensors(const char* op, const std::string& name, const Tensor& data, const Tensor& scale, const Tensor& sum,
                 const std::optional<Tensor>& index, Grid grid, Layout layout, int64_t k)
      : data_(readable(data)), scale_(readable(scale)), sum_(readable(sum)), grid_(grid), layout_(layout) {
    check_dtype(op, name.c_str(), data, {layout == Layout::kValues ? ScalarType::Char : ScalarType::Byte});
    check(data.dim() == (layout == Layout::kPlanes ? 3 : 2), op, ": expected ", name, " in layout ", to_string(layout), " with ",
          layout == Layout::kPlanes ? "3 dimensions [bits, rows, bytes]" : "2 dimensions [rows, columns]", ", got shape ",
          to_text(shape_of(data)));
    rows_ = data.size(data.dim() - 2);
    Quantizer storage;
    storage.grid = grid;
    storage.sparsity = index ? Sparsity::kFourEight : Sparsity::kNone;
    check_shape(op, concat(name, " (", to_string(grid), ", ", to_string(layout), ", k = ", k, ")").c_str(), data,
                codes_shape(storage, layout, {rows_}, k));
    check_vector(op, name + "_scale", scale, ScalarType::Float);
    check_vector(op, name + "_sum", sum, ScalarType::Int);
    if (index) {
      check(k % 8 == 0, op, ": 4:8 sparsity needs k divisible by 8, got ", k);
      check_dtype(op, (name + "_index").c_str(), *index, {ScalarType::Byte});
      check_shape(op, (name + "_index").c_str(), *index, {rows_, index_row_bytes(k)});
      check_same_device(op, (name + "_index").c_str(), *index, name.c_str(), data);
      index_ = readable(*index);
    }
  }

  int64_t rows() const { return rows_; }

  Operand operand() const {
    return {grid_,
            layout_,
            data_.const_data_ptr(),
            static_cast<const float*>(scale_.const_data_ptr()),
            static_cast<const int32_t*>(sum_.const_data_ptr()),
            index_ ? static_cast<const uint8_t*>(index_->const_data_ptr()) : nullptr};
  }

 private:
  void check_vector(const char* op, const std::string& name, const Tensor& tensor, ScalarType type) const {
    check_dtype(op, name.c_str(), tensor, {type});
    check_shape(op, name.c_str(), tensor, {rows_});
    check_same_device(op, name.c_str(), tensor, "the operand", data_);
  }

  Tensor data_, scale_, sum_;
  std::optional<Tensor> index_;
  Grid grid_;
  Layout layout_;
  int64_t rows_ = 0;
};

std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& like) {
  if (!bias) return std::nullopt;
  check_dtype(op, "bias", *bias, {ScalarType::Float});
  check_shape(op, "bias", *bias, {n});
  check_same_device(op, "bias", *bias, "the operands", like);
  return readable(*bias);
}

const float* bias_data(const std::optional<Tensor>& bias) { return bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr; }

Tensor integer_gemm(const char* op, GemmFamily family, const OperandTensors& a, const OperandTensors& w, int64_t k,
                    const std::optional<Tensor>& bias, const Tensor& like, const Shape& shape, ScalarType dtype) {
  const DType out = real_dtype(op, "dtype", dtype);
  const int64_t m = a.rows(), n = w.rows();
  const std::optional<Tensor> added = checked_bias(op, bias, n, like);
  Tensor y = empty_on(like, shape, dtype);
  const Execution execution(like);
  auto run = [&](auto&& gemm) { gemm(a.operand(), w.operand(), bias_data(added), y.mutable_data_ptr(), out, m, n, k, execution); };
  switch (family) {
    case GemmFamily::kInt8: run(backend::gemm_int8); break;
    case GemmFamily::kInt4: run(backend::gemm_int4); break;
    case GemmFamily::kPlanes: run(backend::gemm_planes); break;
    case GemmFamily::kSparse: run(backend::gemm_sparse); break;
    default: check(false, op, ": ", to_string(family), " is no product of integers");
  }
  return y;
}

// How one operand of a family may lie, from its dtype.
Layout layout_of(GemmFamily family, bool is_weight, const Tensor& tensor) {
  const bool is_signed = tensor.scalar_type() == ScalarType::Char;
  switch (family) {
    case GemmFamily::kInt8: return is_signed ? Layout::kValues : Layout::kCodes;
    case GemmFamily::kPlanes: return Layout::kPlanes;
    default: return is_signed && !is_weight ? Layout::kValues : Layout::kPacked;
  }
}

Tensor gemm(const char* op, GemmFamily family, const Tensor& a, const Tensor& a_scale, const Tensor& a_sum, const std::string& a_grid,
            const Tensor& w, const Tensor& w_scale, const Tensor& w_sum, const std::optional<Tensor>& w_index, const std::string& w_grid,
            int64_t k, const std::optional<Tensor>& bias, ScalarType dtype, const std::string& a_layout) {
  check(k >= 0, op, ": expected k >= 0, got ", k);
  check_same_device(op, "w", w, "a", a);
  const Layout layout = a_layout.empty() ? layout_of(family, false, a) : parse_layout(a_layout);
  const OperandTensors left(op, "a", a, a_scale, a_sum, std::nullopt, parse_grid(a_grid), layout, k);
  const OperandTensors right(op, "w", w, w_scale, w_sum, w_index, parse_grid(w_grid), layout_of(family, true, w), k);
  return integer_gemm(op, family, left, right, k, bias, a, {left.rows(), right.rows()}, dtype);
}

#define QUEST_DENSE_GEMM(name, family)                                                                                                  \
  Tensor name(const Tensor& a, const Tensor& a_scale, const Tensor& a_sum, std::string a_grid, const Tensor& w, const Tensor& w_scale,  \
              const Tensor& w_sum, std::string w_grid, int64_t k, std::optional<Tensor> bias, ScalarType dtype, std::string a_layout) { \
    return gemm(#name, family, a, a_scale, a_sum, a_grid, w, w_scale, w_sum, std::nullopt, w_grid, k, bias, dtype, a_layout);           \
  }
QUEST_DENSE_GEMM(gemm_int8, GemmFamily::kInt8)
QUEST_DENSE_GEMM(gemm_int4, GemmFamily::kInt4)
QUEST_DENSE_GEMM(gemm_planes, GemmFamily::kPlanes)
#undef QUEST_DENSE_GEMM

Tensor gemm_sparse(const Tensor& a, const Tensor& a_scale, const Tensor& a_sum, std::string a_grid, const Tensor& w, const Tensor& w_scale,
                   const Tensor& w_sum, const Tensor& w_index, std::string w_grid, int64_t k, std::optional<Tensor> bias, ScalarType dtype,
                   std::string a_layout) {
  return gemm("gemm_sparse", GemmFamily::kSparse, a, a_scale, a_sum, a_grid, w, w_scale, w_sum, w_index, w_grid, k, bias, dtype, a_layout);
}

#ifdef QUEST_BACKEND_CUDA
// y [m, n] = x w_hat^T by torch's product, with the weight rounded to the type of x. (The out variant: autocast leaves it alone.)
void product_with_dequantized(const Tensor& x, const Operand& w, const std::optional<Tensor>& bias, Tensor& y, DType dtype, int64_t m,
                              int64_t n, int64_t k, const Execution& execution) {
  Quantizer storage;
  storage.grid = w.grid;
  Tensor w_hat = empty_on(x, {n, k}, x.scalar_type());
  backend::dequantize(storage, w.layout, w.data, w.scale, nullptr, w_hat.mutable_data_ptr(), dtype, n, k, execution);
  std::array<StableIValue, 1> detached{torch::stable::detail::from(torch::stable::reshape(x, Shape{m, k}))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", detached.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, 3> arguments{detached[0], torch::stable::detail::from(torch::stable::transpose(w_hat, 0, 1)),
                                        torch::stable::detail::from(torch::stable::reshape(y, Shape{m, n}))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", arguments.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(arguments[0]);  // y once more, which we own
  if (bias) backend::add_bias(bias_data(bias), y.mutable_data_ptr(), dtype, m, n, execution);
}
#endif

Tensor weight_only(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale, Grid grid, Layout layout,
                   const std::optional<Tensor>& bias) {
  check_rank(op, "x", x, 1);
  const DType dtype = real_dtype(op, "x", x.scalar_type());
  const int64_t k = x.size(x.dim() - 1);
  check(layout != Layout::kValues && layout != Layout::kEvenOdd, op, ": expected a weight in layout codes, packed or planes, got ",
        to_string(layout));
  check_rank(op, "w", w, layout == Layout::kPlanes ? 3 : 2);
  check_dtype(op, "w", w, {ScalarType::Byte});
  const int64_t n = w.size(w.dim() - 2);
  Quantizer storage;
  storage.grid = grid;
  check_shape(op, concat("w (", to_string(grid), ", ", to_string(layout), ", k = ", k, ")").c_str(), w,
              codes_shape(storage, layout, {n}, k));
  check_dtype(op, "w_scale", w_scale, {ScalarType::Float});
  check_shape(op, "w_scale", w_scale, {n});
  check_same_device(op, "w", w, "x", x);
  check_same_device(op, "w_scale", w_scale, "x", x);
  const std::optional<Tensor> added = checked_bias(op, bias, n, x);
  const Tensor input = readable(x), weight = readable(w), scale = readable(w_scale);
  Tensor y = empty_on(x, with_last(lead_shape(x), n), x.scalar_type());
  const Operand operand{grid, layout, weight.const_data_ptr(), static_cast<const float*>(scale.const_data_ptr()), nullptr};
  const Execution execution(x);
  const int64_t m = product(lead_shape(x));
#ifdef QUEST_BACKEND_CUDA
  if (n > 0 && backend::weight_only_dequantizes(operand, dtype, m, n, k)) {
    product_with_dequantized(input, operand, added, y, dtype, m, n, k, execution);
    return y;
  }
#endif
  backend::gemm_weight_only(input.const_data_ptr(), operand, bias_data(added), y.mutable_data_ptr(), dtype, m, n, k, execution);
  return y;
}

Tensor gemm_weight_only(const Tensor& x, const Tensor& w, const Tensor& w_scale, std::string w_grid, std::string w_layout,
                        std::optional<Tensor> bias) {
  check(x.dim() == 2, "gemm_weight_only: expected x of shape [m, k], got ", to_text(shape_of(x)));
  return weight_only("gemm_weight_only", x, w, w_scale, parse_grid(w_grid), parse_layout(w_layout), bias);
}

Tensor rotated(const Tensor& x) {
  const int64_t k = x.size(x.dim() - 1);
  const Tensor input = readable(x);
  Tensor output = empty_on(x, shape_of(x), x.scalar_type());
  const Execution execution(x);
  backend::hadamard(input.const_data_ptr(), output.mutable_data_ptr(), real_dtype("linear", "x", x.scalar_type()), product(lead_shape(x)),
                    k, k > 0 ? default_block(k) : 1, execution);
  return output;
}

Tensor linear(const Tensor& x, std::string a_quantizer, const Tensor& w, const Tensor& w_scale, const Tensor& w_sum,
              std::optional<Tensor> w_index, std::string w_quantizer, std::optional<Tensor> bias, std::string prologue_text,
              std::optional<Tensor> norm_weight, double norm_epsilon) {
  const char* op = "linear";
  const Quantizer weight = parse_quantizer(w_quantizer);
  const PrologueArguments prologue{parse_prologue(prologue_text), norm_weight, norm_epsilon};
  check_rank(op, "x", x, 1);
  check_same_device(op, "w", w, "x", x);
  const bool sparse = weight.sparsity == Sparsity::kFourEight;
  check(w_index.has_value() == sparse, op, ": expected w_index ", sparse ? "with" : "only with", " a 4:8 sparse weight, got w_quantizer ",
        w_quantizer, sparse ? " without it" : " and an index");
  if (a_quantizer == "none") {
    check(prologue.kind == PrologueKind::kNone && !norm_weight, op,
          ": expected prologue none and no norm_weight where a_quantizer is none, since a prologue is a part of quantizing x, got ",
          prologue_text, norm_weight ? " and one" : "", "; apply it to x before");
    const GemmOperands plan = plan_operands(weight.grid, nullptr, weight.sparsity);
    check(plan.family == GemmFamily::kWeightOnly, op, ": a weight of ", w_quantizer, " with real activations has no kernel; dequantize it");
    const bool rotate = weight.rotation == Rotation::kHadamard;
    return weight_only(op, rotate ? rotated(x) : x, w, w_scale, weight.grid, plan.w, bias);
  }
  const Quantizer activation = parse_quantizer(a_quantizer);
  check(activation.rotation == weight.rotation, op, ": the rotations of ", a_quantizer, " and ", w_quantizer,
        " differ, so their codes have no common space; dequantize both with output \"original\"");
  check(activation.sparsity == Sparsity::kNone, op, ": expected a dense activation quantizer, got ", a_quantizer);
  const int64_t k = quantized_width(op, x, prologue.kind);
  const Shape lead = lead_shape(x);
  const GemmShape mnk = Execution(x).shape(product(lead), w_scale.numel(), k);
  const GemmOperands plan = plan_operands(weight.grid, &activation.grid, weight.sparsity, &mnk);
  check(plan.family != GemmFamily::kDequantized, op, ": ", a_quantizer, " x ", w_quantizer, " is no product of integers; dequantize both");
  const Tensor flat = torch::stable::reshape(x, Shape{product(lead), x.size(x.dim() - 1)});
  const OperandTensors right(op, "w", w, w_scale, w_sum, w_index, weight.grid, plan.w, k);
  const Quantized quantized = quantize(op, flat, activation, plan.a, /*mask=*/false, prologue);
  const OperandTensors left(op, "x", quantized.codes, quantized.scale, quantized.code_sum, std::nullopt, activation.grid, plan.a, k);
  return integer_gemm(op, plan.family, left, right, k, bias, x, with_last(lead, right.rows()), x.scalar_type());
}

}  // namespace

QUEST_IMPL(m) {
  m.impl("gemm_int8", TORCH_BOX(&gemm_int8));
  m.impl("gemm_int4", TORCH_BOX(&gemm_int4));
  m.impl("gemm_planes", TORCH_BOX(&gemm_planes));
  m.impl("gemm_sparse", TORCH_BOX(&gemm_sparse));
  m.impl("gemm_weight_only", TORCH_BOX(&gemm_weight_only));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace quest::bindings
