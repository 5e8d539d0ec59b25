// Stands in for libtorch_cuda.so at link time where the torch at hand is a CPU build: libquest_ops_cuda needs this one symbol of it. It is
// never installed; at run time the real library, already loaded by a CUDA build of torch, provides the symbol.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t /*device_index*/, void** /*stream*/) { return 1; }
