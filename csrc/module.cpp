// The Python module fastprompt._native. Tensors come in as addresses and sizes, so that one build
// serves every release of torch; fastprompt/native.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "attention.h"
#include "cuda_driver.h"
#include "decode.h"
#include "parallel.h"
#include "product.h"
#include "select.h"

namespace fastprompt {
namespace {

struct Variant {
  const char* name;
  DecodeBlocks decode;
  Attend attend, attend_backward;
  TurnQueries turn;
  ScoreKeys score;
  PickPrompts pick;
};

#define FASTPROMPT_NAMED(isa) \
  { #isa, decode_##isa, attend_##isa, attend_backward_##isa, turn_##isa, score_##isa, pick_##isa }

#if defined(__x86_64__)
bool has_f16c_and_fma() {  // not names that every compiler's __builtin_cpu_supports takes
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (c & bit_FMA);
}
#endif

// What this machine can run, the best first.
std::vector<Variant> find_variants() {
  std::vector<Variant> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
    found.push_back(FASTPROMPT_NAMED(avx512));
  if (__builtin_cpu_supports("avx2") && has_f16c_and_fma()) found.push_back(FASTPROMPT_NAMED(avx2));
#elif defined(__aarch64__)
  found.push_back(FASTPROMPT_NAMED(neon));  // every 64-bit Arm has it
#endif
  found.push_back(FASTPROMPT_NAMED(portable));
  return found;
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = find_variants();
  return found;
}

#define FASTPROMPT_MULTIPLIER(isa) \
  { #isa, arrange_##isa, multiply_##isa, false }

// Of 4-bit products: by tiles, and then those of the variants.
std::vector<Multiplier> find_multipliers() {
  std::vector<Multiplier> found;
#if defined(__x86_64__)
  for (const auto& v : variants()) {
    if (v.decode == decode_avx512) {
      for (const Multiplier& tiles : {find_amx(), find_bf16()})
        if (tiles.name) found.push_back(tiles);
      found.push_back(FASTPROMPT_MULTIPLIER(avx512));
    }
    if (v.decode == decode_avx2) found.push_back(FASTPROMPT_MULTIPLIER(avx2));
  }
#elif defined(__aarch64__)
  found.push_back(FASTPROMPT_MULTIPLIER(neon));
#endif
  found.push_back(FASTPROMPT_MULTIPLIER(portable));
  return found;
}

const std::vector<Multiplier>& multipliers() {
  static const std::vector<Multiplier> found = find_multipliers();
  return found;
}

template <class Named>
pybind11::list names(const std::vector<Named>& found) {
  pybind11::list out;
  for (const auto& each : found) out.append(each.name);
  return out;
}

// A part is small enough that its output stays in a core's cache share while threads take turns,
// and large enough that taking it costs nothing beside decoding it (about 10 us).
constexpr int64_t kPartValues = 1 << 16;

Weight weight_at(uintptr_t packed, uintptr_t code, uintptr_t absmax, uintptr_t code2,
                 uintptr_t absmax2, uintptr_t offset, int64_t blocksize, int64_t blocksize2,
                 int64_t numel) {
  return {reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<const float*>(code),
          reinterpret_cast<const void*>(absmax), reinterpret_cast<const float*>(code2),
          reinterpret_cast<const float*>(absmax2), reinterpret_cast<const float*>(offset),
          blocksize, blocksize2, numel};
}

// An output that no cache holds anyway is written past them: a store would first read each line.
constexpr int64_t kStreamBytes = 32 << 20;

void decode(uintptr_t packed, uintptr_t code, uintptr_t absmax, uintptr_t code2, uintptr_t absmax2,
            uintptr_t offset, int64_t blocksize, int64_t blocksize2, int64_t numel, uintptr_t out,
            int dtype, int threads, size_t variant) {
  const int64_t bytes = numel * (static_cast<Dtype>(dtype) == Dtype::f32 ? 4 : 2);
  struct Task {
    Weight weight;
    Output out;
    DecodeBlocks decode;
    int64_t part_blocks;
  } task{weight_at(packed, code, absmax, code2, absmax2, offset, blocksize, blocksize2, numel),
         {reinterpret_cast<void*>(out), static_cast<Dtype>(dtype), bytes > kStreamBytes},
         variants().at(variant).decode,
         kPartValues / blocksize > 1 ? kPartValues / blocksize : 1};
  const int64_t blocks = task.weight.blocks();
  const int64_t parts = (blocks + task.part_blocks - 1) / task.part_blocks;
  const auto work = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    const int64_t first = part * t.part_blocks, stop = first + t.part_blocks;
    const int64_t blocks = t.weight.blocks();
    t.decode(t.weight, t.out, first, stop < blocks ? stop : blocks);
  };
  parallel(static_cast<int>(parts), threads, work, &task);
}

// Memory for that many floats, whole lines of the cache.
float* lines(int64_t floats) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(floats) * 4 + 64)) throw std::bad_alloc();
  return static_cast<float*>(memory);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How much of y or dx is one part: whole units, two parts a thread where there are enough of them.
int64_t part_of(int64_t width, int64_t unit, int64_t most, int threads) {
  const int64_t units = (width + unit - 1) / unit / (2 * threads);
  return units < 1 ? unit : units * unit < most ? units * unit : most;
}

void product(uintptr_t packed, uintptr_t code, uintptr_t absmax, uintptr_t code2,
             uintptr_t absmax2, uintptr_t offset, int64_t blocksize, int64_t blocksize2,
             uintptr_t in, int64_t in_row, uintptr_t bias, uintptr_t out, int64_t rows,
             int64_t columns, int64_t tokens, int dtype, bool backward, int threads,
             size_t multiplier) {
  struct Task {
    Product product;
    Multiplier multiplier;
    int64_t part, width;
  } task{{}, multipliers().at(multiplier), 0, backward ? columns : rows};
  Product& p = task.product;
  p.weight = weight_at(packed, code, absmax, code2, absmax2, offset, blocksize, blocksize2,
                       rows * columns);
  p.in = reinterpret_cast<const void*>(in), p.bias = reinterpret_cast<const void*>(bias);
  p.out = reinterpret_cast<void*>(out);
  p.rows = rows, p.columns = columns, p.tokens = tokens, p.in_row = in_row;
  p.dtype = static_cast<Dtype>(dtype), p.backward = backward;

  const bool tiles = task.multiplier.tiles;
  const int64_t tile = tiles ? Product::kSide : Product::kTile;
  const std::unique_ptr<float[], void (*)(void*)> factors(lines(p.room(tiles)), free);
  const std::unique_ptr<float[], void (*)(void*)> sums(lines(tiles ? p.sums_room() : 0), free);
  p.factors = factors.get(), p.sums = sums.get();
  if (tiles)
    task.part = part_of(task.width, p.panel(), 1024, threads);
  else if (backward)
    task.part = part_of(columns, Product::kGroup, Product::kColumns, threads);
  else
    task.part = part_of(rows, 1, least(Product::kRows, kPartValues / columns + 1), threads);

  const auto arrange = [](void* given, int part) {
    const Task& t = *static_cast<Task*>(given);
    t.multiplier.arrange(t.product, part);
  };
  parallel(static_cast<int>((tokens + tile - 1) / tile), threads, arrange, &task);
  const auto multiply = [](void* given, int part) {
    const Task& t = *static_cast<Task*>(given);
    const int64_t first = part * t.part, stop = first + t.part;
    t.multiplier.multiply(t.product, first, stop < t.width ? stop : t.width);
  };
  parallel(static_cast<int>((task.width + task.part - 1) / task.part), threads, multiply, &task);
}

// A tensor's address and its strides by sample, head and row; all 0 where there is none.
using Address = std::array<int64_t, 4>;

// A mask's address, its strides by sample, head, row and key, and its kind.
using MaskAddress = std::array<int64_t, 6>;

Rows rows_at(const Address& a) { return {reinterpret_cast<void*>(a[0]), a[1], a[2], a[3]}; }

// The forward writes out and lse, the backward reads them and dout.
void attention(const std::array<Address, 7>& inputs, const std::array<Address, 3>& gradients,
               const std::array<uintptr_t, 5>& addresses, const MaskAddress& mask,
               const std::array<int64_t, 9>& sizes, int64_t window, float scale, float softcap,
               int dtype, bool causal, bool backward, bool tokens, int parts, int threads,
               size_t variant) {
  struct Task {
    Attention attention;
    Attend attend;
    int64_t units;
    int parts;
  } task{};
  Attention& a = task.attention;
  Rows* const tensors[] = {&a.q, &a.k, &a.v, &a.prompt_k, &a.prompt_v, &a.out, &a.dout};
  for (int i = 0; i < 7; ++i) *tensors[i] = rows_at(inputs[i]);
  a.dq = rows_at(gradients[0]), a.dk = rows_at(gradients[1]), a.dv = rows_at(gradients[2]);
  a.lse = reinterpret_cast<float*>(addresses[0]);
  a.dprompt = reinterpret_cast<float*>(addresses[1]);
  a.key_mask = reinterpret_cast<const uint8_t*>(addresses[2]);
  a.set_of = reinterpret_cast<const int64_t*>(addresses[3]);
  a.lengths = reinterpret_cast<const int64_t*>(addresses[4]);
  a.mask = {reinterpret_cast<const void*>(mask[0]), mask[1], mask[2], mask[3], mask[4],
            static_cast<Mask::Kind>(mask[5])};
  a.B = sizes[0], a.H = sizes[1], a.heads_kv = sizes[2], a.N = sizes[3], a.M = sizes[4];
  a.P = sizes[5], a.d = sizes[6], a.sets = sizes[7], a.shares = sizes[8];
  a.window = window, a.scale = scale, a.softcap = softcap, a.dtype = static_cast<Dtype>(dtype);
  a.causal = causal, a.tokens = tokens;
  int out_of_memory = 0;
  a.out_of_memory = &out_of_memory;
  task.attend = backward ? variants().at(variant).attend_backward : variants().at(variant).attend;
  task.units = a.B * a.heads_kv, task.parts = parts;
  const auto work = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    t.attend(t.attention, part, t.units * part / t.parts, t.units * (part + 1) / t.parts);
  };
  parallel(parts, threads, work, &task);
  if (out_of_memory) throw std::bad_alloc();  // Python's MemoryError
}

