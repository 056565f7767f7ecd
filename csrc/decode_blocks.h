// The loop over blocks that every instruction set shares. Each decode_<isa>.cpp defines `lookup`
// and then includes this file, so that all of it is compiled with that file's flags. All is in an
// unnamed namespace and no std template is used: an inline function that two objects share would
// be kept once by the linker, perhaps in the version that this machine cannot run.
//
// A block has 16 distinct values, so the products and the rounding are done 16 times a block, not
// once a weight; what is left for each weight is one look-up in that table.
#pragma once

#include <cstring>

#include "decode.h"
#include "lanes.h"
#include "rounding.h"

namespace fastprompt {
namespace {

constexpr int64_t kChunk = 256;  // blocks whose scales are worked out together

inline const float* scales_of(const Weight& w, int64_t first, int64_t n, float* buffer) {
  if (!w.code2) return static_cast<const float*>(w.absmax) + first;
  const uint8_t* index = static_cast<const uint8_t*>(w.absmax) + first;
  for (int64_t i = 0; i < n;) {
    const int64_t group = (first + i) / w.blocksize2;  // divide once a group, not once a block
    const int64_t group_end = (group + 1) * w.blocksize2 - first;
    const int64_t end = group_end < n ? group_end : n;
    const float scale = w.absmax2[group], offset = *w.offset;
    for (; i < end; ++i) buffer[i] = w.code2[index[i]] * scale + offset;
  }
  return buffer;
}

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

// One row of the weight times a token. The weights pass, unscaled, through a buffer in the
// first-level cache; a scale is applied once, to the sum of its block.
inline float dot(const Weight& w, int64_t row, const float* x, int64_t columns) {
  constexpr int64_t kPiece = 32;
  float scale_buffer[kChunk];
  alignas(64) float code[16], values[kPiece];
  memcpy(code, w.code, sizeof code);
  const int64_t blocks = columns / w.blocksize, first = row * blocks;
  const uint8_t* in = w.packed + row * columns / 2;
  Lanes sum = {};
  for (int64_t at = 0; at < blocks; at += kChunk) {
    const int64_t n = blocks - at < kChunk ? blocks - at : kChunk;
    const float* scales = scales_of(w, first + at, n, scale_buffer);
    for (int64_t b = 0; b < n; ++b) {
      Lanes block = {};
      for (int64_t i = 0; i < w.blocksize; i += kPiece, in += kPiece / 2, x += kPiece) {
        lookup(in, kPiece / 2, code, values, false);
        for (int64_t j = 0; j < kPiece; j += kLanes) block += load(values + j) * load(x + j);
      }
      sum += block * scales[b];
    }
  }
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

inline void multiply_rows(const Weight& w, const Product& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) p.y[row] = dot(w, row, p.x, p.columns);
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
