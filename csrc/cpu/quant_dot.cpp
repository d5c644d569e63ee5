#include "quant_dot.h"

#include "cpu_features.h"

namespace helexa {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kAvx512Kernels;
  if (cpu_isa() == CpuIsa::kAvx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace helexa
