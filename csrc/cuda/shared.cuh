// What both directions of the 4-bit product share: the table of bytes, scales, the sum over warps.
//
// A byte is two weights. A table in shared memory turns it into their codes in the input's dtype,
// with one copy for each bank, so that 32 lanes that look up 32 bytes never wait for one another.
// After the sums the same memory holds them while the warps' parts are added up, always in the same
// order: no atomics.
#pragma once

#include "product.h"

namespace fastprompt {

constexpr int kLanes = 32, kGroup = 64;  // weights of a group share a scale, whatever the blocksize

struct Shared {
  union {
    uint4 quads[256 * kLanes / 4];
    uint32_t table[256 * kLanes];
    float sums[256 * kLanes];
  };
  float code2[256];
};

// Every thread calls it; a __syncthreads() must follow.
template <class T>
__device__ void fill_tables(const CudaProduct& p, Shared& shared) {
  for (int i = threadIdx.x; i < 256 * kLanes / 4; i += blockDim.x) {
    const int byte = i / (kLanes / 4);
    const float high = __ldg(p.code + (byte >> 4)), low = __ldg(p.code + (byte & 15));
    const uint32_t pair = T::pack(high * p.gain, low * p.gain);
    shared.quads[i] = make_uint4(pair, pair, pair, pair);
  }
  if (p.code2)
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.code2[i] = __ldg(p.code2 + i);
}

// The two weights of byte `i` of a word, the first (the high nibble) in the low half.
__device__ inline uint32_t look_up(const Shared& shared, uint32_t word, int i) {
  return shared.table[(word >> 8 * i & 255) * kLanes + threadIdx.x % kLanes];
}

// A group's scale as it is stored, fetched well before it is used; `group` counts through the
// flattened weight.
__device__ inline uint32_t raw_scale(const CudaProduct& p, int group) {
  const int block = group >> p.shift;
  if (p.code2) return __ldg(static_cast<const uint8_t*>(p.absmax) + block);
  return __ldg(static_cast<const uint32_t*>(p.absmax) + block);
}

__device__ inline float scale_of(const CudaProduct& p, const Shared& shared, uint32_t raw, int group) {
  if (!p.code2) return __uint_as_float(raw);
  const float outer = __ldg(p.absmax2 + (group >> p.shift >> p.shift2));
  return shared.code2[raw] * outer + __ldg(p.offset);
}

// Adds up what the warps wrote to shared.sums [warp][tokens of the block][kUnit outputs], and
// writes rows of `width` outputs. Warp w is number w % across side by side, and part w / across.
template <class T, int kTiles, int kWarps, int kUnit>
__device__ void store_sums(const CudaProduct& p, const Shared& shared, int width) {
  static_assert(kWarps * kTiles * 8 * kUnit <= 256 * kLanes, "sums do not fit");
  const int pairs = p.across * kUnit / 2, token0 = blockIdx.y * kTiles * 8;
  const uint32_t* bias = static_cast<const uint32_t*>(p.bias);
  for (int i = threadIdx.x; i < kTiles * 8 * pairs; i += blockDim.x) {
    const int token = i / pairs, first = i % pairs * 2;
    const int out = blockIdx.x * p.across * kUnit + first;
    if (token0 + token >= p.tokens || out >= width) continue;
    float a = 0, b = 0;
    for (int warp = first / kUnit; warp < kWarps; warp += p.across) {
      const float* sums = shared.sums + (warp * kTiles * 8 + token) * kUnit + first % kUnit;
      a += sums[0], b += sums[1];
    }
    a /= p.gain, b /= p.gain;
    if (bias) a += T::first(__ldg(bias + out / 2)), b += T::second(__ldg(bias + out / 2));
    const int64_t at = static_cast<int64_t>(token0 + token) * width + out;
    static_cast<uint32_t*>(p.out)[at / 2] = T::pack(a, b);
  }
}

// Where a token's row of the input begins, in eights of numbers; past the last token the last again,
// whose results nobody stores. An int: few tokens come here.
__device__ inline int input_row(const CudaProduct& p, int token, int width) {
  return (token < p.tokens ? token : p.tokens - 1) * (width / 8);
}

__device__ inline uint4 input(const CudaProduct& p, int eight) {
  return __ldg(static_cast<const uint4*>(p.in) + eight);
}

}  // namespace fastprompt
