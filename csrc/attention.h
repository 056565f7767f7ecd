// Attention over prompts and tokens on the CPU: softmax(scale q [pk; k]^T) [pv; v] and its gradients,
// in float32 inside, with no concatenation and no [N, M] matrix.
#pragma once

#include <cstdint>

#include "decode.h"

namespace fastprompt {

// A tensor of rows: element c of row n of head h of sample b is at
// data[b * sample + h * head + n * row + c].
struct Rows {
  void* data;
  int64_t sample, head, row;
};

// What is added to the tokens' scores, or where they may be seen: for key j of query n of head h of
// sample b at data[b * sample + h * head + n * row + j * key].
struct Mask {
  enum Kind : int { f32 = 0, bf16 = 1, seen = 2 };  // seen: bool
  const void* data;  // null: none
  int64_t sample, head, row, key;
  Kind kind;
};

struct Attention {
  Rows q, k, v, prompt_k, prompt_v;  // prompts have a set for a sample
  Rows out, dout;
  Rows dq, dk, dv;
  float* lse;               // [B, H, N]
  float* dprompt;           // [shares, 2, sets, heads_kv, P, d], zeroed; null: not asked
  const uint8_t* key_mask;  // [B, M], 0: hidden; null: none
  Mask mask;                // of floats only where softcap is 0
  const int64_t* set_of;    // [B]: which set of prompts a sample sees; null: the first
  const int64_t* lengths;   // [sets]: so many rows of a set exist; null: P
  int64_t B, H, heads_kv, N, M, P, d;
  int64_t sets, shares;  // shares: 1, where no two parts meet in a key head, or the parts
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  Dtype dtype;  // f32 or bf16
  bool causal, tokens;
  int* out_of_memory;  // set to 1 by a part that found none; what it owed is then not written
};

// Works out units [first, last) of the B * heads_kv pairs of a sample and a key head, heads first;
// `part` says which share of `dprompt` is this caller's own, if there are several.
using Attend = void (*)(const Attention&, int64_t part, int64_t first, int64_t last);

#define FASTPROMPT_VARIANT(isa)                                         \
  void attend_##isa(const Attention&, int64_t, int64_t, int64_t);       \
  void attend_backward_##isa(const Attention&, int64_t, int64_t, int64_t);
FASTPROMPT_VARIANT(portable)
FASTPROMPT_VARIANT(avx2)
FASTPROMPT_VARIANT(avx512)
FASTPROMPT_VARIANT(neon)
#undef FASTPROMPT_VARIANT

}  // namespace fastprompt
