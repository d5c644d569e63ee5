// What this machine and this build have of CUDA. Nothing here makes a context, and all of it answers without a driver.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace helexa::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  size_t memory_bytes;
};

// The newest CUDA that the driver has, and that of the runtime in this build: 13000 is 13.0. 0: there is no driver.
int driver_version();
int runtime_version();

// The devices that this process may use. Throws CudaError: no driver, one that is too old, no device ...
std::vector<Device> devices();

}  // namespace helexa::cuda
