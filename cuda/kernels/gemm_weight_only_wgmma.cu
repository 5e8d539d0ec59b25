// gemm_weight_only of few rows on Hopper: the kernel that makes fixed-point numbers of x.
#include "common/gemm_fixed.cuh"
#include "common/wgmma_products.h"

namespace quest::cuda {
namespace {

template <typename W>
void run(const char* op, const Operand& w, const FixedProblem& problem, const FixedPlan& plan, cudaStream_t stream) {
  auto run_type = [&](auto type) {
    using Mma = decltype(type);
    if constexpr (W::kByBits) {
      switch (plan.rows) {
        case 1: return launch_fixed<Mma, W, 1>(op, w, problem, plan, stream);
        case 2: return launch_fixed<Mma, W, 2>(op, w, problem, plan, stream);
        case 4: return launch_fixed<Mma, W, 4>(op, w, problem, plan, stream);
      }
    }
    plan.rows == 8 ? launch_fixed<Mma, W, 8>(op, w, problem, plan, stream) : launch_fixed<Mma, W, 16>(op, w, problem, plan, stream);
  };
  problem.output.dtype == DType::kBFloat16 ? run_type(MmaBFloat16{}) : run_type(MmaFloat16{});
}

}  // namespace

bool gemm_weight_only_wgmma(const char* op, const void* x, const Operand& w, const Output& output, int64_t k, const Device& device,
                            cudaStream_t stream) {
  const bool fp4 = is_fp4(w);
  if (!device.hopper_code || !plan_fixed(w.grid, w.layout, output.m, output.n, k)) return false;
  if (!is_aligned(x, 16) || !is_aligned(w.data, 16)) return false;
  FixedProblem problem{};
  problem.x = static_cast<const uint8_t*>(x);
  problem.k = static_cast<int32_t>(k);
  problem.output = output;
  problem.w_scale = w.scale;
  if (fp4) {
    problem.mul = 1;
    problem.table = value_table(w.grid);
  } else {
    const Affine map = affine(w.grid, Layout::kCodes);
    const bool flips = w.grid.bits == 8;  // u = c - 128
    problem.mul = static_cast<uint32_t>(map.mul);
    problem.add = static_cast<uint32_t>(map.add + (flips ? 128 * map.mul : 0));
    problem.flip = flips ? 0x80808080u : 0;
    problem.spare_bits = flips ? 1 : 0;  // 255 x 2^15 x 512 would be too large
  }
  const FixedPlan plan = plan_fixed_split(w.grid, w.layout, output.m, output.n, k, device.sm_count);
  auto run_as = [&](auto codes) { run<decltype(codes)>(op, w, problem, plan, stream); };
  switch (w.layout) {
    case Layout::kPacked: fp4 ? run_as(FixedTable{}) : run_as(FixedNibbles{}); break;
    case Layout::kPlanes: w.grid.bits == 1 ? run_as(FixedBit{}) : w.grid.bits == 2 ? run_as(FixedBits<2>{}) : run_as(FixedBits<3>{}); break;
    default: run_as(FixedBytes{});
  }
  return true;
}

}  // namespace quest::cuda
