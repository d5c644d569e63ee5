#include "devices.h"

#include <cuda_runtime_api.h>

#include "cuda_error.h"

namespace helexa::cuda {
namespace {

void check_status(cudaError_t status, const char* function) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else torch would take it for its own
  throw CudaError(status, std::string(function) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

}  // namespace

int driver_version() {
  int version = 0;
  check_status(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

int runtime_version() {
  int version = 0;
  check_status(cudaRuntimeGetVersion(&version), "runtime_version");
  return version;
}

std::vector<Device> devices() {
  int count = 0;
  check_status(cudaGetDeviceCount(&count), "devices");
  std::vector<Device> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check_status(cudaGetDeviceProperties(&properties, i), "devices");
    found.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
  }
  return found;
}

}  // namespace helexa::cuda
