// Launches the kernels of csrc/cuda through CUDA's driver, which is looked for when it is first
// needed: the module imports on machines without it, and is tied to no CUDA of torch's.
//
// The cubins lie inside of the module, put there by setup.py where it found nvcc.
#include "cuda_driver.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/product.h"

#if defined(FASTPROMPT_FATBIN)
// clang-format off
asm(".section .rodata\n"
    ".balign 64\n"
    "fastprompt_fatbin:\n"
    ".incbin \"" FASTPROMPT_FATBIN "\"\n"
    ".balign 8\n"
    ".previous\n");
// clang-format on
extern "C" __attribute__((visibility("hidden"))) const char fastprompt_fatbin[];
static const char* const kCubins = fastprompt_fatbin;
#else
#define FASTPROMPT_ARCHS ""
static const char* const kCubins = nullptr;
#endif

namespace fastprompt {
namespace {

// The part of cuda.h that is used here, whose names are stable by CUDA's promise.
using Result = int;  // CUresult
using Handle = void*;
constexpr int kRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

struct Driver {
  Result (*init)(unsigned);
  Result (*library_load)(Handle*, const void*, int*, void**, unsigned, int*, void**, unsigned);
  Result (*library_kernel)(Handle*, Handle, const char*);
  Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   Handle, void**, void**);
  Result (*error_string)(Result, const char**);
  Result (*capture_mode)(int*);
  Result (*device_get)(int*, int);
  Result (*context_get)(Handle*);
  Result (*context_of_device)(Handle*, int);
  Result (*context_set)(Handle);
  Handle library = nullptr;
  std::string why;  // it does not serve
  std::map<std::string, Handle> kernels;
  std::mutex lock;

  Driver() {
    void* cuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cuda) {
      why = "no CUDA driver is found (libcuda.so.1)";
      return;
    }
    const auto find = [&](auto& to, const char* name) {
      to = reinterpret_cast<std::decay_t<decltype(to)>>(dlsym(cuda, name));
      if (!to && why.empty()) why = std::string("this CUDA driver is before 12.0: it has no ") + name;
    };
    find(init, "cuInit");
    find(library_load, "cuLibraryLoadData");
    find(library_kernel, "cuLibraryGetKernel");
    find(launch, "cuLaunchKernel");
    find(error_string, "cuGetErrorString");
    find(capture_mode, "cuThreadExchangeStreamCaptureMode");
    find(device_get, "cuDeviceGet");
    find(context_get, "cuCtxGetCurrent");
    find(context_of_device, "cuDevicePrimaryCtxRetain");
    find(context_set, "cuCtxSetCurrent");
    if (!why.empty()) return;
    const auto load = [&] {
      const Result result = init(0);  // torch has done it, if anything is to be launched
      if (result) return result;
      return library_load(&library, kCubins, nullptr, nullptr, 0, nullptr, nullptr, 0);
    };
    if (const Result result = relaxed(load)) why = "the driver refuses them: " + text_of(result);
  }

  // Loading is refused while a stream is captured, where the thread does not say that it may.
  template <class F>
  Result relaxed(F f) {
    int mode = kRelaxed;
    capture_mode(&mode);
    const Result result = f();
    capture_mode(&mode);
    return result;
  }

  // A thread that has called nothing of CUDA's runtime has no context yet: it gets the device's
  // primary one, which is the runtime's and torch's.
  Result enter(int device) {
    Handle context = nullptr;
    if (const Result result = context_get(&context)) return result;
    if (context) return 0;
    int found;
    if (const Result result = device_get(&found, device)) return result;
    if (const Result result = context_of_device(&context, found)) return result;
    return context_set(context);
  }

  std::string text_of(Result result) {
    const char* text = nullptr;
    error_string(result, &text);
    return text ? text : std::to_string(result);
  }

  Handle kernel(const std::string& name) {
    const std::lock_guard<std::mutex> held(lock);
    Handle& found = kernels[name];
    if (!found) {
      const Result result = relaxed([&] { return library_kernel(&found, library, name.c_str()); });
      if (result) throw std::runtime_error(name + ": " + text_of(result));
    }
    return found;
  }
};

Driver& driver() {
  static Driver& found = *new Driver;  // never destroyed: a thread may still launch at exit
  return found;
}

// Why the kernels cannot be launched; empty if they can.
std::string why_not() {
  if (!*FASTPROMPT_ARCHS) return "built without CUDA kernels";
  return driver().why;
}

// On `device`, which torch has made this thread's; in `stream`, which may be captured.
void launch(const std::string& name, int device, const std::array<int, 3>& grid_and_threads,
            const std::array<int64_t, 9>& addresses, const std::array<int, 6>& sizes, float gain,
            uintptr_t stream) {
  const std::string why = why_not();
  if (!why.empty()) throw std::runtime_error(why);
  Driver& cuda = driver();
  CudaProduct product = product_of(addresses.data(), sizes.data(), gain);
  void* parameters[] = {&product};
  const auto [x, y, threads] = grid_and_threads;
  const Handle kernel = cuda.kernel(name);
  Result result = cuda.enter(device);
  if (!result)
    result = cuda.launch(kernel, x, y, 1, threads, 1, 1, 0, reinterpret_cast<Handle>(stream),
                         parameters, nullptr);
  if (result) throw std::runtime_error(name + ": " + cuda.text_of(result));
}

}  // namespace

void define_cuda(pybind11::module_& m) {
  m.attr("CUDA_ARCHS") = FASTPROMPT_ARCHS;  // "80 86 ...": compute capabilities of the cubins
  m.def("cuda_why_not", &why_not, "Why csrc/cuda cannot be launched here; empty if it can.");
  // a launch waits where too many are queued: not with Python's lock
  m.def("cuda_launch", &launch, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastprompt
