// Portable level of paged_attention.
#include "half.h"
#include "paged_attention.h"

namespace helexa {
namespace {

#include "vec_generic.h"
//
#include "vec_math.h"
//
#include "paged_attention_kernels.h"

}  // namespace

const AttentionKernels kAttentionGeneric = {write_kv, attend};

}  // namespace helexa
