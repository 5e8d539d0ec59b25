// The schemas of torch.ops.quest.*: functional, no argument is mutated or aliased. Fakes and gradients are registered in
// python/quest/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(quest, m) {
  m.def("hadamard(Tensor x, int? block=None) -> Tensor");
  m.def(
      "quantize(Tensor x, str quantizer, str layout=\"codes\", bool mask=True, str prologue=\"none\", Tensor? norm_weight=None,"
      " float norm_epsilon=0.0)"
      " -> (Tensor codes, Tensor scale, Tensor code_sum, Tensor mask, Tensor index)");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor? index, str quantizer, str layout, int k, ScalarType dtype) -> Tensor");
  m.def("quantize_backward(Tensor grad, Tensor mask, str quantizer) -> Tensor");
  m.def("pack(Tensor codes, str grid, str layout) -> Tensor");
  m.def("unpack(Tensor packed, str grid, str layout, int k) -> Tensor");
  for (const char* family : {"gemm_int8", "gemm_int4", "gemm_planes"}) {
    const std::string schema =
        std::string(family) +
        "(Tensor a, Tensor a_scale, Tensor a_sum, str a_grid, Tensor w, Tensor w_scale, Tensor w_sum, str w_grid, int k,"
        " Tensor? bias, ScalarType dtype, str a_layout=\"\") -> Tensor";
    m.def(schema.c_str());
  }
  m.def(
      "gemm_sparse(Tensor a, Tensor a_scale, Tensor a_sum, str a_grid, Tensor w, Tensor w_scale, Tensor w_sum, Tensor w_index, str w_grid, "
      "int k,"
      " Tensor? bias, ScalarType dtype, str a_layout=\"\") -> Tensor");
  m.def("gemm_weight_only(Tensor x, Tensor w, Tensor w_scale, str w_grid, str w_layout, Tensor? bias) -> Tensor");
  m.def(
      "linear(Tensor x, str a_quantizer, Tensor w, Tensor w_scale, Tensor w_sum, Tensor? w_index, str w_quantizer, Tensor? bias,"
      " str prologue=\"none\", Tensor? norm_weight=None, float norm_epsilon=0.0) -> Tensor");
}
