// As much of a CUDA driver as csrc/cuda_driver.cpp asks for, over the emulator: libcuda.so.1 for
// tests/test_nf4_cuda.py. Built with the emulator into one library.
#include <cstdint>
#include <cstring>

#include "../../csrc/cuda/product.h"

extern "C" {
int emulate(const char*, int, int, int, const int64_t*, const int*, float, int);

static char kNames[][32] = {
#define NAMED(name, body, T, tiles, warps) #name,
    FASTPROMPT_PRODUCT_KERNELS(NAMED)};
static int capture_mode = 0, initialised = 0;
static thread_local void* context = nullptr;  // of each thread, as in CUDA's runtime
static char primary[2];

int cuInit(unsigned) { return initialised = 1, 0; }

int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**,
                      unsigned) {
  uint32_t magic;
  memcpy(&magic, code, 4);
  if (magic != 0xba55ed50 || capture_mode != 2 || !initialised) return 1;  // a fat binary, capturing allowed
  *library = &capture_mode;
  return 0;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  if (library != &capture_mode) return 1;
  for (char* known : kNames)
    if (!strcmp(known, name)) return *kernel = known, 0;
  return 500;  // CUDA_ERROR_NOT_FOUND
}

int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** parameters, void**) {
  if (context != &primary[1]) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  if (z != 1 || shared || stream != reinterpret_cast<void*>(7)) return 1;
  const auto& p = *static_cast<const fastprompt::CudaProduct*>(parameters[0]);
  int64_t addresses[9];
  memcpy(addresses, &p, sizeof addresses);
  return emulate(static_cast<const char*>(kernel), x, y, threads, addresses, &p.rows, p.gain, 0);
}

int cuDeviceGet(int* device, int ordinal) { return *device = 10 + ordinal, 0; }

int cuCtxGetCurrent(void** current) { return *current = context, 0; }

int cuDevicePrimaryCtxRetain(void** of_device, int device) {
  if (device != 10 && device != 11) return 101;  // CUDA_ERROR_INVALID_DEVICE
  return *of_device = &primary[device - 10], 0;
}

int cuCtxSetCurrent(void* current) { return context = current, 0; }

int cuGetErrorString(int error, const char** text) {
  *text = error == 500 ? "named symbol not found" : "invalid argument";
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode, *mode = before;
  return 0;
}
}
