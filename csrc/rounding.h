// From float32 to another dtype, to nearest even, and back. In an unnamed namespace: see
// decode_blocks.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastprompt {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

struct ToF32 {
  using T = float;
  static T convert(float x) { return x; }
  static float widen(T x) { return x; }
};

struct ToBf16 {  // to nearest even
  using T = uint16_t;
  static T convert(float x) {
    const uint32_t u = bits_of(x);
    return x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  static float widen(T x) { return float_of(uint32_t(x) << 16); }
};

struct ToF16 {  // to nearest even, without a branch so that the compiler vectorises it (M. Dukhan's)
  using T = uint16_t;
  static T convert(float x) {
    const uint32_t u = bits_of(x), twice = u + u;
    const float magnitude = (float_of(u & 0x7fffffff) * 0x1p+112f) * 0x1p-110f;
    const uint32_t exponent = twice & 0xff000000;
    const uint32_t bias = exponent < 0x71000000 ? 0x71000000 : exponent;
    const uint32_t r = bits_of(float_of((bias >> 1) + 0x07800000) + magnitude);
    const uint32_t finite = ((r >> 13) & 0x7c00) + (r & 0x0fff);
    return uint16_t((u >> 16 & 0x8000) | (twice > 0xff000000 ? 0x7e00 : finite));
  }
  static float widen(T x) {
    const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
    // less denormal by 2^112, or else infinite or NaN
    const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 | magnitude : 0;
    const uint32_t bits = special ? special : bits_of(float_of(magnitude) * 0x1p+112f);
    return float_of(bits | uint32_t(x & 0x8000) << 16);
  }
};

// table[i] = code[i] * scale, rounded; an instruction set may overload it for one of the three.
template <class To>
inline void fill_table(To, const float* code, float scale, typename To::T* table) {
  for (int i = 0; i < 16; ++i) table[i] = To::convert(code[i] * scale);
}

}  // namespace
}  // namespace fastprompt
