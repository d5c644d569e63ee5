// The whole native surface of helexa_engine._native on one page. The core knows no torch: pointers arrive as integers.
#include <pybind11/pybind11.h>

#include "check.h"
#include "thread_pool.h"

namespace py = pybind11;
using namespace helexa;

PYBIND11_MODULE(_native, module) {
  module.doc() = "helexa's compiled core";

  module.def("num_threads", &num_threads, "Threads that a kernel uses, the calling one among them.");
  module.def("set_num_threads", &set_num_threads, py::arg("n"), "0 restores the default: the physical cores allowed.");
}
