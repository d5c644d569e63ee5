#include <immintrin.h>

#include "half.h"
#include "iq_grids.h"
#include "quant_dot.h"

namespace helexa {
namespace {
#include "lanes_avx2.h"
#include "quant_dot_kernels.h"
}  // namespace

extern const Kernels kKernelsAvx2Vnni = kTable;

}  // namespace helexa
