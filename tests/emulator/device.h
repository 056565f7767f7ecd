// A GPU's threads on the host: what csrc/cuda's kernels are written in, for g++.
//
// Every thread of a block is a fiber. One runs until it waits, at __syncthreads() for its block or
// at mma for its warp, then the next; where all wait that have to, they go on. `reversed` runs them
// from the last to the first, blocks too: what is left to chance comes out different.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __shared__ static

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  int x, y;
};
inline Index threadIdx, blockIdx, blockDim;

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
  return *p;  // the sanitizers look at bounds and alignment
}

inline float __uint_as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline uint32_t float_as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

// ---- fibers ----

class Block {
 public:
  Block(int threads, bool reversed) : fibers_(threads), reversed_(reversed) {}

  void run(const std::function<void()>& body) {
    body_ = &body;
    const int n = static_cast<int>(fibers_.size());
    for (int i = 0; i < n; ++i) start(i);
    for (bool some = true; some;) {
      some = false;
      for (int k = 0; k < n; ++k) {
        const int i = reversed_ ? n - 1 - k : k;
        if (fibers_[i].waits == kRuns) resume(i), some = true;
      }
      some = release(0, n, kBlock) || some;
    }
    for (const Fiber& f : fibers_)
      if (f.waits != kDone) fail("threads wait for others that have ended");
  }

  // All of the block have to come.
  void sync() { wait(kBlock); }
  // All of the warp have to come; `exchange` is run once, by the last to come.
  void sync_warp(const std::function<void()>& exchange) {
    const int first = threadIdx.x / 32 * 32;
    fibers_[threadIdx.x].waits = kWarp;
    for (int i = first; i < first + 32; ++i)
      if (fibers_[i].waits != kWarp) return suspend();
    exchange();
    release(first, first + 32, kWarp);  // itself, too: it goes on at once
  }

  struct Fragment {  // what a lane gives to mma
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  };
  Fragment& fragment(int thread) { return fibers_[thread].fragment; }
  static Block* now;

 private:
  enum Wait { kRuns, kWarp, kBlock, kDone };
  static constexpr size_t kStack = 96 << 10;  // below what malloc asks the kernel for
  struct Context {
    ucontext_t begin;
    jmp_buf later;  // swapcontext alone would do, and call the kernel each time
    bool begun = false;
  };
  struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    Wait waits = kRuns;
    Fragment fragment;
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
  }

  void wait(Wait what) {
    fibers_[threadIdx.x].waits = what;
    suspend();
  }

  // Lets [first, last) go on if all of them wait for it.
  bool release(int first, int last, Wait what) {
    for (int i = first; i < last; ++i)
      if (fibers_[i].waits != what) return false;
    for (int i = first; i < last; ++i) fibers_[i].waits = kRuns;
    return true;
  }

  void start(int i) {
    Fiber& f = fibers_[i];
    f.stack.reset(new char[kStack]);
    ucontext_t& begin = f.context.begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = f.stack.get();
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    makecontext(&begin, &Block::enter, 0);
  }

  static void enter() {
    after_switch(nullptr);
    (*now->body_)();
    now->fibers_[threadIdx.x].waits = kDone;
    now->suspend();
  }

  void resume(int i) {
    threadIdx = {i, 0};
    void* own = nullptr;
    before_switch(&own, fibers_[i].stack.get(), kStack);
    go(scheduler_, fibers_[i].context);
    after_switch(own);
  }

  void suspend() {
    const int i = threadIdx.x;
    void* own = nullptr;
    before_switch(fibers_[i].waits == kDone ? nullptr : &own, scheduler_stack_, scheduler_size_);
    go(fibers_[i].context, scheduler_);
    after_switch(own);
  }

#if defined(__SANITIZE_ADDRESS__)
  static void go(Context& from, Context& to) { swapcontext(&from.begin, &to.begin); }
  static void before_switch(void** own, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(own, stack, size);
  }
  static void after_switch(void* own) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(own, &stack, &size);
    if (!own) now->scheduler_stack_ = stack, now->scheduler_size_ = size;
  }
#else
  static void go(Context& from, Context& to) {
    if (_setjmp(from.later)) return;
    from.begun = true;
    if (to.begun) _longjmp(to.later, 1);
    setcontext(&to.begin);
  }
  static void before_switch(void**, const void*, size_t) {}
  static void after_switch(void*) {}
#endif

  std::vector<Fiber> fibers_;
  bool reversed_;
  const std::function<void()>* body_ = nullptr;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};
inline Block* Block::now = nullptr;

inline void __syncthreads() { Block::now->sync(); }

// ---- numbers, and mma.sync m16n8k16 as PTX's manual lays it over a warp ----

namespace fastprompt {

template <class T>
void mma_of(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block& block = *Block::now;
  block.fragment(threadIdx.x) = {d, a, {b0, b1}};
  const int warp = threadIdx.x / 32 * 32;
  block.sync_warp([&] {
    const auto half = [](uint32_t pair, int i) { return i ? T::second(pair) : T::first(pair); };
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& f = block.fragment(warp + lane);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i) A[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half(f.a[r], i);
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < 2; ++i) B[2 * t + i + r * 8][g] = half(f.b[r], i);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B[k][column];
        block.fragment(warp + lane).d[i] += static_cast<float>(sum);
      }
  });
}

struct Bf16 {
  static uint32_t half(float x) {  // to nearest even
    const uint32_t u = float_as_uint(x);
    return x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  static uint32_t pack(float first, float second) { return half(second) << 16 | half(first); }
  static float first(uint32_t pair) { return __uint_as_float(pair << 16); }
  static float second(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_of<Bf16>(d, a, b0, b1);
  }
};

struct Fp16 {
  static uint32_t pack(float first, float second) {
    const _Float16 both[2] = {static_cast<_Float16>(first), static_cast<_Float16>(second)};
    uint32_t word;
    memcpy(&word, both, 4);
    return word;
  }
  static float half(uint32_t pair, int i) {
    _Float16 both[2];
    memcpy(both, &pair, 4);
    return both[i];
  }
  static float first(uint32_t pair) { return half(pair, 0); }
  static float second(uint32_t pair) { return half(pair, 1); }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_of<Fp16>(d, a, b0, b1);
  }
};

}  // namespace fastprompt
