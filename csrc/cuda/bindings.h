// The kernels' surface, the same for the cards (helexa_engine._native.cuda) and for their emulation (_simt).
#pragma once

#include <pybind11/pybind11.h>

namespace helexa::cuda {

void bind(pybind11::module_& module);

}  // namespace helexa::cuda
