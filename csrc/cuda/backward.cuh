// dx = dy W for few tokens, straight from the 4 bits: a walk down the rows of the same storage.
//
// A warp makes dxᵀ of one group, 64 columns (four times mma's 16), for 8 tokens a tile, and takes 32
// rows at a time. Lane (g, t) = (lane / 4, lane % 4) reads columns 8 g .. 8 g + 7 (4 bytes) of rows
// 8 t .. 8 t + 7. Byte r holds columns 8 g + 2 r and 8 g + 2 r + 1: rows g and g + 8 of the r-th of
// the four products. mma wants two neighbours of the sum, here rows of W, in a word: two bytes are
// looked up and their halves swapped. Step s of two has rows 8 t + 4 s + {0, 1} where mma has
// 2 t + {0, 1}, and 8 t + 4 s + {2, 3} where mma has 2 t + 8 + {0, 1}.
//
// The scale of a row's group multiplies dy, in float32 before a rounding: that a scaled W would have.
// (In float16 small gradients would lose bits there: those take another way, ops/nf4_linear_cuda.py.)
#pragma once

#include "shared.cuh"

namespace fastprompt {

constexpr int kRows = 32;  // at once

struct BackwardChunk {
  uint32_t words[8], raw[8];  // of rows 8 t .. 8 t + 7
};

__device__ inline void fetch(const CudaProduct& p, int group, int first, BackwardChunk& chunk) {
  if (first >= p.rows) return;
  const int groups = p.columns / kGroup, lane = threadIdx.x % kLanes;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(p.packed);  // 8 a group
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = (first + lane % 4 * 8 + i) * groups + group;
    chunk.words[i] = __ldg(words + static_cast<int64_t>(at) * 8 + lane / 4);
    chunk.raw[i] = raw_scale(p, at);
  }
}

template <class T, int kTiles, int kWarps>
__device__ void backward(const CudaProduct& p, Shared& shared) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / kLanes;
  const int groups = p.columns / kGroup, step = kWarps / p.across * kRows;
  int group = blockIdx.x * p.across + warp % p.across;
  group = group < groups ? group : groups - 1;  // past the last: the last again, not stored
  int dy[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    dy[n] = input_row(p, (blockIdx.y * kTiles + n) * 8 + g, p.rows) + t;

  int first = warp / p.across * kRows;
  BackwardChunk next, chunk;
  fetch(p, group, first, next);
  fill_tables<T>(p, shared);
  __syncthreads();

  float sums[kTiles][4][4] = {};
  for (; first < p.rows; first += step) {
    chunk = next;
    fetch(p, group, first + step, next);
    float scale[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      scale[i] = scale_of(p, shared, chunk.raw[i], (first + 8 * t + i) * groups + group);
    uint32_t b[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 quad = input(p, dy[n] + first / 8);
      const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[n][i] = T::pack(T::first(words[i]) * scale[2 * i], T::second(words[i]) * scale[2 * i + 1]);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t* words = chunk.words + 4 * s;
        const uint32_t u0 = look_up(shared, words[0], r), u1 = look_up(shared, words[1], r);
        const uint32_t u2 = look_up(shared, words[2], r), u3 = look_up(shared, words[3], r);
        const uint32_t a[4] = {__byte_perm(u0, u1, 0x5410), __byte_perm(u0, u1, 0x7632),
                               __byte_perm(u2, u3, 0x5410), __byte_perm(u2, u3, 0x7632)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) T::mma(sums[n][r], a, b[n][2 * s], b[n][2 * s + 1]);
      }
    }
  }

  __syncthreads();  // nobody looks up any more
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float* to = shared.sums + (warp * kTiles * 8 + n * 8 + 2 * t) * kGroup + 8 * g;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[2 * r] = sums[n][r][0], to[2 * r + 1] = sums[n][r][2];  // of token 2 t
      to[kGroup + 2 * r] = sums[n][r][1], to[kGroup + 2 * r + 1] = sums[n][r][3];  // of 2 t + 1
    }
  }
  __syncthreads();
  store_sums<T, kTiles, kWarps, kGroup>(p, shared, p.columns);
}

}  // namespace fastprompt
