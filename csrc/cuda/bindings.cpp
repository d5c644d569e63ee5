#include "bindings.h"

#include "../check.h"
#include "dequantize.h"

namespace py = pybind11;

namespace helexa::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address, const char* function, const char* argument) {
  check_pointer(address, function, argument);
  return reinterpret_cast<T*>(address);
}

}  // namespace

// Every function takes addresses of device memory and a CUDA stream (0: the default one), and returns when its kernels
// are queued.
void bind(py::module_& module) {
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
