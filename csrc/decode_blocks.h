// The loop over blocks that every instruction set shares. Each decode_<isa>.cpp defines `lookup`
// and then includes this file, so that all of it is compiled with that file's flags. All is in an
// unnamed namespace and no std template is used: an inline function that two objects share would
// be kept once by the linker, perhaps in the version that this machine cannot run.
//
// A block has 16 distinct values, so the products and the rounding are done 16 times a block, not
// once a weight; what is left for each weight is one look-up in that table.
#pragma once

#include "decode.h"
#include "rounding.h"
#include "scales.h"

namespace fastprompt {
namespace {

constexpr int64_t kChunk = 256;  // blocks whose scales are worked out together

template <class To>
void decode_one(const Weight& w, int64_t block, float scale, typename To::T* out, bool stream) {
  alignas(64) typename To::T table[16];
  fill_table(To(), w.code, scale, table);

  int64_t i = block * w.blocksize;
  const int64_t full = i + w.blocksize, end = full < w.numel ? full : w.numel;
  if (i & 1) {  // an odd blocksize can begin inside a byte
    out[i] = table[w.packed[i >> 1] & 15];
    ++i;
  }
  i += 2 * lookup(w.packed + i / 2, (end - i) / 2, table, out + i, stream);
  for (; i < end; ++i) out[i] = table[w.packed[i >> 1] >> (i & 1 ? 0 : 4) & 15];
}

template <class To>
void decode_chunks(const Weight& w, const Output& out, int64_t first, int64_t last) {
  const auto data = static_cast<typename To::T*>(out.data);
  float buffer[kChunk];
  for (int64_t at = first; at < last; at += kChunk) {
    const int64_t n = last - at < kChunk ? last - at : kChunk;
    const float* scales = scales_of(w, at, n, buffer);
    for (int64_t b = 0; b < n; ++b) decode_one<To>(w, at + b, scales[b], data, out.stream);
  }
}

inline void decode_blocks(const Weight& w, const Output& out, int64_t first, int64_t last) {
  switch (out.dtype) {
    case Dtype::f32: return decode_chunks<ToF32>(w, out, first, last);
    case Dtype::bf16: return decode_chunks<ToBf16>(w, out, first, last);
    case Dtype::f16: return decode_chunks<ToF16>(w, out, first, last);
  }
}

}  // namespace
}  // namespace fastprompt
