// Products with 4-bit weights: the loops that every instruction set shares. Each product_<isa>.cpp
// defines `Code`, the 16 values that nibbles stand for, and `look_up`, and then includes this file.
// All is in an unnamed namespace: see decode_blocks.h.
//
// A group is a vector of words, 8 weights a lane; a look-up takes one nibble of every lane, so that
// no weight is moved into its order. The tokens are instead, once, before the first look-up. A lane
// lies in one block: scales are vectors too, and multiply what a lane adds up, not each weight.
#pragma once

#include <cstring>

#include "lanes.h"
#include "product.h"
#include "rounding.h"
#include "scales.h"

namespace fastprompt {
namespace {

constexpr int64_t kWord = 8, kWidth = kWord * kLanes;  // weights of a lane, of a group
constexpr int64_t kFactors = 8192;  // values of tokens that a first-level cache holds: 32 KB
constexpr int64_t kPiece = 256;     // rows that dx adds up by themselves: sums of sums are nearer
constexpr int kTogether = 4;        // rows that share a walk over dx
static_assert(Product::kGroup % kWidth == 0, "padding has whole groups");

// The high nibble of a byte comes first.
constexpr int64_t kSwap = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 1 : 7;

// The column, from its group's first on, of a lane's nibble.
inline int64_t column_of(int64_t lane, int64_t nibble) { return lane * kWord + (nibble ^ kSwap); }

// The words of a group; zeros past the `bytes` that are left of the row.
inline Ints words_at(const uint8_t* in, int64_t bytes) {
  Ints words = {};
  if (bytes >= int64_t(sizeof words))
    memcpy(&words, in, sizeof words);
  else
    memcpy(&words, in, size_t(bytes));
  return words;
}

// Scales of columns [first, last) of a row for each lane of their groups, at most kFactors / kWord.
inline void lane_scales(const Product& p, int64_t row, int64_t first, int64_t last, float* out) {
  const int64_t size = p.weight.blocksize, begin = first / size, end = (last + size - 1) / size;
  float buffer[kFactors / 32 + 1];
  const float* scales = scales_of(p.weight, row * (p.columns / size) + begin, end - begin, buffer);
  const float* const stop = out + (last - first + kWidth - 1) / kWidth * kLanes;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = most(b * size, first), to = least((b + 1) * size, last);
    for (int64_t i = 0; i < (to - from) / kWord; ++i) *out++ = scales[b - begin];
  }
  while (out < stop) *out++ = 0;
}

// ---- forward: factors of a tile are [group][nibble][token][lane] ----

template <int Tokens>
void add_rows(const Product& p, const float* tile, int64_t first, int64_t last, Lanes* sums) {
  const Code code(p.weight.code);
  float scales[kFactors / kWord];
  for (int64_t begin = 0; begin < p.columns; begin += kFactors / Tokens) {
    const int64_t end = least(begin + kFactors / Tokens, p.columns);
    for (int64_t row = first; row < last; ++row) {
      lane_scales(p, row, begin, end, scales);
      const uint8_t* in = p.weight.packed + (row * p.columns + begin) / 2;
      const float *factors = tile + begin * Tokens, *scale = scales;
      Lanes total[Tokens];
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) total[t] = sums[(row - first) * Tokens + t];
      for (int64_t left = (end - begin) / 2; left > 0; left -= kWidth / 2) {
        const Ints words = words_at(in, left);
        Lanes group[Tokens] = {};
#pragma GCC unroll 8
        for (int nibble = 0; nibble < kWord; ++nibble) {
          const Lanes weights = look_up(code, words, nibble);
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t)
            group[t] += weights * load(factors + (nibble * Tokens + t) * kLanes);
        }
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) total[t] += group[t] * load(scale);
        in += kWidth / 2, factors += Tokens * kWidth, scale += kLanes;
      }
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) sums[(row - first) * Tokens + t] = total[t];
    }
  }
}

template <class To, int Tokens>
void multiply_rows(const Product& p, int64_t token, int64_t first, int64_t last) {
  Lanes sums[Product::kRows * Tokens] = {};
  add_rows<Tokens>(p, p.factors + token * p.padded_columns(), first, last, sums);
  const auto bias = static_cast<const typename To::T*>(p.bias);
  const auto out = static_cast<typename To::T*>(p.out);
  for (int64_t t = 0; t < least(Tokens, p.tokens - token); ++t)
    for (int64_t row = first; row < last; ++row) {
      const float y = total(sums[(row - first) * Tokens + t]);
      out[(token + t) * p.rows + row] = To::convert(bias ? y + To::widen(bias[row]) : y);
    }
}

// ---- backward: factors of a tile are [row][token], sums [group][nibble][token][lane] ----

