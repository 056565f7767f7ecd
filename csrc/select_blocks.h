// Selection for every instruction set: each select_<isa>.cpp includes this file, so that all of it
// is compiled with that file's flags (see decode_blocks.h). Of std only templates of a type of this
// unnamed namespace are used, so that no two objects share one.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "rounding.h"
#include "select.h"

namespace fastprompt {
namespace {

constexpr float kLowest = -__FLT_MAX__;  // stands for -inf while ranking
constexpr float kMinusInfinity = -__builtin_inff();

struct Candidate {
  float score;
  int32_t index;
};
static_assert(sizeof(Candidate) == Selection::kCandidateBytes);

struct Ahead {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
  }
};

inline int64_t bytes_of(Number n) { return n == Number::f32 ? 4 : n == Number::i8 ? 1 : 2; }

// use(i, value) for `count` elements from the given one on, as float32.
template <class Use>
inline void each(Number kind, const void* data, int64_t from, int64_t count, Use use) {
  const auto half = static_cast<const uint16_t*>(data) + from;
  switch (kind) {
    case Number::f32: {
      const auto x = static_cast<const float*>(data) + from;
      for (int64_t i = 0; i < count; ++i) use(i, x[i]);
      return;
    }
    case Number::bf16:
      for (int64_t i = 0; i < count; ++i) use(i, ToBf16::widen(half[i]));
      return;
    case Number::f16:
      for (int64_t i = 0; i < count; ++i) use(i, ToF16::widen(half[i]));
      return;
    case Number::i8: {
      const auto x = static_cast<const int8_t*>(data) + from;
      for (int64_t i = 0; i < count; ++i) use(i, float(x[i]));
      return;
    }
  }
}

// ---- pass 1: queries ----

inline float squared_length(const float* x, int64_t n) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(x + i);
  float square = total(sum);
  for (; i < n; ++i) square += x[i] * x[i];
  return square;
}

// What a product with the unit query is multiplied by: 0 for a zero key, NaN for a bad one.
inline float factor_of(float square, float scale) {
  square *= scale * scale;
  if (!(square - square == 0)) return __builtin_nanf("");
  return square > 0 ? scale / __builtin_sqrtf(square) : 0;
}

inline void turn_some(const Selection& s, int64_t first) {
  constexpr int64_t kMany = Selection::kQueries;
  const float* rows[kMany];
  float factors[kMany];
  float* const copies = s.query_rows ? s.query_rows + first * s.D : nullptr;
  for (int64_t j = 0; j < kMany; ++j) {
    const int64_t b = first + j;
    factors[j] = 0, rows[j] = nullptr, s.fine[b] = 1;
    if (b >= s.B) continue;
    rows[j] = static_cast<const float*>(s.query) + b * s.query_row;
    if (s.query_is != Number::f32) {
      float* to = copies + j * s.D;
      each(s.query_is, s.query, b * s.query_row, s.D, [to](int64_t i, float x) { to[i] = x; });
      rows[j] = to;
    }
    const float factor = factor_of(squared_length(rows[j], s.D), 1);
    s.fine[b] = factor == factor;
    if (factor > 0) factors[j] = factor;
  }
  // a whole vector of queries after another; what has no length is 0, whatever is in it
  for (int64_t j = 0; j < kMany; ++j)
    if (!(factors[j] > 0)) rows[j] = nullptr;
  for (int64_t i = 0; i < s.D; ++i)
    for (int64_t j = 0; j < kMany; ++j)
      s.queries[i * s.columns + first + j] = rows[j] ? rows[j][i] * factors[j] : 0.0f;
}

// ---- pass 2: scores, and the best of them ----

inline Candidate* candidates_of(const Selection& s, int64_t b) {
  return static_cast<Candidate*>(s.candidates) + b * s.parts * s.capacity;
}

// Keys come with rising index, so that one which only ties with the last kept is not kept: what the
// next one's score must be above is returned.

// Few are kept in order: [0] of each list is in its place, and what is before it is above all.
class Few {
 public:
  Few(const Selection& s, float* lists, int64_t b)
      : k_(s.k), size_(s.list_floats() / 2), scores_(lists + b * 2 * size_ + Selection::kQueries),
        indices_(reinterpret_cast<int32_t*>(scores_ + size_)) {}

  void clear() {
    for (int64_t i = 0; i < size_ - Selection::kQueries; ++i) scores_[i] = kMinusInfinity;
    scores_[-1] = __builtin_inff();
  }

  float add(float score, int64_t index, float) {
    const Lanes new_score = splat(score);
    const Ints new_index = Ints{} + int32_t(index);
    // from the end, so that what moves up a place is read before it is written over
    for (int64_t i = size_ - Selection::kQueries - kLanes; i >= 0; i -= kLanes) {
      const Lanes here = load(scores_ + i), before = load(scores_ + i - 1);
      const Ints passes = new_score > here, passes_before = new_score > before;
      const Lanes moved = passes_before ? before : new_score;
      const Ints moved_index = passes_before ? at(i - 1) : new_index;
      at(i) = passes ? moved_index : at(i);
      store(scores_ + i, passes ? moved : here);
    }
    return scores_[k_ - 1];
  }

