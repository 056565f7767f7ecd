// Decoding of bitsandbytes' 4-bit storage on the CPU.
//
// Two values a byte, the high nibble first; value = code[nibble] * scale of its block, where
//   plain:   scale[b] = absmax[b]
//   nested:  scale[b] = code2[absmax_u8[b]] * absmax2[b / blocksize2] + offset
// in float32, each operation rounded once, then one rounding to the output's dtype.
#pragma once

#include <cstdint>

namespace fastprompt {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Weight {
  const uint8_t* packed;  // [(numel + 1) / 2]
  const float* code;      // [16]
  const void* absmax;     // [blocks] float32, or uint8 when nested
  const float* code2;     // [256], null when plain
  const float* absmax2;   // [(blocks + blocksize2 - 1) / blocksize2]
  const float* offset;    // [1]
  int64_t blocksize, blocksize2, numel;

  int64_t blocks() const { return (numel + blocksize - 1) / blocksize; }
};

struct Output {
  void* data;  // the whole weight, row by row
  Dtype dtype;
  bool stream;  // write past the caches
};

// Decodes blocks [first, last) to their place in the output.
using DecodeBlocks = void (*)(const Weight&, const Output&, int64_t first, int64_t last);

#define FASTPROMPT_VARIANT(isa) \
  void decode_##isa(const Weight&, const Output&, int64_t, int64_t);
FASTPROMPT_VARIANT(portable)
FASTPROMPT_VARIANT(avx2)
FASTPROMPT_VARIANT(avx512)
FASTPROMPT_VARIANT(neon)
#undef FASTPROMPT_VARIANT

}  // namespace fastprompt
