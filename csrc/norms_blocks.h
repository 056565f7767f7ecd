// Norms for every instruction set: see elementwise_blocks.h. A row is read from memory once; the
// passes after the first find it in the first-level cache.
#pragma once

#include "rows.h"

namespace fastprompt {
namespace {

struct Statistics {
  float mean, rstd;
};

template <class T>
inline Statistics statistics(const T* h, const Norm& n) {
  float mean = 0;
  if (n.centers)
    mean = total(sum(n.D, [h](int64_t i, auto how) { return how.get(h + i); })) / float(n.D);
  // not as a difference of means, which far from 0 would lose its digits
  const float square = total(sum(n.D, [=](int64_t i, auto how) {
    const Lanes c = how.only(how.get(h + i) - mean);
    return c * c;
  }));
  return {mean, 1 / __builtin_sqrtf(square / float(n.D) + n.eps)};
}

template <class How>
inline Lanes factor(const Norm& n, int64_t i, How how) {
  return n.weight ? how.get(n.weight + i) + n.offset : splat(1);
}

template <class X, class Y>
inline void norm_rows(const NormForward& n, int64_t first, int64_t last) {
  Walk<2> start(n.axes, {&n.x, &n.residual}, first);
  for (int64_t row = first; row < last; ++row, start.next()) {
    const X* h = at<X>(n.x, start[0]);
    if (const X* r = at<X>(n.residual, start[1])) {
      X* const to = static_cast<X*>(n.total) + row * n.D;
      each(n.D, [=](int64_t i, auto how) { how.put(to + i, how.get(h + i) + how.get(r + i)); });
      h = to;
    }
    const auto [mean, rstd] = statistics(h, n);
    if (n.mean) n.mean[row] = mean;
    n.rstd[row] = rstd;
    Y* const y = static_cast<Y*>(n.y) + row * n.D;
    each(n.D, [=, &n, mean = mean, rstd = rstd](int64_t i, auto how) {
      Lanes z = (how.get(h + i) - mean) * rstd;
      if (n.cast_first) z = rounded<X>(z);
      z *= factor(n, i, how);
      how.put(y + i, n.bias ? z + how.get(n.bias + i) : z);
    });
  }
}

struct Pulls {  // sums of g, and of g times the centred row
  Lanes g, along;
  void operator+=(const Pulls& other) { g += other.g, along += other.along; }
};

// dx = rstd (g - mean(g) - z mean(g z)) + dh, with z = c rstd; mean(g) in a layer norm alone
template <class G, class H, class X>
inline void pull_rows(const NormBackward& n, int64_t first, int64_t last) {
  Walk<3> start(n.axes, {&n.dy, &n.h, &n.dh}, first);
  for (int64_t row = first; row < last; ++row, start.next()) {
    const G* const dy = at<G>(n.dy, start[0]);
    const H* const h = at<H>(n.h, start[1]);
    const X* const dh = at<X>(n.dh, start[2]);
    X* const dx = static_cast<X*>(n.dx) + row * n.D;
    Statistics s{0, 0};
    if (!n.rstd) s = statistics(h, n);
    else s = {n.centers ? n.mean[row] : 0, n.rstd[row]};
    const Pulls pulls = sum(n.D, [=, &n](int64_t i, auto how) {
      const Lanes g = how.get(dy + i) * factor(n, i, how);
      return Pulls{g, g * (how.get(h + i) - s.mean)};
    });
    const float along = total(pulls.along) * s.rstd * s.rstd / float(n.D);
    const float level = n.centers ? total(pulls.g) / float(n.D) : 0;
    each(n.D, [=, &n](int64_t i, auto how) {
      const Lanes g = how.get(dy + i) * factor(n, i, how), c = how.get(h + i) - s.mean;
      const Lanes own = (g - level - c * along) * s.rstd;
      how.put(dx + i, dh ? own + how.get(dh + i) : own);
    });
  }
}

inline void norm(const NormForward& n, int64_t first, int64_t last) {
  with(n.x.dtype, [&](auto x) {
    with(n.y_dtype, [&](auto y) { norm_rows<decltype(x), decltype(y)>(n, first, last); });
  });
}

inline void norm_backward(const NormBackward& n, int64_t first, int64_t last) {
  with(n.dy.dtype, [&](auto g) {
    with(n.h.dtype, [&](auto h) {
      with(n.dx_dtype, [&](auto x) {
        pull_rows<decltype(g), decltype(h), decltype(x)>(n, first, last);
      });
    });
  });
}

}  // namespace
}  // namespace fastprompt
