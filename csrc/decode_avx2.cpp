// AVX2: eight floats a register, so a float look-up is two permutations and a choice by bit 3;
// a 16-bit look-up is one byte shuffle for the low bytes and one for the high bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "rounding.h"

namespace fastprompt {
namespace {

// Eight products, rounded to bfloat16 in the low half of each lane.
inline __m256i eight_bf16(const float* code, float scale) {
  const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(scale));
  const __m256i u = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}

inline void fill_table(ToBf16, const float* code, float scale, uint16_t* table) {
  const __m256i both = _mm256_packus_epi32(eight_bf16(code, scale), eight_bf16(code + 8, scale));
  // the packing works within each 128-bit half: put the halves in order
  _mm256_store_si256(reinterpret_cast<__m256i*>(table), _mm256_permute4x64_epi64(both, 0xd8));
}

inline void fill_table(ToF16, const float* code, float scale, uint16_t* table) {
  for (int i = 0; i < 16; i += 8) {
    const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(code + i), _mm256_set1_ps(scale));
    const __m128i h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_store_si128(reinterpret_cast<__m128i*>(table + i), h);
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }

inline void store(void* p, __m256i v, bool stream) {
  const auto to = static_cast<__m256i*>(p);
  stream ? _mm256_stream_si256(to, v) : _mm256_storeu_si256(to, v);
}

int64_t lookup(const uint8_t* in, int64_t bytes, const float* table, float* out, bool stream) {
  stream = stream && aligned(out);
  const __m256 t0 = _mm256_load_ps(table), t1 = _mm256_load_ps(table + 8);
  int64_t i = 0;
  for (; i + 4 <= bytes; i += 4) {
    int32_t four;
    memcpy(&four, in + i, 4);
    const __m256i v = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    // the permutation reads bits 0-2 alone, the choice the sign, so neither needs a mask
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(v, 4), _mm256_slli_epi64(v, 32));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 a = _mm256_permutevar8x32_ps(t0, index);
    const __m256 b = _mm256_permutevar8x32_ps(t1, index);
    store(out + 2 * i, _mm256_castps_si256(_mm256_blendv_ps(a, b, upper)), stream);
  }
  return i;
}

int64_t lookup(const uint8_t* in, int64_t bytes, const uint16_t* table, uint16_t* out, bool stream) {
  stream = stream && aligned(out);
  const __m128i byte = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
  const __m128i t0 = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i t1 = _mm_load_si128(reinterpret_cast<const __m128i*>(table + 8));
  const __m128i low = _mm_packus_epi16(_mm_and_si128(t0, byte), _mm_and_si128(t1, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(t0, 8), _mm_srli_epi16(t1, 8));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m128i first = _mm_and_si128(_mm_srli_epi16(b, 4), nibble);
    const __m128i second = _mm_and_si128(b, nibble);
    const __m128i index[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
    for (int j = 0; j < 2; ++j) {
      const __m128i l = _mm_shuffle_epi8(low, index[j]), h = _mm_shuffle_epi8(high, index[j]);
      const __m256i v = _mm256_set_m128i(_mm_unpackhi_epi8(l, h), _mm_unpacklo_epi8(l, h));
      store(out + 2 * i + 16 * j, v, stream);
    }
  }
  return i;
}

}  // namespace
}  // namespace fastprompt

#include "decode_blocks.h"

void fastprompt::decode_avx2(const Weight& w, const Output& out, int64_t first, int64_t last) {
  decode_blocks(w, out, first, last);
  if (out.stream) _mm_sfence();  // before another thread reads it
}
#endif
