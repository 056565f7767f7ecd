// Threads are torch's own where it has them. A second pool would fight the first: torch's workers
// spin for a while after each operation, just when the decoding of the next weight wants their
// cores. torch opens its OpenMP runtime globally, so its entry point is found by name; linking
// against OpenMP instead could bring in another copy of the runtime, with a pool of its own.
#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace fastprompt {
namespace {

struct Job {
  void (*work)(void*, int);
  void* context;
  int parts;
  std::atomic<int> next{0};
};

void take_parts(void* p) {
  Job& job = *static_cast<Job*>(p);
  for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.parts;)
    job.work(job.context, i);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel torch_pool() {
  static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

}  // namespace

void parallel(int parts, int threads, void (*work)(void*, int), void* context) {
  Job job{work, context, parts};
  if (threads > parts) threads = parts;
  if (threads <= 1) return take_parts(&job);
  if (const auto pool = torch_pool()) return pool(take_parts, &job, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take_parts, &job);
  take_parts(&job);
  for (auto& t : others) t.join();
}

}  // namespace fastprompt
