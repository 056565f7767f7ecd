// Look-ups of AVX-512 F and BW: the whole table is one register, a look-up is one permutation. In an
// unnamed namespace: see decode_blocks.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "rounding.h"

namespace fastprompt {
namespace {

inline void fill_table(ToBf16, const float* code, float scale, uint16_t* table) {
  const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  const __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_set1_epi32(_mm512_srli_epi32(up, 16), nan, 0x7fc0);
  _mm256_store_si256(reinterpret_cast<__m256i*>(table), _mm512_cvtepi32_epi16(r));
}

inline void fill_table(ToF16, const float* code, float scale, uint16_t* table) {
  const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  const __m256i h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_store_si256(reinterpret_cast<__m256i*>(table), h);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

inline void store(void* p, __m512i v, bool stream) {
  stream ? _mm512_stream_si512(static_cast<__m512i*>(p), v) : _mm512_storeu_si512(p, v);
}

// Both permutations read the low bits of an index alone (4 for floats; 5 for words, whose table
// is therefore doubled), so the low nibble needs no mask: the byte itself is its index.

inline int64_t lookup(const uint8_t* in, int64_t bytes, const float* table, float* out, bool stream) {
  const __m512 t = _mm512_load_ps(table);
  stream = stream && aligned(out);
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m512i v = _mm512_cvtepu8_epi64(b);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(v, 4), _mm512_slli_epi64(v, 32));
    store(out + 2 * i, _mm512_castps_si512(_mm512_permutexvar_ps(index, t)), stream);
  }
  return i;
}

inline int64_t lookup(const uint8_t* in, int64_t bytes, const uint16_t* table, uint16_t* out, bool stream) {
  const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  const __m512i t = _mm512_broadcast_i64x4(half);
  stream = stream && aligned(out);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512i v = _mm512_cvtepu8_epi32(b);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
    store(out + 2 * i, _mm512_permutexvar_epi16(index, t), stream);
  }
  return i;
}

}  // namespace
}  // namespace fastprompt
