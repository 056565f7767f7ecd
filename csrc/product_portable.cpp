// For any CPU.
#include "lanes.h"

namespace fastprompt {
namespace {

struct Code {
  const float* values;
  explicit Code(const float* code) : values(code) {}
};

inline Lanes look_up(const Code& code, Ints words, int nibble) {
  Lanes found;
  for (int i = 0; i < kLanes; ++i) found[i] = code.values[words[i] >> 4 * nibble & 15];
  return found;
}

}  // namespace
}  // namespace fastprompt

#include "product_blocks.h"

FASTPROMPT_PRODUCT(portable)
