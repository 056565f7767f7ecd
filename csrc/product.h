// Products of some tokens with a 4-bit weight [rows, columns], with no decoded weight in memory.
//
//   forward    y  = x Wᵀ + bias     x  [tokens, columns], y  [tokens, rows]
//   backward   dx = dy W            dy [tokens, rows],    dx [tokens, columns]
//
// For a few tokens both are bound by reading the weight, and 4 bits are read faster than 16. Sums
// are float32, in an order that no number of threads changes. Vectors (product_blocks.h) multiply
// weights that were not rounded; tiles (product_tiles.h) take
// bfloat16 alone, and round them to it.
#pragma once

#include "decode.h"

namespace fastprompt {

struct Product {
  Weight weight;     // rows of whole blocks, of a power of two from 32 on
  const void* in;    // x or dy; element i of token t is in[t * in_row + i]
  const void* bias;  // [rows], or null; forward alone
  void* out;         // y or dx, contiguous
  float* factors;    // the tokens in the order in which they are multiplied
  float* sums;       // by tiles: y or dx before rounding
  int64_t rows, columns, tokens, in_row;
  Dtype dtype;  // of in, bias and out
  bool backward;

  // Vectors multiply kTile tokens at a time; the last tile is of 1, 2, 4 or 8, with zeros.
  // Columns come in groups, the last with zeros: of whole vectors of any instruction set.
  static constexpr int64_t kTile = 8, kGroup = 128;
  static constexpr int64_t kRows = 32, kColumns = 1024;  // of a part, at most

  int64_t padded_columns() const { return (columns + kGroup - 1) / kGroup * kGroup; }
  int64_t padded_tokens() const {
    const int64_t last = tokens % kTile;
    return tokens - last + (last > 4 ? 8 : last > 2 ? 4 : last);
  }

  // Tiles are of 16 rows (or tokens) by 32 of what is summed over, to 16 by 16. A part
  // is whole panels: what is decoded at once.
  static constexpr int64_t kSide = 16, kDepth = 32;
  int64_t panel() const { return backward ? 256 : 32; }
  int64_t depth() const { return ((backward ? rows : columns) + kDepth - 1) / kDepth; }
  int64_t token_tiles() const { return (tokens + kSide - 1) / kSide; }
  int64_t room(bool tiles) const {  // floats of the factors
    if (tiles) return token_tiles() * depth() * kSide * kDepth / 2;
    return padded_tokens() * (backward ? rows : padded_columns());
  }
  int64_t sums_room() const {
    const int64_t width = backward ? columns : rows;
    return (width + panel() - 1) / panel() * panel() * token_tiles() * kSide;
  }
};

// Puts a tile of tokens among the factors.
using ArrangeTile = void (*)(const Product&, int64_t tile);
// Works out a part: rows [first, last) of y, or columns [first, last) of dx; first is a multiple of
// kGroup in dx, of panel() by tiles.
using MultiplyPart = void (*)(const Product&, int64_t first, int64_t last);

#define FASTPROMPT_VARIANT(isa)                \
  void arrange_##isa(const Product&, int64_t); \
  void multiply_##isa(const Product&, int64_t, int64_t);
FASTPROMPT_VARIANT(portable)
FASTPROMPT_VARIANT(avx2)
FASTPROMPT_VARIANT(avx512)
FASTPROMPT_VARIANT(neon)
#undef FASTPROMPT_VARIANT

struct Multiplier {
  const char* name;  // null: there is none
  ArrangeTile arrange;
  MultiplyPart multiply;
  bool tiles;
};

// AMX, and AVX-512's bfloat16, where compiler, system and machine have them. To be asked on machines
// with AVX-512 alone.
Multiplier find_amx();
Multiplier find_bf16();

}  // namespace fastprompt
