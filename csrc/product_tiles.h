// Products with 4-bit weights in bfloat16, by tiles of 16 by 16 sums: what AMX and AVX-512's bfloat16
// share. Weights are decoded a panel at a time, which a core's cache holds until all tokens are
// multiplied with it.
//
// The left tile has 16 rows of 32 values; the right one pairs of its 32 rows, 16 columns wide:
//   forward    rows of W, as decoded, times pairs of x, turned once     sums [rows, tokens]
//   backward   tokens of dy, as they are, times pairs of decoded rows   sums [tokens, columns]
//
// Both take numbers below 1.2e-38 for zeros, and round sums of them to it.
//
// In two parts, both in an unnamed namespace (see decode_blocks.h). product_<isa>.cpp includes this
// file, defines `Tiles` (made before the first tile is multiplied, and gone after the last) and
// `multiply_tiles`, and then includes product_panels.h.
#pragma once

#include "product.h"

namespace fastprompt {
namespace {

constexpr int64_t kSide = Product::kSide, kDepth = Product::kDepth, kTileSize = kSide * kDepth;
constexpr int64_t kSums = kSide * kSide;

// Tiles one after another: `steps` of what is summed over, then the next rows (columns, tokens).
struct Side {
  const uint16_t* data;
  int64_t next;  // from one tile to that of the next 16
};

}  // namespace
}  // namespace fastprompt
