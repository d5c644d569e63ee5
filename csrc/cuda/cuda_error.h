// What a call of the CUDA runtime failed with. Python sees it as CudaError with an attribute `code`, a number of
// cudaError_t, by which helexa_engine/runtime/device_faults.py tells what is lost.
#pragma once

#include <stdexcept>
#include <string>

namespace helexa::cuda {

class CudaError : public std::runtime_error {
 public:
  CudaError(int code, const std::string& message) : std::runtime_error(message), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

}  // namespace helexa::cuda
