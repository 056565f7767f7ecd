// What a frozen block does between its products: norms, activations and the rotation of queries and
// keys, one pass over memory each. In float32, rounded once; tensors are float32 or bfloat16.
//
// Rows (along a contiguous last axis) or tokens are shared out in parts whose size does not depend
// on the number of threads, so that results do not either. A result may lie where an input lay:
// whatever is written at a place has been read from there.
#pragma once

#include <cstdint>

#include "decode.h"

namespace fastprompt {

constexpr int kMostAxes = 64;  // torch's tensors have no more

// The leading axes that all tensors of an operation share.
struct Axes {
  int count;
  const int64_t* sizes;
};

struct Strided {
  const void* data;        // null: there is none
  const int64_t* strides;  // by the leading axes, in elements
  Dtype dtype;
};

// Weight and bias are [D], float32, or null: none. A norm that centres is a layer norm.
struct Norm {
  Axes axes;
  int64_t D;
  const float *weight, *bias;
  float eps, offset;  // the offset is added to the weight
  bool centers;
};

struct NormForward : Norm {
  Strided x, residual;  // the residual in x's dtype
  bool cast_first;      // z is rounded to x's dtype before the weight comes
  void *y, *total;      // contiguous; total = x + residual, in x's dtype, where there is one
  Dtype y_dtype;
  float *mean, *rstd;   // [rows]; no mean where nothing is centred
};

struct NormBackward : Norm {
  Strided dy, h, dh;         // dh is added, in dx's dtype
  const float *mean, *rstd;  // [rows]; no rstd: both are made again
  void* dx;                  // contiguous
  Dtype dx_dtype;
};

enum class Kind : int { silu = 0, gelu_tanh = 1, gelu = 2, gelu_quick = 3 };

// All of one dtype; without `up` a plain activation. Backward where there is a dy.
struct Activation {
  Axes axes;
  int64_t columns;
  Kind kind;
  Strided dy, gate, up;
  Strided first, second;  // results: y, or dgate and dup
};

// Heads of queries or keys, [B, heads, N, d]; strides by sample, head and token.
struct Heads {
  const void* x;
  void* y;
  int64_t heads, x_strides[3], y_strides[3];
};

// Channel i of the first r turns with channel i + r / 2, those from r on stay.
struct Rotation {
  Heads of[2];
  const void *cos, *sin;                    // [B, N, r]
  int64_t cos_strides[2], sin_strides[2];  // by sample and token
  int64_t N, d, r;
  Dtype dtype, angles;
  bool back;  // the transposed map
};

// Each works on [first, last): of rows, of elements, of tokens of all samples.
struct Elementwise {
  void (*norm)(const NormForward&, int64_t first, int64_t last);
  void (*norm_backward)(const NormBackward&, int64_t first, int64_t last);
  void (*activate)(const Activation&, int64_t first, int64_t last);
  void (*rotate)(const Rotation&, int64_t first, int64_t last);
};

extern const Elementwise elementwise_portable, elementwise_avx2, elementwise_avx512,
    elementwise_neon;

}  // namespace fastprompt
