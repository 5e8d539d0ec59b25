// One source, two backends. Every bindings/*.cpp that implements operations is compiled twice: into libquest_ops for the CPU, and, with
// QUEST_BACKEND_CUDA defined, into libquest_ops_cuda for CUDA. The two differ only in what this header defines:
//
//   backend::      the namespace whose hadamard, quantize, ... run (quest or quest::cuda)
//   Execution      where they run: torch's thread pool, or the device and current stream of a tensor; and what plan_operands asks of it
//   QUEST_DISPATCH the dispatch key of QUEST_IMPL registrations
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "quest/parallel.h"

#ifdef QUEST_BACKEND_CUDA

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "quest/cuda/gemm.h"
#include "quest/cuda/packing.h"
#include "quest/cuda/quantize.h"
#include "quest/cuda/rotation.h"

#define QUEST_DISPATCH CUDA

namespace quest::bindings {

namespace backend = quest::cuda;

class Execution {
 public:
  explicit Execution(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }
  GemmShape shape(int64_t m, int64_t n, int64_t k) const { return quest::cuda::shape_on_device(m, n, k); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace quest::bindings

#else

#include "quest/gemm.h"
#include "quest/packing.h"
#include "quest/plan.h"
#include "quest/quantize.h"
#include "quest/rotation.h"

#define QUEST_DISPATCH CPU

namespace quest::bindings {

namespace backend = quest;

class Execution {
 public:
  explicit Execution(const torch::stable::Tensor&) {}
  operator ParallelFor() const {
    return [](int64_t begin, int64_t end, int64_t grain, const RangeBody& body) { torch::stable::parallel_for(begin, end, grain, body); };
  }
  GemmShape shape(int64_t m, int64_t n, int64_t k) const { return {m, n, k, 0, 0}; }
};

}  // namespace quest::bindings

#endif

// STABLE_TORCH_LIBRARY_IMPL pastes its arguments, so the key has to be expanded first.
#define QUEST_IMPL_FOR(key, m) STABLE_TORCH_LIBRARY_IMPL(quest, key, m)
#define QUEST_IMPL_EXPAND(key, m) QUEST_IMPL_FOR(key, m)
#define QUEST_IMPL(m) QUEST_IMPL_EXPAND(QUEST_DISPATCH, m)
