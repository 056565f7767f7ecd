// Products with 4-bit weights by tiles (product_tiles.h says which): what is decoded, arranged and
// multiplied when.
#pragma once

#include <cstring>

#include "lookup_avx512.h"
#include "product_tiles.h"
#include "scales.h"

namespace fastprompt {
namespace {

constexpr int64_t kForwardSteps = 64, kBackwardSteps = 16;  // of kDepth, in a panel
constexpr int64_t kPanel = 128 * kTileSize;                 // 128 KB, or 256 KB backward

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// All tiles of the left side with all of the right one.
void multiply_sides(Side left, int64_t lefts, Side right, int64_t rights, int64_t steps, bool add,
                    float* sums, int64_t down, int64_t across) {
  for (int64_t r = 0; r < rights; r += 2)
    for (int64_t l = 0; l < lefts; l += 2) {
      const Side a{left.data + l * left.next, left.next};
      const Side b{right.data + r * right.next, right.next};
      float* to = sums + l * down + r * across;
      const bool two = l + 1 < lefts, wide = r + 1 < rights;
      if (two && wide) multiply_tiles<true, true>(a, b, steps, add, to, down, across);
      else if (two) multiply_tiles<true, false>(a, b, steps, add, to, down, across);
      else if (wide) multiply_tiles<false, true>(a, b, steps, add, to, down, across);
      else multiply_tiles<false, false>(a, b, steps, add, to, down, across);
    }
}

// Columns [first, last) of a row, multiples of 32, as bfloat16; `put(column, values)` takes 32.
template <class Put>
inline void decode_row(const Weight& w, int64_t row, int64_t columns, int64_t first, int64_t last,
                       Put put) {
  const int64_t size = w.blocksize, begin = first / size, end = (last + size - 1) / size;
  float buffer[kForwardSteps * kDepth / 32 + 1];
  const float* scales = scales_of(w, row * (columns / size) + begin, end - begin, buffer);
  const uint8_t* in = w.packed + row * columns / 2;
  alignas(64) uint16_t table[16];
  for (int64_t b = begin; b < end; ++b) {
    fill_table(ToBf16(), w.code, scales[b - begin], table);
    int64_t at = b * size > first ? b * size : first;
    for (const int64_t stop = least((b + 1) * size, last); at < stop; at += 32) {
      alignas(64) uint16_t values[32];
      lookup(in + at / 2, 16, table, values, false);
      put(at, values);
    }
  }
}

// ---- forward ----

void multiply_rows(const Product& p, int64_t first, int64_t last) {
  alignas(64) uint16_t panel[kPanel];
  const auto tokens = reinterpret_cast<const uint16_t*>(p.factors);
  const int64_t token_tiles = p.token_tiles(), all = p.depth(), width = p.panel();
  for (int64_t begin = 0; begin < all; begin += kForwardSteps) {
    const int64_t steps = least(kForwardSteps, all - begin), left = steps * kTileSize;
    for (int64_t at = first; at < last; at += width) {
      const int64_t rows = least(width, last - at);
      for (int64_t i = 0; i < rows; ++i) {
        uint16_t* to = panel + i / kSide * left + i % kSide * kDepth;
        const int64_t start = begin * kDepth;
        decode_row(p.weight, at + i, p.columns, start, start + steps * kDepth,
                   [&](int64_t column, const uint16_t* values) {
                     memcpy(to + (column - start) * kSide, values, 64);
                   });
      }
      const Side weights{panel, left}, right{tokens + begin * kTileSize, all * kTileSize};
      multiply_sides(weights, (rows + kSide - 1) / kSide, right, token_tiles, steps, begin > 0,
                     p.sums + at * token_tiles * kSide, token_tiles * kSums, kSums);
    }
  }
  const auto bias = static_cast<const uint16_t*>(p.bias);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t row = first; row < last; ++row) {
      const float* tile = p.sums + (row / kSide * token_tiles + t / kSide) * kSums;
      const float y = tile[row % kSide * kSide + t % kSide];
      static_cast<uint16_t*>(p.out)[t * p.rows + row] =
          ToBf16::convert(bias ? y + ToBf16::widen(bias[row]) : y);
    }
}

// ---- backward ----

void multiply_columns(const Product& p, int64_t first, int64_t last) {
  alignas(64) uint16_t panel[2 * kPanel], rows[2][256];
  const auto tokens = reinterpret_cast<const uint16_t*>(p.factors);
  const int64_t token_tiles = p.token_tiles(), all = p.depth(), width = p.panel();
  const int64_t column_tiles = (p.columns + kSide - 1) / kSide;
  alignas(64) uint16_t order[2][32];  // of pairs: columns 0 .. 15 of two rows, 16 .. 31
  for (int i = 0; i < 64; ++i) order[i / 32][i % 32] = uint16_t(i / 2 + i % 2 * 32);
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t begin = 0; begin < all; begin += kBackwardSteps) {
    const int64_t steps = least(kBackwardSteps, all - begin);
    for (int64_t at = first; at < last; at += width) {
      const int64_t end = least(at + width, last);
      for (int64_t pair = 0; pair < steps * kSide; ++pair) {
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t row = begin * kDepth + pair * 2 + i;
          if (row >= p.rows) {
            memset(rows[i], 0, sizeof rows[i]);
            continue;
          }
          decode_row(p.weight, row, p.columns, at, end, [&](int64_t column, const uint16_t* v) {
            memcpy(rows[i] + column - at, v, 64);
          });
        }
        uint16_t* to = panel + pair / kSide * kTileSize + pair % kSide * kDepth;
        for (int64_t c = 0; c < end - at; c += 32, to += 2 * steps * kTileSize) {
          const __m512i a = _mm512_load_si512(rows[0] + c), b = _mm512_load_si512(rows[1] + c);
          _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
          _mm512_store_si512(to + steps * kTileSize, _mm512_permutex2var_epi16(a, high, b));
        }
      }
      const Side left{tokens + begin * kTileSize, all * kTileSize};
      const Side weights{panel, steps * kTileSize};
      multiply_sides(left, token_tiles, weights, (end - at) / kSide, steps, begin > 0,
                     p.sums + at / kSide * kSums, column_tiles * kSums, kSums);
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t column = first; column < last; ++column) {
      const float* tile = p.sums + (t / kSide * column_tiles + column / kSide) * kSums;
      static_cast<uint16_t*>(p.out)[t * p.columns + column] =
          ToBf16::convert(tile[t % kSide * kSide + column % kSide]);
    }
}

// ---- both ----

void arrange(const Product& p, int64_t tile) {
  const auto in = static_cast<const uint16_t*>(p.in);
  const int64_t width = p.backward ? p.rows : p.columns, steps = p.depth();
  const auto to = reinterpret_cast<uint16_t*>(p.factors) + tile * steps * kTileSize;
  for (int64_t t = 0; t < kSide; ++t) {
    const int64_t token = tile * kSide + t;
    for (int64_t s = 0; s < steps; ++s) {
      alignas(64) uint16_t values[kDepth] = {};
      if (token < p.tokens)
        memcpy(values, in + token * p.in_row + s * kDepth,
               size_t(least(kDepth, width - s * kDepth)) * 2);
      uint16_t* const at = to + s * kTileSize;
      if (p.backward)
        memcpy(at + t * kDepth, values, sizeof values);
      else
        for (int64_t pair = 0; pair < kSide; ++pair)
          memcpy(at + pair * kDepth + t * 2, values + pair * 2, 4);
    }
  }
}

void multiply(const Product& p, int64_t first, int64_t last) {
  [[maybe_unused]] const Tiles tiles;
  p.backward ? multiply_columns(p, first, last) : multiply_rows(p, first, last);
}

}  // namespace
}  // namespace fastprompt
