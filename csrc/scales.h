// Scales of blocks. In an unnamed namespace: see decode_blocks.h.
#pragma once

#include <cstdint>

#include "decode.h"

namespace fastprompt {
namespace {

// Those of blocks [first, first + n), in the buffer [n] or where the weight has them.
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

}  // namespace
}  // namespace fastprompt
