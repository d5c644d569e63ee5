// Portable level of causal_conv1d.
#include "causal_conv1d.h"
#include "half.h"

namespace helexa {
namespace {

#include "vec_generic.h"
//
#include "vec_math.h"
//
#include "causal_conv1d_kernels.h"

}  // namespace

const ConvKernels kConvGeneric = {convolve};

}  // namespace helexa
