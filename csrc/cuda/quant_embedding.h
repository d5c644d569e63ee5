// Rows of a quantised table as numbers, on the device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// out [n, cols] = rows `ids` [n] of the matrix [rows, cols] in planes (quant_planes.h), bit for bit, times `scale`. An
// id outside of the table gives a row of NaN. `out` is aligned to 16 bytes. Throws std::invalid_argument as
// repack_planes.
void quant_embedding(int quant_type, const void* planes, int64_t rows, int64_t cols, float scale, const int64_t* ids,
                     int64_t n, float* out, Stream stream);

}  // namespace helexa::cuda
