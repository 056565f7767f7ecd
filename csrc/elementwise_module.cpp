// What module.cpp binds of the elementwise operations. Tensors come in as addresses and strides;
// fastprompt/native_elementwise.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"
#include "parallel.h"

namespace fastprompt {
namespace {

using Strides = std::vector<std::vector<int64_t>>;  // of each tensor

// module.cpp's variants() says which of them this machine runs.
const Elementwise& of_variant(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return elementwise_avx512;
  if (name == "avx2") return elementwise_avx2;
#elif defined(__aarch64__)
  if (name == "neon") return elementwise_neon;
#endif
  if (name == "portable") return elementwise_portable;
  throw std::invalid_argument("no variant " + name);
}

// Elements of a part: about 10 us of work. Never by the number of threads, see elementwise.h.
constexpr int64_t kPartElements = 1 << 15;

// Works on `units` of `size` elements each.
template <class Job>
void run(const Job& job, void (*work)(const Job&, int64_t, int64_t), int64_t units, int64_t size,
         int threads) {
  if (units == 0) return;
  struct Task {
    const Job& job;
    void (*work)(const Job&, int64_t, int64_t);
    int64_t units, part;
  } task{job, work, units, 0 < size && size < kPartElements ? kPartElements / size : 1};
  const auto some = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    const int64_t first = part * t.part, stop = first + t.part;
    t.work(t.job, first, stop < t.units ? stop : t.units);
  };
  parallel(static_cast<int>((units + task.part - 1) / task.part), threads, some, &task);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Axes axes_of(const std::vector<int64_t>& sizes) {
  if (sizes.size() > size_t(kMostAxes)) throw std::invalid_argument("too many axes");
  return {static_cast<int>(sizes.size()), sizes.data()};
}

Strided strided(uintptr_t address, const std::vector<int64_t>& strides, int dtype) {
  return {pointer<const void>(address), strides.data(), static_cast<Dtype>(dtype)};
}

int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t n : sizes) count *= n;
  return count;
}

// tensors: x, residual, weight, bias; y, total, mean, rstd
void norm_forward(const std::array<uintptr_t, 8>& tensors, const std::vector<int64_t>& sizes,
                  const Strides& strides, int64_t D, float eps, float offset, bool cast_first,
                  const std::array<int, 2>& dtypes, int threads, const std::string& variant) {
  NormForward n{};
  n.axes = axes_of(sizes), n.D = D, n.eps = eps, n.offset = offset, n.cast_first = cast_first;
  n.x = strided(tensors[0], strides.at(0), dtypes[0]);
  n.residual = strided(tensors[1], strides.at(1), dtypes[0]);
  n.weight = pointer<const float>(tensors[2]), n.bias = pointer<const float>(tensors[3]);
  n.y = pointer<void>(tensors[4]), n.total = pointer<void>(tensors[5]);
  n.y_dtype = static_cast<Dtype>(dtypes[1]);
  n.mean = pointer<float>(tensors[6]), n.rstd = pointer<float>(tensors[7]);
  n.centers = n.mean != nullptr;
  run(n, of_variant(variant).norm, count_of(sizes), D, threads);
}

// tensors: dy, h, dh, weight, mean, rstd; dx
void norm_backward(const std::array<uintptr_t, 7>& tensors, const std::vector<int64_t>& sizes,
                   const Strides& strides, int64_t D, float eps, float offset, bool centers,
                   const std::array<int, 3>& dtypes, int threads, const std::string& variant) {
  NormBackward n{};
  n.axes = axes_of(sizes), n.D = D, n.eps = eps, n.offset = offset, n.centers = centers;
  n.dy = strided(tensors[0], strides.at(0), dtypes[0]);
  n.h = strided(tensors[1], strides.at(1), dtypes[1]);
  n.dh = strided(tensors[2], strides.at(2), dtypes[2]);
  n.weight = pointer<const float>(tensors[3]);
  n.mean = pointer<const float>(tensors[4]), n.rstd = pointer<const float>(tensors[5]);
  n.dx = pointer<void>(tensors[6]), n.dx_dtype = n.dh.dtype;
  run(n, of_variant(variant).norm_backward, count_of(sizes), D, threads);
}

// tensors: dy (0: forward), gate, up (0: a plain activation); y, or dgate and dup
void activate(const std::array<uintptr_t, 5>& tensors, const std::vector<int64_t>& sizes,
              const Strides& strides, int64_t columns, int kind, int dtype, int threads,
              const std::string& variant) {
  Activation a{};
  a.axes = axes_of(sizes), a.columns = columns, a.kind = static_cast<Kind>(kind);
  Strided* const all[] = {&a.dy, &a.gate, &a.up, &a.first, &a.second};
  for (int i = 0; i < 5; ++i) *all[i] = strided(tensors[i], strides.at(i), dtype);
  run(a, of_variant(variant).activate, count_of(sizes) * columns, 1, threads);
}

// tensors: queries, keys, where they go, cos, sin; strides as Rotation and Heads have them
void rotate(const std::array<uintptr_t, 6>& tensors, const Strides& strides,
            const std::array<int64_t, 6>& sizes, const std::array<int, 2>& dtypes, bool back,
            int threads, const std::string& variant) {
  const auto [B, Hq, Hkv, N, d, r] = sizes;
  Rotation t{};
  t.cos = pointer<const void>(tensors[4]), t.sin = pointer<const void>(tensors[5]);
  t.N = N, t.d = d, t.r = r, t.back = back;
  t.dtype = static_cast<Dtype>(dtypes[0]), t.angles = static_cast<Dtype>(dtypes[1]);
  for (int i = 0; i < 2; ++i) {
    t.cos_strides[i] = strides.at(4).at(i), t.sin_strides[i] = strides.at(5).at(i);
    Heads& of = t.of[i];
    of.x = pointer<const void>(tensors[i]), of.y = pointer<void>(tensors[2 + i]);
    of.heads = i ? Hkv : Hq;
    for (int axis = 0; axis < 3; ++axis) {
      of.x_strides[axis] = strides.at(i).at(axis);
      of.y_strides[axis] = strides.at(2 + i).at(axis);
    }
  }
  run(t, of_variant(variant).rotate, B * N, (Hq + Hkv) * d, threads);
}

}  // namespace

void bind_elementwise(pybind11::module_& m) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("norm_forward", &norm_forward, Free());
  m.def("norm_backward", &norm_backward, Free());
  m.def("activate", &activate, Free());
  m.def("rotate", &rotate, Free());
}

}  // namespace fastprompt
