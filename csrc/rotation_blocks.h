// Rotation of queries and keys for every instruction set: see elementwise_blocks.h.
#pragma once

#include "rows.h"

namespace fastprompt {
namespace {

// The heads of one token. Both of a pair are read before either is written.
template <class T, class A>
inline void turn_heads(const Rotation& t, const Heads& of, int64_t b, int64_t n, const A* cos,
                       const A* sin) {
  const int64_t half = t.r / 2;
  const T* x = static_cast<const T*>(of.x) + b * of.x_strides[0] + n * of.x_strides[2];
  T* y = static_cast<T*>(of.y) + b * of.y_strides[0] + n * of.y_strides[2];
  for (int64_t head = 0; head < of.heads; ++head, x += of.x_strides[1], y += of.y_strides[1]) {
    each(half, [=, &t](int64_t i, auto how) {
      const Lanes low = how.get(x + i), high = how.get(x + half + i);
      Lanes s1 = how.get(sin + i), s2 = how.get(sin + half + i);
      if (t.back) {
        const Lanes swapped = -s1;
        s1 = -s2, s2 = swapped;
      }
      how.put(y + i, low * how.get(cos + i) - high * s1);
      how.put(y + half + i, high * how.get(cos + half + i) + low * s2);
    });
    if (x != y) memcpy(y + t.r, x + t.r, (t.d - t.r) * sizeof(T));
  }
}

inline void rotate(const Rotation& t, int64_t first, int64_t last) {
  with(t.dtype, [&](auto x) {
    with(t.angles, [&](auto angle) {
      using A = decltype(angle);
      for (int64_t token = first; token < last; ++token) {
        const int64_t b = token / t.N, n = token % t.N;
        const A* c = static_cast<const A*>(t.cos) + b * t.cos_strides[0] + n * t.cos_strides[1];
        const A* s = static_cast<const A*>(t.sin) + b * t.sin_strides[0] + n * t.sin_strides[1];
        for (const Heads& of : t.of) turn_heads<decltype(x)>(t, of, b, n, c, s);
      }
    });
  });
}

}  // namespace
}  // namespace fastprompt
