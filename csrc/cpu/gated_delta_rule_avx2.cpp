// AVX2 level of gated_delta_rule.
#include <immintrin.h>

#include "gated_delta_rule.h"

namespace helexa {
namespace {

#include "vec_avx2.h"
//
#include "vec_math.h"
//
#include "gated_delta_rule_kernels.h"

}  // namespace

const DeltaKernels kDeltaAvx2 = {run};

}  // namespace helexa
