// AVX-512 level of paged_attention.
#include <immintrin.h>

#include "paged_attention.h"

namespace helexa {
namespace {

#include "vec_avx512.h"
//
#include "vec_math.h"
//
#include "paged_attention_kernels.h"

}  // namespace

const AttentionKernels kAttentionAvx512 = {write_kv, attend};

}  // namespace helexa
