// NEON: the code is 64 bytes, in which one table look-up finds the four bytes of each lane's value.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "lanes.h"

namespace fastprompt {
namespace {

struct Code {
  uint8x16x4_t bytes;
  explicit Code(const float* code) {
    for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(code + 4 * i));
  }
};

inline Lanes look_up(const Code& code, Ints words, int nibble) {
  const Ints first = (words >> 4 * nibble & 15) * 0x04040404 + 0x03020100;
  const auto bytes = reinterpret_cast<uint8x16_t>(first);
  return reinterpret_cast<Lanes>(vqtbl4q_u8(code.bytes, bytes));
}

}  // namespace
}  // namespace fastprompt

#include "product_blocks.h"

FASTPROMPT_PRODUCT(neon)
#endif
