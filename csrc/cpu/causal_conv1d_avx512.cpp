// AVX-512 level of causal_conv1d.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "causal_conv1d.h"

namespace helexa {
namespace {

#include "vec_avx512.h"
//
#include "vec_math.h"
//
#include "causal_conv1d_kernels.h"

}  // namespace

const ConvKernels kConvAvx512 = {convolve};

}  // namespace helexa
