#include "quant_dot.h"

#include "cpu_features.h"

namespace helexa {

const Kernels& kernels() { return HELEXA_AT_LEVEL(kKernels); }

}  // namespace helexa