// Adds `Rows` rows of columns [first, last), each times its factor of each token.
template <int Tokens, int Rows>
void add_columns(const Product& p, const Code& code, const float* factors, int64_t row,
                 int64_t first, int64_t last, float* sums) {
  float scales[Rows][Product::kColumns / kWord];
  const uint8_t* in[Rows];
  for (int r = 0; r < Rows; ++r) {
    lane_scales(p, row + r, first, last, scales[r]);
    in[r] = p.weight.packed + ((row + r) * p.columns + first) / 2;
  }
  const float* of_row = factors + row * Tokens;
  for (int64_t at = 0; at < (last - first) / 2; at += kWidth / 2, sums += Tokens * kWidth) {
    Ints words[Rows];
    Lanes each[Rows][Tokens];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      words[r] = words_at(in[r] + at, (last - first) / 2 - at);
      const Lanes scale = load(scales[r] + at * 2 / kWord);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) each[r][t] = scale * of_row[r * Tokens + t];
    }
#pragma GCC unroll 8
    for (int nibble = 0; nibble < kWord; ++nibble) {
      Lanes weights[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) weights[r] = look_up(code, words[r], nibble);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        float* const to = sums + (nibble * Tokens + t) * kLanes;
        Lanes sum = load(to);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sum += weights[r] * each[r][t];
        store(to, sum);
      }
    }
  }
}

template <class To, int Tokens>
void multiply_columns(const Product& p, int64_t token, int64_t first, int64_t last) {
  const Code code(p.weight.code);
  const float* factors = p.factors + token * p.rows;
  const int64_t width = (last - first + kWidth - 1) / kWidth * kWidth;
  float piece[Product::kColumns * Tokens], total[Product::kColumns * Tokens] = {};
  for (int64_t row = 0; row < p.rows;) {
    memset(piece, 0, size_t(width) * Tokens * sizeof(float));
    const int64_t end = least(row + kPiece, p.rows);
    for (; row + kTogether <= end; row += kTogether)
      add_columns<Tokens, kTogether>(p, code, factors, row, first, last, piece);
    for (; row < end; ++row) add_columns<Tokens, 1>(p, code, factors, row, first, last, piece);
    for (int64_t i = 0; i < width * Tokens; i += kLanes)
      store(total + i, load(total + i) + load(piece + i));
  }
  const int64_t count = least(Tokens, p.tokens - token);
  const float* from = total;
  for (int64_t group = first; group < last; group += kWidth)
    for (int64_t nibble = 0; nibble < kWord; ++nibble, from += Tokens * kLanes)
      for (int64_t t = 0; t < count; ++t) {
        const auto out = static_cast<typename To::T*>(p.out) + (token + t) * p.columns + group;
        for (int64_t lane = 0; lane < kLanes && group + lane * kWord < last; ++lane)
          out[column_of(lane, nibble)] = To::convert(from[t * kLanes + lane]);
      }
}

// ---- both ----

template <class To>
void arrange(const Product& p, int64_t tile) {
  const int64_t start = tile * Product::kTile;
  const int64_t tokens = least(Product::kTile, p.padded_tokens() - start);
  for (int64_t t = 0; t < tokens; ++t) {
    const bool real = start + t < p.tokens;  // else zeros
    const auto in = static_cast<const typename To::T*>(p.in) + (real ? start + t : 0) * p.in_row;
    if (p.backward) {
      float* to = p.factors + start * p.rows + t;
      for (int64_t i = 0; i < p.rows; ++i) to[i * tokens] = real ? To::widen(in[i]) : 0;
      continue;
    }
    float* to = p.factors + start * p.padded_columns() + t * kLanes;
    for (int64_t group = 0; group < p.columns; group += kWidth, to += tokens * kWidth)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool there = real && group + lane * kWord < p.columns;
        for (int64_t nibble = 0; nibble < kWord; ++nibble)
          to[nibble * tokens * kLanes + lane] =
              there ? To::widen(in[group + column_of(lane, nibble)]) : 0;
      }
  }
}

template <class To, int Tokens>
void multiply_tile(const Product& p, int64_t token, int64_t first, int64_t last) {
  if (p.backward)
    multiply_columns<To, Tokens>(p, token, first, last);
  else
    multiply_rows<To, Tokens>(p, token, first, last);
}

template <class To>
void multiply(const Product& p, int64_t first, int64_t last) {
  for (int64_t token = 0; token < p.tokens; token += Product::kTile) {
    const int64_t left = p.padded_tokens() - token;
    if (left >= 8) multiply_tile<To, 8>(p, token, first, last);
    else if (left == 4) multiply_tile<To, 4>(p, token, first, last);
    else if (left == 2) multiply_tile<To, 2>(p, token, first, last);
    else multiply_tile<To, 1>(p, token, first, last);
  }
}

}  // namespace
}  // namespace fastprompt

// The functions that product.h declares, of one instruction set.
#define FASTPROMPT_PRODUCT(isa)                                                       \
  void fastprompt::arrange_##isa(const Product& p, int64_t tile) {                    \
    if (p.dtype == Dtype::f32) return arrange<ToF32>(p, tile);                        \
    p.dtype == Dtype::bf16 ? arrange<ToBf16>(p, tile) : arrange<ToF16>(p, tile);      \
  }                                                                                   \
  void fastprompt::multiply_##isa(const Product& p, int64_t first, int64_t last) {    \
    if (p.dtype == Dtype::f32) return multiply<ToF32>(p, first, last);                \
    p.dtype == Dtype::bf16 ? multiply<ToBf16>(p, first, last)                         \
                           : multiply<ToF16>(p, first, last);                         \
  }
