// What the kernels need of a card beyond C++: number formats, and mma.sync m16n8k16. The emulator
// (tests/emulator/device.h) has the same names for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastprompt {

#define FASTPROMPT_MMA(kind)                                                                  \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind                                  \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// Pairs of numbers in a word, the first in the low half.
struct Bf16 {
  static __device__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float first(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ float second(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  // d [16, 8] += a [16, 16] b [16, 8], spread over a warp as PTX's manual says
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FASTPROMPT_MMA("bf16");
  }
};

struct Fp16 {
  static __device__ uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float first(uint32_t pair) {
    return __low2float(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ float second(uint32_t pair) {
    return __high2float(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FASTPROMPT_MMA("f16");
  }
};
#undef FASTPROMPT_MMA

}  // namespace fastprompt
