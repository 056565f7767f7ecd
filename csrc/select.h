// The K prompts whose keys have the highest cosine to a query, and the mean of all others.
//
// Three passes, each shared out over threads: queries at length 1; over the keys (scores of some keys
// at a time, and what of them is still among a query's best; the prompts' sum along with it); over
// the queries (merge what the shares of the second pass found, gather, mean).
#pragma once

#include <cstdint>

#include "decode.h"

namespace fastprompt {

enum class Number : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // the first three as in Dtype

struct Selection {
  const void* keys;        // element i of key c is keys[c * key_row + i]
  const float* key_scale;  // [C]; null: 1
  const void* query;       // element i of query b is query[b * query_row + i]
  const void* prompts;     // element i of row l of entry c is prompts[c * entry + l * row + i]
  int64_t query_row, key_row, prompt_entry, prompt_row;
  int64_t B, C, D, L, E, k, columns;
  Number query_is, keys_are, prompts_are;
  bool rest, add_up;       // a mean as last row; whether its sum is to be taken, too

  void* tokens;            // [B, k + rest, L, E]
  int64_t* indices;        // [B, k]
  float* scores;           // [B, k]

  float* queries;          // [D, columns] at length 1 or 0; columns past B are zeros
  float* query_rows;       // [columns, D] of room, for queries that are not float32
  uint8_t* fine;           // [columns], 0: a query whose length is not finite
  int64_t parts;           // shares of the keys
  int64_t capacity;        // candidates that a share holds for a query: k, or more for a while
  void* candidates;        // [B, parts, capacity], of kCandidateBytes
  int64_t* counts;         // [B, parts]
  float* scratch;          // [parts, scratch_floats()]
  double* sums;            // [parts + 1, L, E]; the first is the whole sum

  bool few() const { return k <= 64; }  // kept in order, in the scratch
  // a list of scores, one of indices, and room for a vector that begins before each
  int64_t list_floats() const { return 2 * ((k + kQueries - 1) / kQueries + 1) * kQueries; }
  int64_t scratch_floats() const {
    return kKeys * (D + kColumns + 1) + columns * (1 + (few() ? list_floats() : 0));
  }
  static constexpr int64_t kKeys = 48, kColumns = 256;  // scores at once: they stay in a cache
  static constexpr int64_t kQueries = 16;  // whole vectors of any instruction set
  static constexpr int64_t kCandidateBytes = 8;
};

// Brings kQueries queries from the given one on to length 1.
using TurnQueries = void (*)(const Selection&, int64_t first);
// Scores the part's share of the keys.
using ScoreKeys = void (*)(const Selection&, int64_t part);
// Answers queries [first, last); `sum` [L, E] is this caller's own.
using PickPrompts = void (*)(const Selection&, double* sum, int64_t first, int64_t last);

#define FASTPROMPT_VARIANT(isa)                     \
  void turn_##isa(const Selection&, int64_t first);  \
  void score_##isa(const Selection&, int64_t part); \
  void pick_##isa(const Selection&, double*, int64_t, int64_t);
FASTPROMPT_VARIANT(portable)
FASTPROMPT_VARIANT(avx2)
FASTPROMPT_VARIANT(avx512)
FASTPROMPT_VARIANT(neon)
#undef FASTPROMPT_VARIANT

}  // namespace fastprompt
