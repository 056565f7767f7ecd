// AVX2: the code is two registers; bits 0-2 of a lane permute both, and bit 3 chooses.
#if defined(__x86_64__)
#include <immintrin.h>

#include "lanes.h"

namespace fastprompt {
namespace {

struct Code {
  __m256 low, high;
  explicit Code(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
};

inline Lanes look_up(const Code& code, Ints words, int nibble) {
  const auto index = reinterpret_cast<__m256i>(words >> 4 * nibble);
  const auto upper = reinterpret_cast<__m256>(words << (28 - 4 * nibble));  // by its sign
  const __m256 low = _mm256_permutevar8x32_ps(code.low, index);
  const __m256 high = _mm256_permutevar8x32_ps(code.high, index);
  return reinterpret_cast<Lanes>(_mm256_blendv_ps(low, high, upper));
}

}  // namespace
}  // namespace fastprompt

#include "product_blocks.h"

FASTPROMPT_PRODUCT(avx2)
#endif
