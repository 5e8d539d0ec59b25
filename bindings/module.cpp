// quest._C: importing it loads the operation libraries beside it, which register torch.ops.quest.*. The module itself knows nothing of
// tensors: it tells what was built, what this machine has, and which kernel a problem gets.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <string>
#include <tuple>
#include <vector>

#include "quest/check.h"
#include "quest/gemm.h"
#include "quest/grid.h"
#include "quest/isa.h"
#include "quest/packing.h"
#include "quest/plan.h"
#include "quest/rotation.h"

#ifdef QUEST_HAS_CUDA
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace {

std::filesystem::path library_directory() {
  Dl_info info;
  quest::check(dladdr(reinterpret_cast<const void*>(&library_directory), &info) != 0, "quest._C: cannot find its own path");
  return std::filesystem::absolute(info.dli_fname).parent_path() / "lib";
}

std::string load_library(const char* name) {
  const std::string path = library_directory() / name;
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw py::import_error(
        quest::concat("quest: cannot load ", path, ": ", dlerror(), "; reinstall quest for this torch (2.11 or newer is needed)"));
  }
  return path;
}

std::vector<std::string> load_libraries() {
  const py::object torch = py::module_::import("torch");  // its libraries must be in the process first
  std::vector<std::string> loaded{load_library("libquest_ops.so")};
#ifdef QUEST_HAS_CUDA
  if (!torch.attr("version").attr("cuda").is_none()) loaded.push_back(load_library("libquest_ops_cuda.so"));
#endif
  return loaded;
}

py::dict build_info() {
  py::dict info;
  info["version"] = QUEST_VERSION;
  info["compiler"] = QUEST_COMPILER;
  info["build_type"] = QUEST_BUILD_TYPE;
#ifdef QUEST_HAS_CUDA
  info["cuda"] = QUEST_CUDA_VERSION;
  info["cuda_archs"] = QUEST_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

// One dict per CUDA device that the driver shows; empty without CUDA.
py::list devices() {
  py::list result;
#ifdef QUEST_HAS_CUDA
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return result;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    py::dict entry;
    entry["name"] = std::string(properties.name);
    entry["compute_capability"] = properties.major * 10 + properties.minor;
    entry["sm_count"] = properties.multiProcessorCount;
    entry["l2_bytes"] = properties.l2CacheSize;
    entry["memory_bytes"] = properties.totalGlobalMem;
    result.append(entry);
  }
#endif
  return result;
}

quest::Sparsity parse_sparsity(const std::string& text) {
  if (text == "none") return quest::Sparsity::kNone;
  quest::check(text == "4:8", "plan_operands: expected sparsity \"none\" or \"4:8\", got \"", text, "\"");
  return quest::Sparsity::kFourEight;
}

quest::GemmFamily parse_family(const std::string& text) {
  using quest::GemmFamily;
  for (GemmFamily family : {GemmFamily::kInt8, GemmFamily::kInt4, GemmFamily::kPlanes, GemmFamily::kSparse, GemmFamily::kWeightOnly}) {
    if (to_string(family) == text) return family;
  }
  throw quest::Error(quest::concat(
      "plan_tile: expected family int8, int4, planes, bits (planes of one bit each), sparse or weight_only, got \"", text, "\""));
}

py::dict plan_operands(const std::string& w_grid, const std::optional<std::string>& a_grid, const std::string& sparsity,
                       const std::optional<std::tuple<int64_t, int64_t, int64_t>>& shape, int32_t compute_capability, int32_t sm_count) {
  quest::Grid activation;
  if (a_grid) activation = quest::parse_grid(*a_grid);
  quest::GemmShape mnk{};
  if (shape) mnk = {std::get<0>(*shape), std::get<1>(*shape), std::get<2>(*shape), compute_capability, sm_count};
  const quest::GemmOperands plan =
      quest::plan_operands(quest::parse_grid(w_grid), a_grid ? &activation : nullptr, parse_sparsity(sparsity), shape ? &mnk : nullptr);
  py::dict result;
  result["family"] = to_string(plan.family);
  result["a"] = to_string(plan.a);
  result["w"] = to_string(plan.w);
  result["reason"] = plan.reason;
  return result;
}

