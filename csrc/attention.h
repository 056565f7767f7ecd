// Attention over prompts and tokens on the CPU: softmax(scale q [pk; k]^T) [pv; v] and its gradients,
// in float32 inside, with no concatenation and no [N, M] matrix.
#pragma once

#include <cstdint>

#include "decode.h"

namespace fastprompt {

// A tensor of rows: element c of row n of head h of sample b is data[b * sample + h * head + n * row + c].
struct Rows {
  void* data;
  int64_t sample, head, row;
};

struct Attention {
  Rows q, k, v, prompt_k, prompt_v;  // prompts have no sample
  Rows out, dout;
  Rows dq, dk, dv;
  float* lse;               // [B, H, N]
  float* dprompt;           // [parts, 2, heads_kv, P, d], zeroed; null: not asked
  const uint8_t* key_mask;  // [B, M], 0: hidden; null: none
  int64_t B, H, heads_kv, N, M, P, d;
  int64_t window;  // 0: none
  float scale;
  Dtype dtype;  // f32 or bf16
  bool causal, tokens;
  int* out_of_memory;  // set to 1 by a part that found none; what it owed is then not written
};

// Works out units [first, last) of the B * heads_kv pairs of a sample and a key head; `part` says
// which share of `dprompt` is this caller's own.
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
