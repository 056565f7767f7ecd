// For any CPU: what the other variants are tested against.
#include <cstdint>

namespace fastprompt {
namespace {

// Decodes up to `bytes` bytes (two values each) through `table`; returns how many it did.
template <class T>
int64_t lookup(const uint8_t* in, int64_t bytes, const T* table, T* out, bool) {
  for (int64_t i = 0; i < bytes; ++i) {
    out[2 * i] = table[in[i] >> 4];
    out[2 * i + 1] = table[in[i] & 15];
  }
  return bytes;
}

}  // namespace
}  // namespace fastprompt

#include "decode_blocks.h"

void fastprompt::decode_portable(const Weight& w, const Output& out, int64_t first, int64_t last) {
  decode_blocks(w, out, first, last);
}
