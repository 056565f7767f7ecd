// One product with a 4-bit weight on a GPU: what the launcher (csrc/cuda_driver.cpp), the kernels
// and their emulator (tests/emulator/) agree on. Plain C++.
#pragma once

#include <cstdint>

namespace fastprompt {

// Sizes: the weight is [rows, columns], multiples of 64; M tokens. Forward reads x [M, columns] and
// writes y [M, rows]; backward reads dy [M, rows] and writes dx [M, columns]. All rows contiguous.
struct CudaProduct {
  const void* in;         // 16-byte aligned
  void* out;              // 4-byte aligned
  const void* bias;       // [rows] of x's dtype, or null; forward alone
  const uint8_t* packed;  // [rows * columns / 2], the high nibble first; 8-byte aligned
  const float* code;      // [16]
  const void* absmax;     // a scale a block of the flattened weight: float32, or uint8 when nested
  const float* code2;     // [256]; null when plain
  const float* absmax2;   // scale of block b: code2[absmax[b]] * absmax2[b >> shift2] + offset
  const float* offset;    // [1]
  int rows, columns, tokens;
  int shift, shift2;  // log2(blocksize / 64), log2(blocksize2)
  int across;         // warps of a thread block that stand side by side; the others split the sum
  float gain;         // codes are multiplied by it before they are rounded, sums divided by it
};

inline CudaProduct product_of(const int64_t* addresses, const int* sizes, float gain) {
  const auto at = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
  return {at(0),
          at(1),
          at(2),
          static_cast<const uint8_t*>(at(3)),
          static_cast<const float*>(at(4)),
          at(5),
          static_cast<const float*>(at(6)),
          static_cast<const float*>(at(7)),
          static_cast<const float*>(at(8)),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          gain};
}

}  // namespace fastprompt

// Every kernel: its name, its body, 8-token tiles of a thread block, warps of a thread block.
// Fewer warps where their sums would not fit into the shared memory of the table.
#define FASTPROMPT_PRODUCT_KERNELS(X)                 \
  X(nf4_forward_bf16_8, forward, Bf16, 1, 8)          \
  X(nf4_forward_bf16_16, forward, Bf16, 2, 8)         \
  X(nf4_forward_bf16_32, forward, Bf16, 4, 8)         \
  X(nf4_forward_bf16_64, forward, Bf16, 8, 8)         \
  X(nf4_forward_fp16_8, forward, Fp16, 1, 8)          \
  X(nf4_forward_fp16_16, forward, Fp16, 2, 8)         \
  X(nf4_forward_fp16_32, forward, Fp16, 4, 8)         \
  X(nf4_forward_fp16_64, forward, Fp16, 8, 8)         \
  X(nf4_backward_bf16_8, backward, Bf16, 1, 8)        \
  X(nf4_backward_bf16_16, backward, Bf16, 2, 8)       \
  X(nf4_backward_bf16_32, backward, Bf16, 4, 4)
