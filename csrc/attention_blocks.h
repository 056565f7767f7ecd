// Attention of some queries at a time, for every instruction set: each attention_<isa>.cpp includes
// this file, so that all of it is compiled with that file's flags (see decode_blocks.h).
//
// Scores are kept transposed, [keys, queries]: queries are the lanes of a vector, so that maxima,
// sums and masks are vertical, and rows of keys and values serve `product` as they are, untransposed.
#pragma once

#include <cfloat>
#include <cmath>

#include "attention_single.h"
#include "softmax.h"

namespace fastprompt {
namespace {

constexpr int64_t kBlock = 64;  // queries at once

// One float32 row after another, as a factor wants them.
struct Matrix {
  float* data;
  int64_t row;
};

// Prompts or tokens: keys, values and what is added up for them.
struct Keys {
  Matrix k, v, dk, dv;  // dk.data null: not asked
  int64_t count;
};

template <class To>
class Unit {  // the work of one thread on some pairs of a sample and a key head
  using T = typename To::T;

 public:
  Unit(const Attention& a, bool backward) : a_(a), width_(whole(a.d)), backward_(backward) {
    const int64_t keys = a.P + a.M;
    block_ = keys > 8192 ? 16 : keys > 2048 ? 32 : kBlock;
    const int64_t vectors = (a.N + kLanes - 1) / kLanes, per = block_ / kLanes;
    const int64_t blocks = (vectors + per - 1) / per;
    step_ = blocks ? (vectors + blocks - 1) / blocks * kLanes : kLanes;  // blocks of one size
    works_ = scratch_.reserve(4 * (keys + 32) * width_ + 7 * block_ * (width_ + 16) +
                              2 * (keys + 1) * block_ + 4 * block_ + 1024);
  }

  void run(int64_t part, int64_t first, int64_t last) {
    // nothing may be thrown across the threads' runtime
    if (!works_) return __atomic_store_n(a_.out_of_memory, 1, __ATOMIC_RELAXED);
    Matrix dk = {}, dv = {};
    if (a_.dprompt) dk = sums(a_.P), dv = sums(a_.P);
    float* start = scratch_.mark();
    for (int64_t unit = first; unit < last; ++unit, scratch_.release(start)) {
      const int64_t h_kv = unit / a_.B, b = unit % a_.B;  // a share meets few key heads
      const int64_t set = set_of(b);
      P_ = a_.lengths ? a_.lengths[set] : a_.P;
      prompts_ = keys(a_.prompt_k, a_.prompt_v, set, h_kv, P_);
      prompts_.dk = dk, prompts_.dv = dv;
      // the prompts' gradients alone look at no token's key
      tokens_ = keys(a_.k, a_.v, b, h_kv, backward_ && !a_.tokens ? 0 : a_.M);
      if (a_.tokens) tokens_.dk = sums(a_.M), tokens_.dv = sums(a_.M);
      const int64_t groups = a_.H / a_.heads_kv;
      for (int64_t h = h_kv * groups; h < (h_kv + 1) * groups; ++h)
        for (int64_t n = 0; n < a_.N; n += step_) {
          float* mark = scratch_.mark();
          const int64_t end = least(n + step_, a_.N);
          backward_ ? differentiate(b, h, n, end) : answer(b, h, n, end);
          scratch_.release(mark);
        }
      if (a_.tokens) {
        write(a_.dk, b, h_kv, 0, a_.M, tokens_.dk.data);
        write(a_.dv, b, h_kv, 0, a_.M, tokens_.dv.data);
      }
      // in float32, sums of sums are nearer the truth than one long sum
      if (a_.dprompt && (unit + 1 == last || b + 1 == a_.B || b % 32 == 31 || set_of(b + 1) != set))
        hand_in(part, set, h_kv);
    }
  }

 private:
  // ---- tensors ----

  static T* at(const Rows& x, int64_t b, int64_t h, int64_t n) {
    return static_cast<T*>(x.data) + b * x.sample + h * x.head + n * x.row;
  }

