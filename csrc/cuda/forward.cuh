// y = x Wᵀ + b for few tokens, straight from the 4 bits.
//
// A warp makes yᵀ of 16 rows of W (mma's 16) for 8 tokens (mma's 8) a tile. The order in which mma
// takes the 64 columns of a group is ours to choose, as long as both operands have the same: lane
// (g, t) = (lane / 4, lane % 4) takes columns 16 t .. 16 t + 15, so that its weights are 8 bytes and
// its x 32 bytes in a row. Step s of four has columns 16 t + 4 s + {0, 1} where mma has 2 t + {0, 1}
// and 16 t + 4 s + {2, 3} where mma has 2 t + 8 + {0, 1}.
//
// The scale of a group multiplies its sum in float32. Warps of a thread block split the columns.
#pragma once

#include "shared.cuh"

namespace fastprompt {

template <int kGroups>
struct ForwardChunk {  // groups that a warp takes at once: four are a cache line of each row
  uint2 low[kGroups], high[kGroups];  // bytes of rows g and g + 8
  uint32_t raw_low[kGroups], raw_high[kGroups];
};

// Groups from `first` on of rows `row` and `row + 8`, as far as there are any.
template <int kGroups>
__device__ void fetch(const CudaProduct& p, int row, int first, ForwardChunk<kGroups>& chunk) {
  const int groups = p.columns / kGroup, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (first + i >= groups) return;
    const int low = row * groups + first + i, high = low + 8 * groups;
    const uint2* bytes = reinterpret_cast<const uint2*>(p.packed);  // 4 a group
    chunk.low[i] = __ldg(bytes + static_cast<int64_t>(low) * 4 + t);
    chunk.high[i] = __ldg(bytes + static_cast<int64_t>(high) * 4 + t);
    chunk.raw_low[i] = raw_scale(p, low);
    chunk.raw_high[i] = raw_scale(p, high);
  }
}

template <class T, int kTiles, int kWarps>
__device__ void forward(const CudaProduct& p, Shared& shared) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / kLanes;
  constexpr int kGroups = kTiles < 8 ? 4 : 2;  // what registers are left for
  const int groups = p.columns / kGroup, step = kWarps / p.across * kGroups;
  const int row = (blockIdx.x * p.across + warp % p.across) * 16 + g;
  int x[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    x[n] = input_row(p, (blockIdx.y * kTiles + n) * 8 + g, p.columns) + 2 * t;

  int first = warp / p.across * kGroups;
  ForwardChunk<kGroups> next, chunk;
  fetch(p, row, first, next);
  fill_tables<T>(p, shared);
  __syncthreads();

  float sums[kTiles][4] = {};
  for (; first < groups; first += step) {
    chunk = next;
    fetch(p, row, first + step, next);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = first + i;
      if (group >= groups) break;
      uint32_t a[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t low = s < 2 ? chunk.low[i].x : chunk.low[i].y;
        const uint32_t high = s < 2 ? chunk.high[i].x : chunk.high[i].y;
        a[s][0] = look_up(shared, low, s % 2 * 2), a[s][1] = look_up(shared, high, s % 2 * 2);
        a[s][2] = look_up(shared, low, s % 2 * 2 + 1);
        a[s][3] = look_up(shared, high, s % 2 * 2 + 1);
      }
      const int at = row * groups + group;
      const float low = scale_of(p, shared, chunk.raw_low[i], at);
      const float high = scale_of(p, shared, chunk.raw_high[i], at + 8 * groups);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 b = input(p, x[n] + group * 8), c = input(p, x[n] + group * 8 + 1);
        float d[4] = {};
        T::mma(d, a[0], b.x, b.y);
        T::mma(d, a[1], b.z, b.w);
        T::mma(d, a[2], c.x, c.y);
        T::mma(d, a[3], c.z, c.w);
        sums[n][0] += d[0] * low, sums[n][1] += d[1] * low;
        sums[n][2] += d[2] * high, sums[n][3] += d[3] * high;
      }
    }
  }

  __syncthreads();  // nobody looks up any more
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float* to = shared.sums + (warp * kTiles * 8 + n * 8 + 2 * t) * 16 + g;
    to[0] = sums[n][0], to[16] = sums[n][1];  // row g of tokens 2 t and 2 t + 1
    to[8] = sums[n][2], to[24] = sums[n][3];  // row g + 8
  }
  __syncthreads();
  store_sums<T, kTiles, kWarps, 16>(p, shared, p.rows);
}

}  // namespace fastprompt
