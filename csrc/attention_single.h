// Attention of a single query a head against many keys (decoding), which reading the keys bounds:
// they are read once, where they lie, for all query heads that share them. These heads are the lanes
// of a vector, as queries are in attention_blocks.h, which takes what a mask goes with.
#pragma once

#include <cmath>

#include "attention.h"
#include "rounding.h"
#include "scratch.h"
#include "softmax.h"

namespace fastprompt {
namespace {

template <class To>
class Single {  // the work of one thread on some pairs of a sample and a key head
  using T = typename To::T;

 public:
  explicit Single(const Attention& a)
      : a_(a), width_(whole(a.d)), heads_(a.H / a.heads_kv), across_(whole(heads_)) {
    const int64_t rows = heads_ + kDepth, columns = a.d + a.P + a.M + 2;
    works_ = scratch_.reserve(rows * width_ + columns * across_ + 128);
    if (!works_) return;
    q_ = scratch_.take(a.d * across_), scores_ = scratch_.take((a.P + a.M) * across_);
    top_ = scratch_.take(across_), total_ = scratch_.take(across_);
    out_ = scratch_.take(heads_ * width_), rows_ = scratch_.take(kDepth * width_);
  }

  void run(int64_t first, int64_t last) {
    // nothing may be thrown across the threads' runtime
    if (!works_) return __atomic_store_n(a_.out_of_memory, 1, __ATOMIC_RELAXED);
    for (int64_t unit = first; unit < last; ++unit) answer(unit % a_.B, unit / a_.B);
  }

 private:
  struct Some {  // rows as float32 of whole vectors
    const float* data;
    int64_t row;
  };

  static T* at(const Rows& x, int64_t b, int64_t h, int64_t n) {
    return static_cast<T*>(x.data) + b * x.sample + h * x.head + n * x.row;
  }

  // At most kDepth rows from `from` on: where they lie, or a copy.
  Some widened(const T* from, int64_t row, int64_t count) {
    if (sizeof(T) == 4 && a_.d == width_) return {reinterpret_cast<const float*>(from), row};
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t c = 0; c < a_.d; ++c) rows_[n * width_ + c] = To::widen(from[n * row + c]);
      for (int64_t c = a_.d; c < width_; ++c) rows_[n * width_ + c] = 0;
    }
    return {rows_, width_};
  }

  // s [count, across] = k q
  void score(const T* from, int64_t row, int64_t count, float* s) {
    for (int64_t done = 0; done < count; done += kDepth) {
      const int64_t now = least(kDepth, count - done);
      const Some k = widened(from + done * row, row, now);
      float* to = s + done * across_;
      product({k.data, k.row, 1, q_, across_, to, across_}, now, across_, a_.d, false);
    }
  }

  // out [heads, width] += p v, p [count, across]
  void add_values(const T* from, int64_t row, int64_t count, const float* p) {
    for (int64_t done = 0; done < count; done += kDepth) {
      const int64_t now = least(kDepth, count - done);
      const Some v = widened(from + done * row, row, now);
      const float* own = p + done * across_;
      product({own, 1, across_, v.data, v.row, out_, width_}, heads_, width_, now, true);
    }
  }

  void answer(int64_t b, int64_t h_kv) {
    const int64_t set = a_.set_of ? a_.set_of[b] : 0, P = a_.lengths ? a_.lengths[set] : a_.P;
    // the query stands at the last key, and a window ends there
    const int64_t first = a_.window ? most(0, a_.M - a_.window) : 0, tokens = a_.M - first;
    const int64_t h = h_kv * heads_;
    for (int64_t i = 0; i < across_; ++i)
      for (int64_t c = 0; c < a_.d; ++c)
        q_[c * across_ + i] = i < heads_ ? To::widen(at(a_.q, b, h + i, 0)[c]) * a_.scale : 0;
    score(at(a_.prompt_k, set, h_kv, 0), a_.prompt_k.row, P, scores_);
    float* s = scores_ + P * across_;
    score(at(a_.k, b, h_kv, first), a_.k.row, tokens, s);
    if (a_.softcap) cap(scores_, (P + tokens) * across_, a_.softcap);
    for (int64_t j = 0; a_.key_mask && j < tokens; ++j)
      if (!a_.key_mask[b * a_.M + first + j])
        for (int64_t i = 0; i < across_; ++i) s[j * across_ + i] = -kInfinity;

    exponentials(scores_, P + tokens, across_, top_, total_);
    memset(out_, 0, size_t(heads_ * width_) * 4);
    add_values(at(a_.prompt_v, set, h_kv, 0), a_.prompt_v.row, P, scores_);
    add_values(at(a_.v, b, h_kv, first), a_.v.row, tokens, s);
    for (int64_t i = 0; i < heads_; ++i) {
      const float by = total_[i] == 0 ? 0 : 1 / total_[i];  // a NaN stays one
      T* to = at(a_.out, b, h + i, 0);
      for (int64_t c = 0; c < a_.d; ++c) to[c] = To::convert(out_[i * width_ + c] * by);
      a_.lse[b * a_.H + h + i] = total_[i] == 0 ? -kInfinity : top_[i] + logf(total_[i]);
    }
  }

  const Attention& a_;
  const int64_t width_, heads_, across_;
  Scratch scratch_;
  bool works_;
  float *q_, *scores_, *top_, *total_, *out_, *rows_;
};

}  // namespace
}  // namespace fastprompt
