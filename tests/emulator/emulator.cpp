// The product kernels of csrc/cuda, run on the host: tests/test_nf4_cuda.py builds and calls it.
#include "device.h"

#include "../../csrc/cuda/backward.cuh"
#include "../../csrc/cuda/forward.cuh"

// 0; 1 where there is no such kernel, or its number of threads is another.
extern "C" int emulate(const char* name, int grid_x, int grid_y, int threads,
                       const int64_t* addresses, const int* sizes, float gain, int reversed) {
  using namespace fastprompt;
  const CudaProduct p = product_of(addresses, sizes, gain);
  void (*kernel)(const CudaProduct&, Shared&) = nullptr;
#define FASTPROMPT_FOUND(known, body, T, tiles, warps) \
  if (!strcmp(name, #known) && threads == 32 * warps) kernel = body<T, tiles, warps>;
  FASTPROMPT_PRODUCT_KERNELS(FASTPROMPT_FOUND)
  if (!kernel) return 1;
  blockDim = {threads, 1};
  __shared__ Shared shared;
  const int blocks = grid_x * grid_y;
  for (int i = 0; i < blocks; ++i) {
    for (float& word : shared.sums) word = NAN;  // nothing of the block before
    for (float& word : shared.code2) word = NAN;
    const int at = reversed ? blocks - 1 - i : i;  // what is another's to write is written wrong
    blockIdx = {at % grid_x, at / grid_x};
    Block block(threads, reversed);
    Block::now = &block;
    block.run([&] { kernel(p, shared); });
  }
  return 0;
}
