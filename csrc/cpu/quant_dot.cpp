#include "quant_dot.h"

#include "cpu_features.h"

namespace helexa {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (multiplies_bfloat16()) return kKernelsAvx512Bf16;
  if (cpu_isa() == CpuIsa::kAvx2Vnni) return kKernelsAvx2Vnni;
#endif
  return HELEXA_AT_LEVEL(kKernels);
}

}  // namespace helexa
