#pragma once

#include <pybind11/pybind11.h>

namespace fastprompt {

// Adds what launches csrc/cuda's kernels to the module.
void define_cuda(pybind11::module_& m);

}  // namespace fastprompt