  // Rows [first, first + count) as float32 of `width_` channels, zeros past d. Copied even where
  // they are so already: heads of one tensor lie kilobytes apart, and evict each other's lines.
  Matrix rows(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count) {
    float* to = scratch_.take(count * width_);
    for (int64_t n = 0; n < count; ++n) {
      const T* from = at(x, b, h, first + n);
      // rows lie on pages of their own, across which no hardware prefetches
      for (int64_t c = 0; c < a_.d; c += 64 / sizeof(T)) __builtin_prefetch(from + 8 * x.row + c);
      for (int64_t c = 0; c < a_.d; ++c) to[n * width_ + c] = To::widen(from[c]);
      for (int64_t c = a_.d; c < width_; ++c) to[n * width_ + c] = 0;
    }
    return {to, width_};
  }

  // [d, queries]: rows as columns, times `factor`, zeros past the last query.
  float* columns(const Matrix& x, int64_t count, int64_t across, float factor) {
    float* to = scratch_.take(a_.d * across);
    for (int64_t n = 0; n < across; n += kLanes)
      for (int64_t c = 0; c < a_.d; ++c) {
        alignas(64) float lane[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          lane[i] = n + i < count ? x.data[(n + i) * x.row + c] : 0.0f;
        store(to + c * across + n, load(lane) * factor);
      }
    return to;
  }

  void write(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count, const float* from) {
    for (int64_t n = 0; n < count; ++n) {
      T* to = at(x, b, h, first + n);
      for (int64_t c = 0; c < a_.d; ++c) to[c] = To::convert(from[n * width_ + c]);
    }
  }

  Keys keys(const Rows& k, const Rows& v, int64_t b, int64_t h_kv, int64_t count) {
    return {rows(k, b, h_kv, 0, count), rows(v, b, h_kv, 0, count), {}, {}, count};
  }

  // ---- gradients of keys: where they are added up ----

  int64_t set_of(int64_t b) const { return a_.set_of ? a_.set_of[b] : 0; }

  float* share(int64_t part, int64_t which, int64_t set, int64_t h_kv) const {
    const int64_t sum = (a_.shares == 1 ? 0 : part) * 2 + which;
    return a_.dprompt + ((sum * a_.sets + set) * a_.heads_kv + h_kv) * a_.P * a_.d;
  }

  Matrix sums(int64_t count) {
    float* to = scratch_.take(count * width_);
    memset(to, 0, size_t(count * width_) * 4);
    return {to, width_};
  }

  // The prompts' sums so far go to this part's share, and begin again.
  void hand_in(int64_t part, int64_t set, int64_t h_kv) {
    for (int which = 0; which < 2; ++which) {
      const Matrix& sum = which ? prompts_.dv : prompts_.dk;
      float* to = share(part, which, set, h_kv);
      for (int64_t p = 0; p < P_; ++p)
        for (int64_t c = 0; c < a_.d; ++c) to[p * a_.d + c] += sum.data[p * sum.row + c];
      memset(sum.data, 0, size_t(P_ * sum.row) * 4);
    }
  }

  // ---- a block of queries ----

  struct Seen {
    int64_t first, last;  // tokens that some query of the block may see
  };

  Seen seen(int64_t n, int64_t end) const {
    const int64_t ahead = a_.M - a_.N;
    int64_t first = 0, last = a_.M;
    if (a_.causal) last = end + ahead;
    if (a_.window) {
      first = most(0, n + ahead - a_.window + 1);
      if (!a_.causal) last = least(a_.M, end - 1 + ahead + a_.window);
    }
    first = least(first, a_.M);
    return {first, most(last, first)};
  }

  static void hide(float* row, int64_t from, int64_t to, int64_t across) {
    for (int64_t i = most(from, 0); i < least(to, across); ++i) row[i] = -kInfinity;
  }

  // Scores [keys seen, across], prompts first; -inf where a query may not look.
  void score(float* s, const float* q, int64_t b, int64_t h, int64_t n, int64_t count,
             const Seen& at, int64_t across) {
    product({prompts_.k.data, prompts_.k.row, 1, q, across, s, across}, P_, across, a_.d, false);
    s += P_ * across;
    const Matrix& k = tokens_.k;
    product({k.data + at.first * k.row, k.row, 1, q, across, s, across}, at.last - at.first, across,
            a_.d, false);
    if (a_.softcap) cap(s - P_ * across, (P_ + at.last - at.first) * across, a_.softcap);
    if (a_.mask.data) add_mask(s, b, h, n, count, at, across);
    if (!a_.key_mask && !a_.causal && !a_.window) return;
    for (int64_t j = at.first; j < at.last; ++j, s += across) {
      const int64_t here = j - (a_.M - a_.N) - n;  // the query of the block that stands at key j
      if (a_.key_mask && !a_.key_mask[b * a_.M + j]) hide(s, 0, across, across);
      if (a_.causal) hide(s, 0, here, across);
      if (a_.window) hide(s, here + a_.window, across, across);
      if (a_.window && !a_.causal) hide(s, 0, here - a_.window + 1, across);
    }
  }

  void add_mask(float* s, int64_t b, int64_t h, int64_t n, int64_t count, const Seen& at,
                int64_t across) {
    const Mask& m = a_.mask;
    const int64_t from = b * m.sample + h * m.head + n * m.row + at.first * m.key;
    const auto add = [&](const auto* mask, auto value) {
      for (int64_t j = 0; j < at.last - at.first; ++j)
        for (int64_t i = 0; i < count; ++i)
          s[j * across + i] += value(mask[from + i * m.row + j * m.key]);
    };
    // whoever writes the lowest number means hidden
    const auto number = [](auto x, float lowest) { return x <= lowest ? -kInfinity : x; };
    if (m.kind == Mask::seen)
      add(static_cast<const uint8_t*>(m.data), [](uint8_t x) { return x ? 0.0f : -kInfinity; });
    else if (m.kind == Mask::f32)
      add(static_cast<const float*>(m.data), [&](float x) { return number(x, -FLT_MAX); });
    else
      add(static_cast<const uint16_t*>(m.data),
          [&](uint16_t x) { return number(ToBf16::widen(x), ToBf16::widen(0xff7f)); });
  }

  void answer(int64_t b, int64_t h, int64_t n, int64_t end) {
    const int64_t count = end - n, across = whole(count);
    const Seen at = seen(n, end);
    const int64_t keys = P_ + at.last - at.first;
    const float* q = columns(rows(a_.q, b, h, n, count), count, across, a_.scale);
    float* s = scratch_.take(keys * across);
    score(s, q, b, h, n, count, at, across);

    alignas(64) float top[kBlock], total[kBlock];
    exponentials(s, keys, across, top, total);
    float* out = scratch_.take(count * width_);
    add_values(out, s, at, count, across);
    for (int64_t i = 0; i < count; ++i) {
      const float by = total[i] == 0 ? 0 : 1 / total[i];  // a NaN stays one
      for (int64_t c = 0; c < width_; c += kLanes) {
        float* x = out + i * width_ + c;
        store(x, load(x) * by);
      }
      a_.lse[(b * a_.H + h) * a_.N + n + i] = total[i] == 0 ? -kInfinity : top[i] + logf(total[i]);
    }
    write(a_.out, b, h, n, count, out);
  }

  // out [count, width] = p^T v, p [keys seen, across]
  void add_values(float* out, const float* p, const Seen& at, int64_t count, int64_t across) {
    const Matrix &own = prompts_.v, &v = tokens_.v;
    product({p, 1, across, own.data, own.row, out, width_}, count, width_, P_, false);
    product({p + P_ * across, 1, across, v.data + at.first * v.row, v.row, out, width_}, count,
            width_, at.last - at.first, true);
  }

  void differentiate(int64_t b, int64_t h, int64_t n, int64_t end) {
    const int64_t count = end - n, across = whole(count);
    Seen at = {0, 0};
    if (a_.tokens) at = seen(n, end);
    const int64_t keys = P_ + at.last - at.first;
    const Matrix q = rows(a_.q, b, h, n, count), dout = rows(a_.dout, b, h, n, count);
    const Matrix out = rows(a_.out, b, h, n, count);
    const float* q_columns = columns(q, count, across, a_.scale);
    const float* dout_columns = columns(dout, count, across, 1);
    alignas(64) float lse[kBlock], delta[kBlock];
    for (int64_t i = 0; i < across; ++i) {
      lse[i] = i < count ? a_.lse[(b * a_.H + h) * a_.N + n + i] : kInfinity;
      if (lse[i] == -kInfinity) lse[i] = kInfinity;  // saw nothing: every probability is 0
      delta[i] = 0;
      if (i >= count) continue;
      Lanes sum = {};
      for (int64_t c = 0; c < width_; c += kLanes)
        sum += load(dout.data + i * dout.row + c) * load(out.data + i * out.row + c);
      delta[i] = total(sum);
    }

    float* p = scratch_.take(keys * across);
    float* ds = scratch_.take(keys * across);
    score(p, q_columns, b, h, n, count, at, across);
    const Matrix &own = prompts_.v, &v = tokens_.v;
    product({own.data, own.row, 1, dout_columns, across, ds, across}, P_, across, a_.d, false);
    product({v.data + at.first * v.row, v.row, 1, dout_columns, across, ds + P_ * across, across},
            at.last - at.first, across, a_.d, false);
    for (int64_t i = 0; i < across; i += kLanes) {
      const Lanes base = load(lse + i), less = load(delta + i);
      for (int64_t j = i; j < keys * across; j += across) {
        const Lanes s = load(p + j), e = exponential(s - base);
        const Lanes by = a_.softcap ? slope(s, a_.softcap) * a_.scale : splat(a_.scale);
        store(p + j, e);
        store(ds + j, e * (load(ds + j) - less) * by);
      }
    }

    add_keys(prompts_, 0, P_, p, ds, q, dout, count, across);
    const int64_t rest = P_ * across;
    add_keys(tokens_, at.first, at.last, p + rest, ds + rest, q, dout, count, across);
    if (!a_.tokens) return;
    float* dq = scratch_.take(count * width_);
    const Matrix &pk = prompts_.k, &k = tokens_.k;
    product({ds, 1, across, pk.data, pk.row, dq, width_}, count, width_, P_, false);
    product({ds + rest, 1, across, k.data + at.first * k.row, k.row, dq, width_}, count, width_,
            at.last - at.first, true);
    write(a_.dq, b, h, n, count, dq);
  }

  // dk += ds q and dv += p dout, for keys [first, last)
  void add_keys(const Keys& to, int64_t first, int64_t last, const float* p, const float* ds,
                const Matrix& q, const Matrix& dout, int64_t count, int64_t across) {
    if (!to.dk.data) return;
    float *dk = to.dk.data + first * to.dk.row, *dv = to.dv.data + first * to.dv.row;
    product({ds, across, 1, q.data, q.row, dk, to.dk.row}, last - first, width_, count, true);
    product({p, across, 1, dout.data, dout.row, dv, to.dv.row}, last - first, width_, count, true);
  }

  const Attention& a_;
  const int64_t width_;  // channels, in whole vectors
  const bool backward_;
  int64_t block_, step_;
  int64_t P_ = 0;  // rows of the sample's set of prompts
  Scratch scratch_;
  bool works_;
  Keys prompts_, tokens_;
};

inline void attend(const Attention& a, bool backward, int64_t part, int64_t first, int64_t last) {
  if (a.N == 1 && !backward && !a.mask.data) {
    if (a.dtype == Dtype::f32) return Single<ToF32>(a).run(first, last);
    return Single<ToBf16>(a).run(first, last);
  }
  if (a.dtype == Dtype::f32) return Unit<ToF32>(a, backward).run(part, first, last);
  Unit<ToBf16>(a, backward).run(part, first, last);
}

}  // namespace
}  // namespace fastprompt

#define FASTPROMPT_ATTENTION(isa)                                                                  \
  void fastprompt::attend_##isa(const Attention& a, int64_t part, int64_t first, int64_t last) {   \
    attend(a, false, part, first, last);                                                           \
  }                                                                                                \
  void fastprompt::attend_backward_##isa(const Attention& a, int64_t part, int64_t first,          \
                                         int64_t last) {                                           \
    attend(a, true, part, first, last);                                                            \
  }
