// Attention of a single query a head against many keys (decoding), which reading the keys bounds:
// they are read once, where they lie, for all query heads that share them.
#pragma once

#include <cmath>

#include "attention.h"
#include "lanes.h"
#include "rounding.h"
#include "scratch.h"

namespace fastprompt {
namespace {

template <class To>
class Single {  // the work of one thread on some pairs of a sample and a key head
  using T = typename To::T;

 public:
  explicit Single(const Attention& a)
      : a_(a), width_(whole(a.d)), groups_(a.H / a.heads_kv), keys_(whole(a.P + a.M)) {
    works_ = scratch_.reserve(2 * groups_ * width_ + groups_ * keys_ + kDepth * width_ + 64);
    if (!works_) return;
    q_ = scratch_.take(groups_ * width_), out_ = scratch_.take(groups_ * width_);
    scores_ = scratch_.take(groups_ * keys_), rows_ = scratch_.take(kDepth * width_);
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
      for (int64_t c = 0; c < a_.d; ++c) rows_[n * width_ + c] = widen(from[n * row + c]);
      for (int64_t c = a_.d; c < width_; ++c) rows_[n * width_ + c] = 0;
    }
    return {rows_, width_};
  }

  // The scores of `count` keys for every query head; `s` is the first head's of the first.
  void score(const T* from, int64_t row, int64_t count, float* s) {
    for (int64_t done = 0; done < count; done += kDepth) {
      const int64_t now = least(kDepth, count - done);
      const Some k = widened(from + done * row, row, now);
      for (int64_t j = 0; j < now; ++j)
        for (int64_t g = 0; g < groups_; ++g) {
          Lanes sum = {};
          for (int64_t c = 0; c < width_; c += kLanes)
            sum += load(q_ + g * width_ + c) * load(k.data + j * k.row + c);
          s[g * keys_ + done + j] = total_of(sum);
        }
    }
  }

  // out += p v of `count` keys
  void add_values(const T* from, int64_t row, int64_t count, const float* p) {
    for (int64_t done = 0; done < count; done += kDepth) {
      const int64_t now = least(kDepth, count - done);
      const Some v = widened(from + done * row, row, now);
      product({p + done, keys_, 1, v.data, v.row, out_, width_}, groups_, width_, now, true);
    }
  }

  void answer(int64_t b, int64_t h_kv) {
    const int64_t set = a_.set_of ? a_.set_of[b] : 0, P = a_.lengths ? a_.lengths[set] : a_.P;
    // the query stands at the last key, and a window ends there
    const int64_t first = a_.window ? most(0, a_.M - a_.window) : 0, tokens = a_.M - first;
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t c = 0; c < width_; ++c) {
        const T* from = at(a_.q, b, h_kv * groups_ + g, 0);
        q_[g * width_ + c] = c < a_.d ? widen(from[c]) * a_.scale : 0;
        out_[g * width_ + c] = 0;
      }
    score(at(a_.prompt_k, set, h_kv, 0), a_.prompt_k.row, P, scores_);
    score(at(a_.k, b, h_kv, first), a_.k.row, tokens, scores_ + P);
    for (int64_t g = 0; g < groups_; ++g) {
      float* s = scores_ + g * keys_;
      for (int64_t j = 0; a_.key_mask && j < tokens; ++j)
        if (!a_.key_mask[b * a_.M + first + j]) s[P + j] = -kInfinity;
      a_.lse[b * a_.H + h_kv * groups_ + g] = weigh(s, P + tokens);
    }
    add_values(at(a_.prompt_v, set, h_kv, 0), a_.prompt_v.row, P, scores_);
    add_values(at(a_.v, b, h_kv, first), a_.v.row, tokens, scores_ + P);
    for (int64_t g = 0; g < groups_; ++g) {
      T* to = at(a_.out, b, h_kv * groups_ + g, 0);
      for (int64_t c = 0; c < a_.d; ++c) to[c] = To::convert(out_[g * width_ + c]);
    }
  }

  // Scores to probabilities, in place. Returns their log-sum-exp.
  float weigh(float* s, int64_t count) {
    const int64_t vectors = whole(count);
    for (int64_t j = count; j < vectors; ++j) s[j] = -kInfinity;
    Lanes best = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < vectors; j += kLanes) best = larger(best, load(s + j));
    float top = best[0];
    for (int i = 1; i < kLanes; ++i) top = top > best[i] ? top : best[i];
    const float base = top > -kInfinity ? top : 0;  // -inf - -inf would be NaN
    for (int64_t j = 0; j < vectors; j += kLanes) {
      const Lanes p = exponential(load(s + j) - base);
      store(s + j, p);
      sum += p;
    }
    const float total = total_of(sum), by = total == 0 ? 0 : 1 / total;  // a NaN stays one
    for (int64_t j = 0; j < vectors; j += kLanes) store(s + j, load(s + j) * by);
    return total == 0 ? -kInfinity : top + logf(total);
  }

  static float total_of(Lanes x) {
    alignas(64) float lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

  const Attention& a_;
  const int64_t width_, groups_, keys_;
  Scratch scratch_;
  bool works_;
  float *q_, *out_, *scores_, *rows_;
};

}  // namespace
}  // namespace fastprompt
