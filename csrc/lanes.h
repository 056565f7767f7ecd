// Vectors of this file's instruction set, an exponential, and the one matrix product that attention
// needs, C (+)= A B with A broadcast element by element: every product of its forward and backward
// is of that form, with rows of keys, queries or channels one after another.
//
// All is in an unnamed namespace, as in decode_blocks.h, and for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastprompt {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kAcross = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kAcross = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAcross = 4;
#else
constexpr int kLanes = 4, kAcross = 2;
#endif
constexpr float kInfinity = __builtin_inff();
constexpr int kDown = 6;  // kDown * kAcross sums stay in registers

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Lanes load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline void store(float* x, Lanes value) { *reinterpret_cast<Lanes*>(x) = value; }
inline Lanes splat(float x) { return x - Lanes{}; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// Of all lanes, one half added to the other again and again.
inline float total(Lanes x) {
  float a[kLanes];
  store(a, x);
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

// e^x to about one unit in the last place, 0 below the least normal float, NaN of NaN: x = n ln 2 +
// r, and a polynomial in r (the coefficients are those of Cephes' expf).
inline Lanes exponential(Lanes given) {
  const Ints alive = given > splat(-87.33f);
  Lanes x = alive ? given : Lanes{};
  x = x < splat(88.0f) ? x : splat(88.0f);
  const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the integer
  const Lanes shifted = x * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  Lanes r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints power = (reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic) + 127) << 23;
  const Lanes result = y * reinterpret_cast<Lanes>(power);
  return alive ? result : given != given ? given : Lanes{};
}

// tanh x to a few units in the last place: its series near 0, where a difference of exponentials
// would lose it.
inline Lanes hyperbolic_tangent(Lanes x) {
  const Lanes square = x * x;
  Lanes y = square * (-929569.0f / 638512875.0f) + 21844.0f / 6081075.0f;
  y = y * square - 1382.0f / 155925.0f;
  y = y * square + 62.0f / 2835.0f;
  y = y * square - 17.0f / 315.0f;
  y = y * square + 2.0f / 15.0f;
  y = y * square - 1.0f / 3.0f;
  const Lanes size = x < Lanes{} ? -x : x, e = exponential(size * -2.0f);
  const Lanes large = (1.0f - e) / (1.0f + e);
  return square < splat(0.25f) ? x + x * square * y : x < Lanes{} ? -large : large;
}

// A(m, k) = a[m * a_row + k * a_column]; rows of B and C are b_row and c_row apart.
struct Factors {
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};

template <int Down, int Across>
inline void tile(const Factors& p, int64_t m, int64_t n, int64_t depth, bool add) {
  Lanes sum[Down][Across];
  float* c = p.c + m * p.c_row + n;
#pragma GCC unroll 8
  for (int i = 0; i < Down; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Across; ++j) sum[i][j] = Lanes{};
  const float* a = p.a + m * p.a_row;
  const float* b = p.b + n;
  for (int64_t k = 0; k < depth; ++k, a += p.a_column, b += p.b_row) {
    Lanes across[Across];
#pragma GCC unroll 8
    for (int j = 0; j < Across; ++j) across[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Down; ++i) {
      const Lanes down = splat(a[i * p.a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < Across; ++j) sum[i][j] += down * across[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Down; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Across; ++j) {
      float* to = c + i * p.c_row + j * kLanes;
      // added at the end: in float32, sums of sums are nearer the truth than one long sum
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
}

template <int Across>
inline void column(const Factors& p, int64_t rows, int64_t n, int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + kDown <= rows; m += kDown) tile<kDown, Across>(p, m, n, depth, add);
  switch (rows - m) {
    case 5: return tile<5, Across>(p, m, n, depth, add);
    case 4: return tile<4, Across>(p, m, n, depth, add);
    case 3: return tile<3, Across>(p, m, n, depth, add);
    case 2: return tile<2, Across>(p, m, n, depth, add);
    case 1: return tile<1, Across>(p, m, n, depth, add);
    default: return;
  }
}

constexpr int64_t kDepth = 96;  // rows of B at once: they stay in the first-level cache

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns whole vectors.
inline void product(Factors p, int64_t rows, int64_t columns, int64_t depth, bool add) {
  do {
    const int64_t now = depth < kDepth ? depth : kDepth;
    int64_t n = 0;
    for (; n + kAcross * kLanes <= columns; n += kAcross * kLanes)
      column<kAcross>(p, rows, n, now, add);
    switch ((columns - n) / kLanes) {
      case 3: column<3 < kAcross ? 3 : 1>(p, rows, n, now, add); break;
      case 2: column<2 < kAcross ? 2 : 1>(p, rows, n, now, add); break;
      case 1: column<1>(p, rows, n, now, add); break;
      default: break;
    }
    p.a += now * p.a_column, p.b += now * p.b_row;
    depth -= now, add = true;
  } while (depth > 0);
}

}  // namespace
}  // namespace fastprompt
