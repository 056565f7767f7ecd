// The softmax of scores [keys, across], whose columns are queries. In an unnamed namespace: see
// decode_blocks.h.
#pragma once

#include "lanes.h"

namespace fastprompt {
namespace {

// s = c tanh(s / c), `count` whole vectors
inline void cap(float* s, int64_t count, float c) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(s + i, hyperbolic_tangent(load(s + i) * (1 / c)) * c);
}

// The slope of that, of what it gave; 0 of what is hidden.
inline Lanes slope(Lanes capped, float c) {
  const Lanes t = capped * (1 / c);
  return capped > splat(-kInfinity) ? 1.0f - t * t : Lanes{};
}

// s = e^(s - top), with the highest score `top` and the sum `total` of each column.
inline void exponentials(float* s, int64_t keys, int64_t across, float* top, float* total) {
  for (int64_t i = 0; i < across; i += kLanes) {
    Lanes best = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < keys; ++j) best = larger(best, load(s + j * across + i));
    const Lanes base = best > splat(-kInfinity) ? best : Lanes{};  // -inf - -inf would be NaN
    for (int64_t j = 0; j < keys;) {
      Lanes part = {};  // thousands of keys in one long float32 sum would be its own error
      for (const int64_t stop = least(j + kDepth, keys); j < stop; ++j) {
        const Lanes p = exponential(load(s + j * across + i) - base);
        store(s + j * across + i, p);
        part += p;
      }
      sum += part;
    }
    store(top + i, best);
    store(total + i, sum);
  }
}

}  // namespace
}  // namespace fastprompt