// Shares of the keys: one a thread, since each looks for a best k of its own; several a thread
// where a core's being late would cost more than that; none of fewer keys than are scored at once.
int64_t shares(int64_t keys, int64_t threads) {
  const int64_t tiles = (keys + Selection::kKeys - 1) / Selection::kKeys;
  const int64_t wanted = threads == 1 || tiles < 128 * threads ? threads : 4 * threads;
  return tiles < wanted ? tiles : wanted;
}

void select(const std::array<int64_t, 7>& addresses, const std::array<int64_t, 4>& strides,
            const std::array<int64_t, 6>& sizes, const std::array<int, 3>& kinds, bool rest,
            uintptr_t total, int threads, size_t variant) {
  struct Task {
    Selection selection;
    Variant variant;
    int64_t parts;
    double* sums;
  } task{{}, variants().at(variant), 1, nullptr};
  Selection& s = task.selection;
  s.keys = reinterpret_cast<const void*>(addresses[0]);
  s.key_scale = reinterpret_cast<const float*>(addresses[1]);
  s.query = reinterpret_cast<const void*>(addresses[2]);
  s.prompts = reinterpret_cast<const void*>(addresses[3]);
  s.tokens = reinterpret_cast<void*>(addresses[4]);
  s.indices = reinterpret_cast<int64_t*>(addresses[5]);
  s.scores = reinterpret_cast<float*>(addresses[6]);
  s.query_row = strides[0], s.key_row = strides[1];
  s.prompt_entry = strides[2], s.prompt_row = strides[3];
  s.B = sizes[0], s.C = sizes[1], s.D = sizes[2], s.L = sizes[3], s.E = sizes[4];
  s.k = sizes[5], s.columns = (s.B + s.kQueries - 1) / s.kQueries * s.kQueries;
  s.query_is = static_cast<Number>(kinds[0]), s.keys_are = static_cast<Number>(kinds[1]);
  s.prompts_are = static_cast<Number>(kinds[2]);
  s.rest = rest, s.add_up = rest && !total;
  s.parts = shares(s.C, threads);
  s.capacity = s.few() ? s.k : 2 * s.k;

  // all memory is taken here, where a lack of it becomes Python's MemoryError
  const int64_t row = s.L * s.E;
  const int64_t held = s.B * s.parts * s.capacity;
  const std::unique_ptr<char[]> candidates(new char[held * Selection::kCandidateBytes]);
  const std::unique_ptr<float[]> scratch(new float[s.parts * s.scratch_floats()]);
  const bool copies = s.query_is != Number::f32;
  const std::unique_ptr<float[]> queries(new float[s.D * s.columns * (copies ? 2 : 1)]);
  std::vector<uint8_t> fine(s.columns);
  std::vector<int64_t> counts(s.B * s.parts);
  std::vector<double> sums(rest ? (s.parts + 1) * row : 0);
  s.queries = queries.get(), s.fine = fine.data();
  s.query_rows = copies ? s.queries + s.D * s.columns : nullptr;
  s.candidates = candidates.get(), s.counts = counts.data();
  s.scratch = scratch.get(), s.sums = sums.data();

  const auto turn = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    t.variant.turn(t.selection, part * Selection::kQueries);
  };
  parallel(static_cast<int>(s.columns / s.kQueries), threads, turn, &task);
  const auto score = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    t.variant.score(t.selection, part);
  };
  parallel(static_cast<int>(s.parts), threads, score, &task);
  if (total) memcpy(s.sums, reinterpret_cast<const void*>(total), row * sizeof(double));
  for (int64_t part = 0; s.add_up && part < s.parts; ++part)
    for (int64_t i = 0; i < row; ++i) sums[i] += sums[(part + 1) * row + i];

  task.parts = s.B < 2 * threads ? s.B : 2 * threads;
  std::vector<double> own(rest ? task.parts * row : 0);
  task.sums = own.data();
  const auto pick = [](void* p, int part) {
    const Task& t = *static_cast<Task*>(p);
    const Selection& s = t.selection;
    t.variant.pick(s, t.sums + (s.rest ? part * s.L * s.E : 0), s.B * part / t.parts,
                   s.B * (part + 1) / t.parts);
  };
  parallel(static_cast<int>(task.parts), threads, pick, &task);
}

}  // namespace
}  // namespace fastprompt

namespace fastprompt {
void bind_elementwise(pybind11::module_&);  // elementwise_module.cpp
}

PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled part of fastprompt; use it through fastprompt.native.";
  m.attr("ABI") = 10;  // raised with every change of what native.py calls
  m.def("variants", [] { return fastprompt::names(fastprompt::variants()); },
        "Instruction sets that this machine runs, best first.");
  m.def("multipliers", [] { return fastprompt::names(fastprompt::multipliers()); },
        "The same of 4-bit products.");
  m.def("decode", &fastprompt::decode, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("product", &fastprompt::product, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("attention", &fastprompt::attention, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("select", &fastprompt::select, pybind11::call_guard<pybind11::gil_scoped_release>());
  fastprompt::bind_elementwise(m);
  fastprompt::define_cuda(m);
}
