// The kernels of FASTPROMPT_PRODUCT_KERNELS by their plain names, for the driver to find. Their
// bounds leave registers for two thread blocks on a multiprocessor: one alone would wait for memory.
#include "device.cuh"

#include "backward.cuh"
#include "forward.cuh"

#define FASTPROMPT_KERNEL(name, body, T, tiles, warps)                                          \
  extern "C" __global__ void __launch_bounds__(warps * 32, 2) name(fastprompt::CudaProduct p) { \
    __shared__ fastprompt::Shared shared;                                                       \
    fastprompt::body<fastprompt::T, tiles, warps>(p, shared);                                   \
  }
FASTPROMPT_PRODUCT_KERNELS(FASTPROMPT_KERNEL)
