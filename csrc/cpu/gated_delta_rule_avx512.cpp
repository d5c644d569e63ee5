// AVX-512 level of gated_delta_rule.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
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
