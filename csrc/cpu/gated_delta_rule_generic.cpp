// Portable level of gated_delta_rule.
#include "gated_delta_rule.h"
#include "half.h"

namespace helexa {
namespace {

#include "vec_generic.h"
//
#include "vec_math.h"
//
#include "gated_delta_rule_kernels.h"

}  // namespace

const DeltaKernels kDeltaGeneric = {run};

}  // namespace helexa
