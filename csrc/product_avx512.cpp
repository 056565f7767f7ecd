// AVX-512 F: the code is one register, whose permutation reads the low 4 bits of a lane alone.
#if defined(__x86_64__)
#include <immintrin.h>

#include "lanes.h"

namespace fastprompt {
namespace {

struct Code {
  __m512 values;
  explicit Code(const float* code) : values(_mm512_loadu_ps(code)) {}
};

inline Lanes look_up(const Code& code, Ints words, int nibble) {
  const auto index = reinterpret_cast<__m512i>(words >> 4 * nibble);
  return reinterpret_cast<Lanes>(_mm512_permutexvar_ps(index, code.values));
}

}  // namespace
}  // namespace fastprompt

#include "product_blocks.h"

FASTPROMPT_PRODUCT(avx512)
#endif