  void hand_in(Candidate* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = {scores_[i], indices_[i]};
  }

 private:
  Ints& at(int64_t i) const { return *reinterpret_cast<Ints*>(indices_ + i); }

  int64_t k_, size_;
  float* scores_;
  int32_t* indices_;
};

// Of many, room for more is made now and then.
class Many {
 public:
  Many(const Selection& s, int64_t b, int64_t part)
      : held_(candidates_of(s, b) + part * s.capacity), count_(s.counts[b * s.parts + part]),
        k_(s.k), capacity_(s.capacity) {}

  float add(float score, int64_t index, float bar) {
    held_[count_++] = {score, int32_t(index)};
    if (count_ < capacity_) return bar;
    std::nth_element(held_, held_ + k_ - 1, held_ + count_, Ahead{});
    count_ = k_;
    return held_[k_ - 1].score;
  }

 private:
  Candidate* held_;
  int64_t& count_;
  int64_t k_, capacity_;
};

struct Scratch {
  float *keys, *scores, *factors, *bar, *lists;
  Scratch(const Selection& s, int64_t part)
      : keys(s.scratch + part * s.scratch_floats()), scores(keys + Selection::kKeys * s.D),
        factors(scores + Selection::kKeys * Selection::kColumns), bar(factors + Selection::kKeys),
        lists(bar + s.columns) {}  // bar [columns]: what is to be beaten
};

template <class Best>
inline float look_through(Best best, const float* score, int64_t width, int64_t rows, int64_t first,
                          float bar) {
  for (int64_t r = 0; r < rows; ++r)
    if (score[r * width] > bar) bar = best.add(score[r * width], first + r, bar);
  return bar;
}

inline void score_some(const Selection& s, int64_t part, int64_t first, int64_t rows,
                       const Scratch& scratch) {
  const float* keys = static_cast<const float*>(s.keys) + first * s.key_row;
  int64_t key_row = s.key_row;
  if (s.keys_are != Number::f32) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = scratch.keys + r * s.D;
      const int64_t from = (first + r) * s.key_row;
      each(s.keys_are, s.keys, from, s.D, [to](int64_t i, float x) { to[i] = x; });
    }
    keys = scratch.keys, key_row = s.D;
  }
  for (int64_t r = 0; r < rows; ++r)
    scratch.factors[r] =
        factor_of(squared_length(keys + r * key_row, s.D), s.key_scale ? s.key_scale[first + r] : 1);

  float* const scores = scratch.scores;
  for (int64_t from = 0; from < s.columns; from += Selection::kColumns) {
    const int64_t width = least(Selection::kColumns, s.columns - from);
    product({keys, key_row, 1, s.queries + from, s.columns, scores, width}, rows, width, s.D, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * width;
      const Lanes factor = splat(scratch.factors[r]);
      const bool bad = scratch.factors[r] != scratch.factors[r];
      for (int64_t j = 0; j < width; j += kLanes)
        store(row + j, bad ? splat(kLowest) : load(row + j) * factor);
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      Lanes highest = load(scores + j);
      for (int64_t r = 1; r < rows; ++r) highest = larger(highest, load(scores + r * width + j));
      for (int64_t b = from + j; b < least(from + j + kLanes, s.B); ++b) {
        float& bar = scratch.bar[b];
        if (!(highest[b - from - j] > bar)) continue;
        const float* score = scores + b - from;
        bar = s.few() ? look_through(Few(s, scratch.lists, b), score, width, rows, first, bar)
                      : look_through(Many(s, b, part), score, width, rows, first, bar);
      }
    }
  }
}

typedef double Doubles __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

// sum += sign * x, both of n elements
inline void add_row(double* sum, const float* x, int64_t n, double sign) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Doubles& to = *reinterpret_cast<Doubles*>(sum + i);
    to += sign * __builtin_convertvector(load(x + i), Doubles);
  }
  for (; i < n; ++i) sum[i] += sign * double(x[i]);
}

inline void add_prompts(const Selection& s, int64_t entry, double* sum, double sign) {
  constexpr int64_t kSome = 256;
  float some[kSome];
  for (int64_t l = 0; l < s.L; ++l, sum += s.E) {
    const int64_t at = entry * s.prompt_entry + l * s.prompt_row;
    if (s.prompts_are == Number::f32) {
      add_row(sum, static_cast<const float*>(s.prompts) + at, s.E, sign);
      continue;
    }
    for (int64_t e = 0; e < s.E; e += kSome) {
      const int64_t count = least(kSome, s.E - e);
      each(s.prompts_are, s.prompts, at + e, count, [&some](int64_t i, float x) { some[i] = x; });
      add_row(sum + e, some, count, sign);
    }
  }
}

