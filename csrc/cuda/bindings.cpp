#include "bindings.h"

#include "../check.h"
#include "cuda_error.h"
#include "dequantize.h"
#ifndef HELEXA_SIMT
#include "devices.h"
#endif

namespace py = pybind11;

namespace helexa::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address, const char* function, const char* argument) {
  check_pointer(address, function, argument);
  return reinterpret_cast<T*>(address);
}

// CudaError in Python: a RuntimeError with the attribute `code`. Each of the two modules has one of its own.
void bind_error(py::module_& module) {
  static PyObject* type = py::exception<CudaError>(module, "CudaError", PyExc_RuntimeError).release().ptr();
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const CudaError& error) {
      py::object raised = py::reinterpret_borrow<py::object>(type)(error.what());
      raised.attr("code") = error.code();
      PyErr_SetObject(type, raised.ptr());
    }
  });
}

#ifndef HELEXA_SIMT
// What helexa_engine/runtime/cuda_device.py judges by.
void bind_facts(py::module_& module) {
  module.attr("architectures") = HELEXA_CUDA_ARCHITECTURES;  // "80 86 89 90a 120"
  module.def("driver_version", &driver_version, "The newest CUDA of the driver, 13000 for 13.0; 0 without a driver.");
  module.def("runtime_version", &runtime_version, "The CUDA that this module was built with.");
  module.def(
      "devices",
      [] {
        py::list found;
        for (const Device& device : devices())
          found.append(py::make_tuple(device.name, device.major, device.minor, device.memory_bytes));
        return found;
      },
      "(name, major, minor, memory in bytes) of each device that this process may use. Makes no context.");
}
#endif

}  // namespace

// Every function takes addresses of device memory and a CUDA stream (0: the default one), and returns when its kernels
// are queued.
void bind(py::module_& module) {
  bind_error(module);
#ifndef HELEXA_SIMT
  bind_facts(module);
#endif
  module.def(
      "dequantize",
      [](int quant_type, uintptr_t source, int64_t n, uintptr_t out, bool bfloat16, Stream stream) {
        constexpr const char* f = "dequantize";
        const auto* from = pointer<const void>(source, f, "source");
        if (bfloat16)
          dequantize(quant_type, from, n, pointer<uint16_t>(out, f, "out"), stream);
        else
          dequantize(quant_type, from, n, pointer<float>(out, f, "out"), stream);
      },
      py::arg("quant_type"), py::arg("source"), py::arg("n"), py::arg("out"), py::arg("bfloat16"),
      py::arg("stream") = 0, "n values (whole blocks) as float32, or rounded to bfloat16.");
}

}  // namespace helexa::cuda
