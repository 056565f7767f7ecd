// Activations for every instruction set: see elementwise_blocks.h.
#pragma once

#include "rows.h"

// A call would pass vectors through memory.
#define FASTPROMPT_INLINE [[gnu::always_inline]] inline

namespace fastprompt {
namespace {

// 1 / x for x from 1 up, to about one unit in the last place: where a quick estimate is at hand
// Newton's steps take half the time of a division.
FASTPROMPT_INLINE Lanes reciprocal(Lanes x) {
#if defined(__AVX512F__)
  const Lanes y = reinterpret_cast<Lanes>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// x, but no further from 0 than `most`; NaN as it is
inline Lanes held(Lanes x, float most) {
  x = x > splat(most) ? splat(most) : x;
  return x < splat(-most) ? splat(-most) : x;
}

// 2^x for x from -126 to 127: of its nearest integer, and a polynomial in the rest (a minimax fit by
// weighted least squares in float64, relative error 7.5e-8).
FASTPROMPT_INLINE Lanes power_of_two(Lanes x) {
  const Lanes magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: the sum's low bits are the exponent
  const Lanes shifted = x + magic, r = x - (shifted - magic);
  Lanes y = r * 0.00132764717f + 0.00967554154f;
  y = y * r + 0.0555071328f;
  y = y * r + 0.240221197f;
  y = y * r + 0.693146967f;
  y = y * r + 1.00000007f;
  return y * reinterpret_cast<Lanes>(reinterpret_cast<Ints>(shifted) << 23);
}

constexpr float kLog2E = 1.44269504f;

struct Active {  // x S(x), and its slope
  Lanes value, slope;
};

// S the logistic sigmoid of a function of x whose slope is `slope`; `power` is minus that function,
// of base 2, and `near` is x, held where 2^power and what is divided by it are normal floats.
FASTPROMPT_INLINE Active sigmoid_of(Lanes x, Lanes near, Lanes power, Lanes slope) {
  const Lanes e = power_of_two(power), share = reciprocal(1.0f + e);
  return {x * share, share + near * slope * (share * (e * share))};
}

// S the normal distribution: S(-a) = e^(-a^2/2) t Q(t), t = 1 / (1 + 0.305 a), for a from 0. Q is a
// minimax fit to erfcx(a / sqrt 2) / (2 t) for a up to 13.3, where float32 ends: relative error
// 9.4e-8, by weighted least squares in float64. The smaller share keeps its own last digit so.
FASTPROMPT_INLINE Active normal(Lanes x) {
  const Lanes near = held(x, 13.2f);
  const Lanes a = reinterpret_cast<Lanes>(reinterpret_cast<Ints>(near) & 0x7fffffff);
  const Lanes t = reciprocal(1.0f + a * 0.305f);
  Lanes q = t * 0.036699215f - 0.152988414f;
  q = q * t + 0.185717071f;
  q = q * t - 0.037976966f;
  q = q * t + 0.121021734f;
  q = q * t + 0.103420858f;
  q = q * t + 0.122466816f;
  q = q * t + 0.121639733f;
  const Lanes bell = power_of_two(a * a * (-0.5f * kLog2E)), small = bell * (t * q);
  const Lanes share = near < Lanes{} ? small : 1.0f - small;
  return {x * share, share + near * bell * 0.39894228f};  // 1 / sqrt(2 pi)
}

template <Kind kind>
FASTPROMPT_INLINE Active active(Lanes x) {
  if (kind == Kind::gelu) return normal(x);
  const Lanes near = held(x, kind == Kind::silu ? 87 : kind == Kind::gelu_quick ? 51 : 9.97f);
  if (kind == Kind::silu) return sigmoid_of(x, near, near * -kLog2E, splat(1));
  if (kind == Kind::gelu_quick) {
    return sigmoid_of(x, near, near * (-1.702f * kLog2E), splat(1.702f));
  }
  constexpr float kTwice = 1.5957691f;  // 2 sqrt(2/pi)
  const Lanes cubic = near * near * (0.044715f * kTwice);
  return sigmoid_of(x, near, near * (cubic * -kLog2E - kTwice * kLog2E), kTwice + 3.0f * cubic);
}

// run(where a row starts in each tensor, the column to begin at, how many): [first, last) in pieces
// of rows.
template <int kTensors, class Run>
inline void stretches(const Activation& a, const Strided* const (&tensors)[kTensors],
                      int64_t first, int64_t last, Run run) {
  Walk<kTensors> start(a.axes, tensors, first / a.columns);
  for (int64_t from = first % a.columns; first < last; from = 0, start.next()) {
    const int64_t count = least(a.columns - from, last - first);
    run(start, from, count);
    first += count;
  }
}

template <class T, Kind kind>
inline void activate_some(const Activation& a, int64_t first, int64_t last) {
  const auto run = [&](const auto& start, int64_t from, int64_t count) {
    const T* const x = at<T>(a.gate, start[0] + from);
    const T* const up = at<T>(a.up, start[1] + from);
    T* const y = at<T>(a.first, start[2] + from);
    each(count, [=](int64_t i, auto how) {
      const Lanes value = active<kind>(how.get(x + i)).value;
      how.put(y + i, up ? value * how.get(up + i) : value);
    });
  };
  stretches<3>(a, {&a.gate, &a.up, &a.first}, first, last, run);
}

template <class T, Kind kind>
inline void pull_some(const Activation& a, int64_t first, int64_t last) {
  const auto run = [&](const auto& start, int64_t from, int64_t count) {
    const T* const dy = at<T>(a.dy, start[0] + from);
    const T* const x = at<T>(a.gate, start[1] + from);
    const T* const up = at<T>(a.up, start[2] + from);
    T* const dx = at<T>(a.first, start[3] + from);
    T* const dup = at<T>(a.second, start[4] + from);
    each(count, [=](int64_t i, auto how) {
      const Lanes pulled = how.get(dy + i);
      const Active made = active<kind>(how.get(x + i));
      const Lanes own = pulled * made.slope;
      if (!up) return how.put(dx + i, own);
      const Lanes result = own * how.get(up + i);
      how.put(dup + i, pulled * made.value);
      how.put(dx + i, result);
    });
  };
  stretches<5>(a, {&a.dy, &a.gate, &a.up, &a.first, &a.second}, first, last, run);
}

template <Kind kind>
inline void activate_as(const Activation& a, int64_t first, int64_t last) {
  with(a.gate.dtype, [&](auto x) {
    if (a.dy.data) pull_some<decltype(x), kind>(a, first, last);
    else activate_some<decltype(x), kind>(a, first, last);
  });
}

inline void activate(const Activation& a, int64_t first, int64_t last) {
  switch (a.kind) {
    case Kind::silu: return activate_as<Kind::silu>(a, first, last);
    case Kind::gelu_tanh: return activate_as<Kind::gelu_tanh>(a, first, last);
    case Kind::gelu: return activate_as<Kind::gelu>(a, first, last);
    case Kind::gelu_quick: return activate_as<Kind::gelu_quick>(a, first, last);
  }
}

}  // namespace
}  // namespace fastprompt
