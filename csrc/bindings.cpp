// The whole native surface of helexa_engine._native on one page. The core knows no torch: pointers arrive as integers.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, module) { module.doc() = "helexa's compiled core"; }