py::dict plan_tile(const std::string& family, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count,
                   const std::optional<std::string>& w_grid) {
  quest::check(w_grid.has_value() == (family == "weight_only"), "plan_tile: expected a w_grid for family weight_only alone, got family ",
               family, w_grid ? " with w_grid " + *w_grid : " without");
  const quest::GemmTile tile = family == "bits" ? quest::plan_bits(m, n, k, compute_capability, sm_count)
                               : w_grid         ? quest::plan_weight_only(quest::parse_grid(*w_grid), m, n, k, compute_capability, sm_count)
                                                : quest::plan_tile(parse_family(family), m, n, k, compute_capability, sm_count);
  py::dict result;
  result["kernel"] = tile.kernel;
  result["wgmma"] = tile.wgmma;
  result["block_m"] = tile.block_m;
  result["block_n"] = tile.block_n;
  result["block_k"] = tile.block_k;
  result["cluster"] = tile.cluster;
  result["split_k"] = tile.split_k;
  result["reason"] = tile.reason;
  return result;
}

std::vector<float> grid_levels(const std::string& text) {
  const quest::Grid grid = quest::parse_grid(text);
  std::vector<float> levels;
  for (int32_t code = 0; code < quest::level_count(grid); ++code) levels.push_back(quest::code_level(grid, code));
  return levels;
}

py::object default_bound(const std::string& text) {
  const quest::Quantizer quantizer = quest::parse_quantizer(text);
  switch (quantizer.estimator) {
    case quest::Estimator::kTrust: return py::float_(quest::default_trust(quantizer.grid));
    case quest::Estimator::kClip: return py::float_(quest::default_clip(quantizer));
    case quest::Estimator::kSte: break;
  }
  return py::none();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "quest's operation libraries (loaded on import) and what they know of themselves and of this machine.";
  m.attr("libraries") = load_libraries();
  m.def("build_info", &build_info,
        "What was compiled: version, compiler, build type, CUDA version and architectures (None: a CPU-only build).");
  m.def("devices", &devices,
        "The CUDA devices that the driver shows: name, compute_capability (e.g. 90), sm_count, l2_bytes, memory_bytes.");
  m.def(
      "cpu_isa", [] { return std::string(quest::to_string(quest::cpu_isa())); },
      "Instruction set of the CPU kernels: portable, avx2 or avx512.");
  m.def("int_alpha", &quest::int_alpha, py::arg("bits"), "alpha(b): where the int grid clips, in units of sigma.");
  m.def("grid_levels", &grid_levels, py::arg("grid"), "x-hat / scale of every code of a grid such as \"int4\" or \"fp4\".");
  m.def("default_block", &quest::default_block, py::arg("k"),
        "The Hadamard block of a last dimension k: 128, or the largest power of two that divides k.");
  m.def("default_bound", &default_bound, py::arg("quantizer"),
        "The bound a quantizer string has when it states none: T of trust (sigma), k of clip, None for ste.");
  m.def(
      "max_gemm_depth",
      [](const std::string& a, const std::string& w) { return quest::max_gemm_depth(quest::parse_grid(a), quest::parse_grid(w)); },
      py::arg("a_grid"), py::arg("w_grid"), "The largest K for which the product's exact sum fits int32.");
  m.def(
      "plan_operands", &plan_operands, py::arg("w_grid"), py::arg("a_grid"), py::arg("sparsity") = "none", py::arg("shape") = py::none(),
      py::arg("compute_capability") = 90, py::arg("sm_count") = 132,
      "Family and operand layouts of a product, and why. a_grid None: weight-only. shape: (m, n, k), on which, and on the GPU, the layout "
      "of a may depend.");
  m.def("plan_tile", &plan_tile, py::arg("family"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("compute_capability") = 90,
        py::arg("sm_count") = 132, py::arg("w_grid") = py::none(),
        "CUDA kernel and tile that a problem gets, and why. w_grid: the weight's, such as \"int1\", for family weight_only (and no other), "
        "where the kernel depends on it.");
}
