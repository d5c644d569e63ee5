// AVX-512 level of causal_conv1d.
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
