// The NEON products against their definition, on any machine that has the compiler and qemu:
//
//   aarch64-linux-gnu-g++ -static -std=c++17 -O2 -ffp-contract=fast -Wall -Icsrc
//       tests/product_neon.cpp csrc/product_neon.cpp -o /tmp/neon && qemu-aarch64 /tmp/neon
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "product.h"
#include "rounding.h"
#include "scales.h"

using namespace fastprompt;

template <class T, class Draw>
std::vector<T> drawn(int64_t n, Draw draw) {
  std::vector<T> v(n);
  for (auto& x : v) x = T(draw());
  return v;
}

float signed_value() { return float(rand()) / float(RAND_MAX) * 2 - 1; }

// The error of a product of the dtype, in roundings of it.
template <class To>
double error(Dtype dtype, double rounding, int64_t rows, int64_t columns, int64_t tokens,
             int64_t blocksize, bool nested, bool backward) {
  using T = typename To::T;
  const auto value = [] { return To::convert(signed_value()); };
  const int64_t numel = rows * columns, blocks = numel / blocksize;
  const auto packed = drawn<uint8_t>(numel / 2, rand), index = drawn<uint8_t>(blocks, rand);
  const auto code = drawn<float>(16, signed_value), code2 = drawn<float>(256, signed_value);
  const auto absmax = drawn<float>(blocks, signed_value);
  const auto absmax2 = drawn<float>(blocks / 3 + 1, signed_value);
  const float offset = 0.1f;
  const int64_t width = backward ? rows : columns, out_width = backward ? columns : rows;
  const auto in = drawn<T>(tokens * width, value), bias = drawn<T>(rows, value);
  std::vector<T> out(tokens * out_width, To::convert(NAN));

  Product p{};
  p.weight = {packed.data(), code.data(), absmax.data(), nullptr, absmax2.data(), &offset,
              blocksize, 3, numel};
  if (nested) p.weight.absmax = index.data(), p.weight.code2 = code2.data();
  p.in = in.data(), p.out = out.data(), p.bias = backward ? nullptr : bias.data();
  p.rows = rows, p.columns = columns, p.tokens = tokens, p.in_row = width;
  p.dtype = dtype, p.backward = backward;
  std::vector<float> factors(p.room(false));
  p.factors = factors.data();
  for (int64_t tile = 0; tile * Product::kTile < tokens; ++tile) arrange_neon(p, tile);
  const int64_t part = backward ? Product::kGroup : Product::kRows;
  for (int64_t at = 0; at < out_width; at += part)
    multiply_neon(p, at, at + part < out_width ? at + part : out_width);

  double off = 0, size = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < out_width; ++o) {
      double want = backward ? 0 : To::widen(bias[o]);
      for (int64_t k = 0; k < width; ++k) {
        const int64_t i = backward ? k * columns + o : o * columns + k;
        float buffer;
        const float scale = *scales_of(p.weight, i / blocksize, 1, &buffer);
        want += double(code[packed[i / 2] >> (i % 2 ? 0 : 4) & 15]) * scale *
                To::widen(in[t * width + k]);
      }
      const double got = To::widen(out[t * out_width + o]);
      off += (got - want) * (got - want), size += want * want;
    }
  return std::sqrt(off / size) / rounding;
}

int main() {
  double worst = 0;
  for (int64_t tokens : {1, 2, 3, 5, 8, 11})
    for (int64_t blocksize : {32, 64, 128})
      for (int64_t blocks : {1, 4, 5})
        for (bool nested : {false, true})
          for (bool backward : {false, true}) {
            const int64_t columns = blocks * blocksize;
            const double found[] = {
                error<ToF32>(Dtype::f32, 1e-6, 37, columns, tokens, blocksize, nested, backward),
                error<ToBf16>(Dtype::bf16, 4e-3, 37, columns, tokens, blocksize, nested, backward),
                error<ToF16>(Dtype::f16, 5e-4, 37, columns, tokens, blocksize, nested, backward)};
            for (double e : found)
              if (worst == worst && !(e <= worst)) worst = e;  // a NaN stays
          }
  std::printf("the worst error is %.3f of a rounding\n", worst);
  return !(worst < 1);
}
