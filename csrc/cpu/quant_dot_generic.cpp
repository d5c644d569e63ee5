#include "half.h"
#include "iq_grids.h"
#include "quant_dot.h"

namespace helexa {
namespace {
#include "lanes_generic.h"
#include "quant_dot_kernels.h"
}  // namespace

extern const Kernels kKernelsGeneric = kTable;

}  // namespace helexa
