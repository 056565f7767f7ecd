// AVX-512's bfloat16: one instruction adds 2 products to each of 16 sums, one row of a tile.
#include "product_tiles.h"

#if defined(__AVX512BF16__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

namespace fastprompt {
namespace {

struct Tiles {};  // nothing to set up

inline __m512bh pair_of(const uint16_t* values) {  // in every lane
  int both;
  memcpy(&both, values, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

// One tile of sums, which the registers hold.
inline void multiply_tile(const uint16_t* left, const uint16_t* right, int64_t steps, bool add,
                          float* sums) {
  __m512 rows[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i)
    rows[i] = add ? _mm512_loadu_ps(sums + i * kSide) : _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, left += kTileSize, right += kTileSize)
    for (int64_t pair = 0; pair < kSide; ++pair) {
      const auto of_columns = (__m512bh)_mm512_loadu_si512(right + pair * kDepth);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i)
        rows[i] = _mm512_dpbf16_ps(rows[i], of_columns, pair_of(left + i * kDepth + pair * 2));
    }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) _mm512_storeu_ps(sums + i * kSide, rows[i]);
}

template <bool Two, bool Wide>
void multiply_tiles(Side left, Side right, int64_t steps, bool add, float* sums, int64_t down,
                    int64_t across) {
  for (int64_t r = 0; r < 1 + Wide; ++r)
    for (int64_t l = 0; l < 1 + Two; ++l)
      multiply_tile(left.data + l * left.next, right.data + r * right.next, steps, add,
                    sums + l * down + r * across);
}

}  // namespace
}  // namespace fastprompt

#include "product_panels.h"

namespace fastprompt {
namespace {

bool has_bf16() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;  // the last there is
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bf16);
}

}  // namespace

Multiplier find_bf16() {
  return has_bf16() ? Multiplier{"avx512_bf16", arrange, multiply, true} : Multiplier{};
}

}  // namespace fastprompt
#else
fastprompt::Multiplier fastprompt::find_bf16() { return {}; }
#endif
