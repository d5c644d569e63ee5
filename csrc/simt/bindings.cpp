// The module _simt: the CUDA kernels on a CPU, and the memory that their tests give them. It is built for tests and is
// in no wheel.
#include "../cuda/bindings.h"

#include <pybind11/pybind11.h>

#include "self_test.h"
#include "simt.h"

namespace py = pybind11;
using namespace helexa;

PYBIND11_MODULE(_simt, module) {
  module.doc() = "The CUDA kernels under the emulation of csrc/simt";
  cuda::bind(module);

  py::class_<simt::Guarded>(module, "Guarded", py::buffer_protocol(),
                            "Bytes between two pages that nothing may touch, "
                            "right behind the first or right before the second.")
      .def(py::init<size_t, bool>(), py::arg("nbytes"), py::arg("at_front"))
      .def_buffer([](simt::Guarded& memory) {
        return py::buffer_info(memory.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {memory.size()}, {1});
      });
  module.def("set_thread_order", &simt::set_thread_order, py::arg("order"),
             "The order in which a block's threads run: 0 ascending, 1 descending, else shuffled with this seed.");
  module.def(
      "fail_launches", &simt::fail_launches, py::arg("code"), py::arg("after") = 0, py::arg("sticks") = false,
      "Lets a launch raise CudaError, `after` launches that do not; all later ones too where it `sticks`. Code 0 "
      "mends it.");

  py::module_ self_test = module.def_submodule("self_test", "Kernels for the emulation's own tests");
  self_test.def("sums", [](uintptr_t x, uintptr_t out, int blocks) {
    simt_test::run_sums(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), blocks);
  });
  self_test.def("faulty", [](uintptr_t x, uintptr_t out, int which) {
    simt_test::run_faulty(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), which);
  });
  self_test.def("multiply", [](uintptr_t a, uintptr_t b, uintptr_t c, bool is_int8) {
    simt_test::run_multiply(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                            reinterpret_cast<void*>(c), is_int8);
  });
}
