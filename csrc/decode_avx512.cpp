#if defined(__x86_64__)
#include "lookup_avx512.h"

#include "decode_blocks.h"

void fastprompt::decode_avx512(const Weight& w, const Output& out, int64_t first, int64_t last) {
  decode_blocks(w, out, first, last);
  if (out.stream) _mm_sfence();  // before another thread reads it
}
#endif
