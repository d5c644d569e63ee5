// Stored types to numbers on a device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// `n` values at `source`, a whole number of blocks, as float32 or (uint16_t) as bfloat16, rounded to the nearest. `out`
// is aligned to 16 bytes. Throws std::invalid_argument for a number that is no stored type and for a part of a block.
template <class Out>
void dequantize(int quant_type, const void* source, int64_t n, Out* out, Stream stream);

}  // namespace helexa::cuda
