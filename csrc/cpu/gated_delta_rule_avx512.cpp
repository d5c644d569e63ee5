// AVX-512 level of gated_delta_rule.
#include <immintrin.h>

#include "gated_delta_rule.h"

namespace helexa {
namespace {

#include "vec_avx512.h"
//
#include "vec_math.h"
//
#include "gated_delta_rule_kernels.h"

}  // namespace

const DeltaKernels kDeltaAvx512 = {run};

}  // namespace helexa
