// gemm_weight_only of many rows on Hopper: weights that are widened to x's type in registers.
#include <cstring>

#include "common/grid.cuh"
#include "common/wgmma_launch.cuh"

namespace quest::cuda {
namespace {

template <typename Mma, typename Fragments>
void run(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const WgmmaProblem& problem, int64_t k,
         const Device& device, cudaStream_t stream) {
  auto run_tile = [&](auto shape) { launch_wgmma_tile<decltype(shape)>(op, a, w, problem, k, device, stream); };
  if (tile.block_m == 256) return run_tile(WgmmaTile<Mma, Fragments, 256>{});
  tile.block_n == 192 ? run_tile(WgmmaTile<Mma, Fragments, 128, 3>{}) : run_tile(WgmmaTile<Mma, Fragments, 128>{});
}

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace

bool gemm_widened_wgmma(const char* op, const void* x, const Operand& w, const Output& output, int64_t k, const Device& device,
                        cudaStream_t stream) {
  if (!device.hopper_code || !plan_widened(w.grid, w.layout, output.m, output.n, k, device.sm_count)) return false;
  if (!is_aligned(x, 16) || !is_aligned(w.data, 16)) return false;
  const Affine map = affine(w.grid, Layout::kCodes);
  WgmmaProblem problem{};
  problem.output.epilogue.output = output;
  problem.output.epilogue.w_scale = w.scale;
  const Operand a{w.grid, Layout::kCodes, x, nullptr, nullptr, nullptr};  // of which only where it is matters: it is no codes
  const GemmTile tile = plan_widened_tile(output.m, output.n, k, device.sm_count);
  auto run_type = [&](auto mma, auto real) {
    using Mma = decltype(mma);
    using Real = decltype(real);
    auto run_as = [&](auto fragments) { run<Mma, decltype(fragments)>(op, tile, a, w, problem, k, device, stream); };
    auto added = [&](int base) { return static_cast<float>(map.add - base * map.mul); };
    problem.value_mul = pair_of<Real>(static_cast<float>(map.mul));
    problem.value_add = pair_of<Real>(added(RealFragments<Real>::kBase));
    switch (w.layout) {
      case Layout::kPacked: return run_as(RealNibbles<Real>{});
      case Layout::kPlanes:
        return w.grid.bits == 1   ? run_as(RealPlanes<Real, 1>{})
               : w.grid.bits == 2 ? run_as(RealPlanes<Real, 2>{})
                                  : run_as(RealPlanes<Real, 3>{});
      default:
        problem.value_mul = float_bits(static_cast<float>(map.mul));
        problem.value_add = float_bits(added(RealBytes<Real>::kBase));
        return run_as(RealBytes<Real>{});
    }
  };
  output.dtype == DType::kBFloat16 ? run_type(WgmmaBFloat16{}, MmaBFloat16{}) : run_type(WgmmaFloat16{}, MmaFloat16{});
  return true;
}

}  // namespace quest::cuda