inline void score_part(const Selection& s, int64_t part) {
  const Scratch scratch(s, part);
  const int64_t begin = s.C * part / s.parts, end = s.C * (part + 1) / s.parts;
  for (int64_t b = 0; b < s.columns; ++b) scratch.bar[b] = kMinusInfinity;
  for (int64_t b = 0; b < s.B && s.few(); ++b) Few(s, scratch.lists, b).clear();
  double* const sum = s.sums + (part + 1) * s.L * s.E;
  for (int64_t c = begin; c < end; c += Selection::kKeys) {
    const int64_t rows = least(Selection::kKeys, end - c);
    score_some(s, part, c, rows, scratch);
    if (s.add_up)
      for (int64_t r = 0; r < rows; ++r) add_prompts(s, c + r, sum, 1);
  }
  for (int64_t b = 0; b < s.B && s.few(); ++b) {
    const int64_t count = least(s.k, end - begin);
    Few(s, scratch.lists, b).hand_in(candidates_of(s, b) + part * s.capacity, count);
    s.counts[b * s.parts + part] = count;
  }
}

// ---- pass 3: merge, gather, mean ----

template <class To>
inline void write_mean(const Selection& s, const double* sum, int64_t at) {
  auto to = static_cast<typename To::T*>(s.tokens) + at;
  const double share = 1 / double(s.C - s.k);
  for (int64_t i = 0; i < s.L * s.E; ++i) to[i] = To::convert(float(sum[i] * share));
}

// The same for float32, from the rows just gathered: a vector of channels at a time, so that its sum
// stays in a register.
inline void write_mean(const Selection& s, const float* chosen, float* to) {
  const int64_t size = s.L * s.E;
  const double share = 1 / double(s.C - s.k);
  int64_t e = 0;
  for (; e + kLanes <= size; e += kLanes) {
    Doubles sum = *reinterpret_cast<const Doubles*>(s.sums + e);
    for (int64_t i = 0; i < s.k; ++i)
      sum -= __builtin_convertvector(load(chosen + i * size + e), Doubles);
    store(to + e, __builtin_convertvector(sum * share, Lanes));
  }
  for (; e < size; ++e) {
    double sum = s.sums[e];
    for (int64_t i = 0; i < s.k; ++i) sum -= double(chosen[i * size + e]);
    to[e] = float(sum * share);
  }
}

inline void pick_some(const Selection& s, double* sum, int64_t first, int64_t last) {
  const int64_t size = s.L * s.E, bytes = bytes_of(s.prompts_are);
  for (int64_t b = first; b < last; ++b) {
    Candidate* const all = candidates_of(s, b);
    int64_t count = 0;
    for (int64_t part = 0; part < s.parts; ++part) {
      const Candidate* own = all + part * s.capacity;
      for (int64_t i = 0; i < s.counts[b * s.parts + part]; ++i) all[count++] = own[i];
    }
    if (!s.fine[b])  // every score is -inf: the lowest indices
      for (int64_t i = 0; i < s.k; ++i) all[i] = {kLowest, int32_t(i)};
    else
      std::partial_sort(all, all + s.k, all + count, Ahead{});

    const bool wide = s.prompts_are == Number::f32;
    if (s.rest && !wide) memcpy(sum, s.sums, size * sizeof(double));
    char* to = static_cast<char*>(s.tokens) + b * (s.k + s.rest) * size * bytes;
    const char* const rows = to;
    for (int64_t i = 0; i < s.k; ++i) {
      const int64_t c = all[i].index;
      s.indices[b * s.k + i] = c;
      s.scores[b * s.k + i] = all[i].score == kLowest ? kMinusInfinity : all[i].score;
      const char* from = static_cast<const char*>(s.prompts) + c * s.prompt_entry * bytes;
      for (int64_t l = 0; l < s.L; ++l, from += s.prompt_row * bytes, to += s.E * bytes)
        memcpy(to, from, s.E * bytes);
      if (s.rest && !wide) add_prompts(s, c, sum, -1);
    }
    if (!s.rest) continue;
    if (wide) {
      write_mean(s, reinterpret_cast<const float*>(rows), reinterpret_cast<float*>(to));
      continue;
    }
    const int64_t at = (b * (s.k + 1) + s.k) * size;
    switch (s.prompts_are) {
      case Number::bf16: write_mean<ToBf16>(s, sum, at); break;
      default: write_mean<ToF16>(s, sum, at);
    }
  }
}

}  // namespace
}  // namespace fastprompt

#define FASTPROMPT_SELECTION(isa)                                                           \
  namespace fastprompt {                                                                    \
  void turn_##isa(const Selection& s, int64_t first) { turn_some(s, first); }               \
  void score_##isa(const Selection& s, int64_t part) { score_part(s, part); }               \
  void pick_##isa(const Selection& s, double* sum, int64_t first, int64_t last) {           \
    pick_some(s, sum, first, last);                                                         \
  }                                                                                         \
  }
