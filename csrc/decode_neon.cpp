// NEON: a byte look-up (TBL) for each byte plane of the table; the interleaving load splits the
// table into its planes and the interleaving store puts the values together again.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

namespace fastprompt {
namespace {

struct Indices {  // of 32 values, in order
  uint8x16_t part[2];
};

inline Indices indices(const uint8_t* in) {
  const uint8x16_t b = vld1q_u8(in);
  const uint8x16_t first = vshrq_n_u8(b, 4), second = vandq_u8(b, vdupq_n_u8(15));
  return {{vzip1q_u8(first, second), vzip2q_u8(first, second)}};
}

int64_t lookup(const uint8_t* in, int64_t bytes, const float* table, float* out, bool) {
  const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const Indices index = indices(in + i);
    for (int j = 0; j < 2; ++j) {
      uint8x16x4_t v;
      for (int p = 0; p < 4; ++p) v.val[p] = vqtbl1q_u8(planes.val[p], index.part[j]);
      vst4q_u8(reinterpret_cast<uint8_t*>(out + 2 * i + 16 * j), v);
    }
  }
  return i;
}

int64_t lookup(const uint8_t* in, int64_t bytes, const uint16_t* table, uint16_t* out, bool) {
  const uint8x16x2_t planes = vld2q_u8(reinterpret_cast<const uint8_t*>(table));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const Indices index = indices(in + i);
    for (int j = 0; j < 2; ++j) {
      uint8x16x2_t v;
      for (int p = 0; p < 2; ++p) v.val[p] = vqtbl1q_u8(planes.val[p], index.part[j]);
      vst2q_u8(reinterpret_cast<uint8_t*>(out + 2 * i + 16 * j), v);
    }
  }
  return i;
}

}  // namespace
}  // namespace fastprompt

#include "decode_blocks.h"

void fastprompt::decode_neon(const Weight& w, const Output& out, int64_t first, int64_t last) {
  decode_blocks(w, out, first, last);
}
#endif
