// Memory of one thread's own. In an unnamed namespace: see decode_blocks.h.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fastprompt {
namespace {

// A bump allocator over one piece of memory; counts first, then hands out.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  bool reserve(int64_t floats) {
    if (posix_memalign(&memory_, 64, size_t(floats) * 4 + 64)) return false;
    at_ = static_cast<float*>(memory_);
    return true;
  }
  float* take(int64_t floats) {
    float* taken = at_;
    at_ += (floats + 15) / 16 * 16;
    return taken;
  }
  float* mark() const { return at_; }
  void release(float* mark) { at_ = mark; }

 private:
  void* memory_ = nullptr;
  float* at_ = nullptr;
};

}  // namespace
}  // namespace fastprompt
