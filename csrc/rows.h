// Rows of float32 or bfloat16 numbers as float32 vectors, and where the rows of strided tensors
// begin. In an unnamed namespace, with nothing of std: see decode_blocks.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elementwise.h"
#include "lanes.h"
#include "rounding.h"

namespace fastprompt {
namespace {

using bf16 = uint16_t;
typedef bf16 Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Lanes read(const float* x) { return load(x); }
inline Lanes read(const bf16* x) {
#if defined(__AVX512F__)  // one instruction; GCC's own conversion is four
  const __m512i wide = _mm512_cvtepu16_epi32(*reinterpret_cast<const __m256i_u*>(x));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(*reinterpret_cast<const __m128i_u*>(x));
#else
  const Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words);
#endif
  return reinterpret_cast<Lanes>(reinterpret_cast<Words>(wide) << 16);
}

// The bits of x rounded to bfloat16, to nearest even.
inline Words rounded_bits(Lanes x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? Words{} + 0x7fc0 : nearest;
}

inline void write(float* to, Lanes x) { store(to, x); }
inline void write(bf16* to, Lanes x) {
#if defined(__AVX512F__)
  *reinterpret_cast<__m256i_u*>(to) =
      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded_bits(x)));
#else
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded_bits(x), Halves);
#endif
}

// x as a T has it
template <class T>
inline Lanes rounded(Lanes x);
template <>
inline Lanes rounded<float>(Lanes x) { return x; }
template <>
inline Lanes rounded<bf16>(Lanes x) { return reinterpret_cast<Lanes>(rounded_bits(x) << 16); }

// How a vector is read and written: whole, or the first few of it, the rest 0.
struct Whole {
  template <class T>
  Lanes get(const T* x) const { return read(x); }
  template <class T>
  void put(T* to, Lanes x) const { write(to, x); }
  Lanes only(Lanes x) const { return x; }
};

struct Some {
  int64_t count;
  template <class T>
  Lanes get(const T* x) const {
    T own[kLanes] = {};
    memcpy(own, x, count * sizeof(T));
    return read(own);
  }
  template <class T>
  void put(T* to, Lanes x) const {
    T own[kLanes];
    write(own, x);
    memcpy(to, own, count * sizeof(T));
  }
  Lanes only(Lanes x) const {  // the others 0
    for (int64_t i = count; i < kLanes; ++i) x[i] = 0;
    return x;
  }
};

// use(i, how) for the vectors of `count` elements
template <class Use>
inline void each(int64_t count, Use use) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) use(i, Whole());
  if (i < count) use(i, Some{count - i});
}

// The sum of use(i, how) over the vectors of `count` elements.
// Two sums at a time, since an addition waits for the one before it.
template <class Use>
inline auto sum(int64_t count, Use use) {
  decltype(use(0, Whole())) even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    even += use(i, Whole()), odd += use(i + kLanes, Whole());
  each(count - i, [&](int64_t j, auto how) { even += use(i + j, how); });
  even += odd;
  return even;
}

// run(a number of the type that `dtype` is)
template <class Run>
inline void with(Dtype dtype, Run run) {
  if (dtype == Dtype::f32) run(float()); else run(bf16());
}

template <class T>
inline T* at(const Strided& x, int64_t offset) {
  return x.data ? static_cast<T*>(const_cast<void*>(x.data)) + offset : nullptr;
}

// Where row after row begins, from a given one on, in each of some tensors.
template <int kTensors>
class Walk {
 public:
  Walk(const Axes& axes, const Strided* const (&tensors)[kTensors], int64_t row) : axes_(axes) {
    for (int t = 0; t < kTensors; ++t) strides_[t] = tensors[t]->strides;
    for (int axis = axes.count - 1; axis >= 0; --axis) {
      index_[axis] = row % axes.sizes[axis], row /= axes.sizes[axis];
      move(axis, index_[axis]);
    }
  }
  int64_t operator[](int tensor) const { return at_[tensor]; }
  void next() {
    for (int axis = axes_.count - 1; axis >= 0; --axis) {
      move(axis, 1);
      if (++index_[axis] < axes_.sizes[axis]) return;
      move(axis, -index_[axis]);
      index_[axis] = 0;
    }
  }

 private:
  void move(int axis, int64_t steps) {
    for (int t = 0; t < kTensors; ++t) at_[t] += steps * strides_[t][axis];
  }
  const Axes& axes_;
  const int64_t* strides_[kTensors];
  int64_t index_[kMostAxes], at_[kTensors] = {};
};

}  // namespace
}  // namespace fastprompt
