#include "half.h"
#include "iq_grids.h"
#include "quant_blocks.h"
#include "quantize.h"

namespace helexa {
namespace {
constexpr int kWidth = 16;
#include "quantize_kernels.h"
}  // namespace

extern const EncoderTable kEncodersAvx512 = kTable;

}  // namespace helexa
