// Products of some tokens with a 4-bit weight [rows, columns], with no decoded weight in between.
//
//   forward    y  = x Wᵀ + bias     x  [tokens, columns], y  [tokens, rows]
//   backward   dx = dy W            dy [tokens, rows],    dx [tokens, columns]
//
// For a few tokens both are bound by reading the weight, and 4 bits are read faster than 16. Sums
// are float32, of weights that were not rounded, in an order that no number of threads changes.
#pragma once

#include "decode.h"

namespace fastprompt {

struct Product {
  Weight weight;     // rows of whole blocks, of a power of two from 32 on
  const void* in;    // x or dy; element i of token t is in[t * in_row + i]
  const void* bias;  // [rows], or null; forward alone
  void* out;         // y or dx, contiguous
  float* factors;    // [room()]: the tokens in the order in which they are multiplied
  int64_t rows, columns, tokens, in_row;
  Dtype dtype;  // of in, bias and out
  bool backward;

  // Tokens are multiplied kTile at a time; the last tile is of 1, 2, 4 or 8, with zeros.
  static constexpr int64_t kTile = 8;
  // Columns come in groups, the last with zeros: of whole vectors of any instruction set.
  static constexpr int64_t kGroup = 128;
  static constexpr int64_t kRows = 32, kColumns = 1024;  // of a part, at most

  int64_t padded_columns() const { return (columns + kGroup - 1) / kGroup * kGroup; }
  int64_t padded_tokens() const {
    const int64_t last = tokens % kTile;
    return tokens - last + (last > 4 ? 8 : last > 2 ? 4 : last);
  }
  int64_t room() const { return padded_tokens() * (backward ? rows : padded_columns()); }
};

// Puts a token, one of padded_tokens(), among the factors.
using ArrangeToken = void (*)(const Product&, int64_t token);
// Works out a part: rows [first, last) of y, or columns [first, last) of dx from a whole group on.
using MultiplyPart = void (*)(const Product&, int64_t first, int64_t last);

#define FASTPROMPT_VARIANT(isa)                \
  void arrange_##isa(const Product&, int64_t); \
  void multiply_##isa(const Product&, int64_t, int64_t);
FASTPROMPT_VARIANT(portable)
FASTPROMPT_VARIANT(avx2)
FASTPROMPT_VARIANT(avx512)
FASTPROMPT_VARIANT(neon)
#undef FASTPROMPT_VARIANT

}  // namespace fastprompt
