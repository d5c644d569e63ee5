// Matrices from the blocks of a file to planes (quant_planes.h) and back, on the device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// Bytes of the planes of a matrix [rows, cols]. Throws std::invalid_argument for a number that is no type that is kept
// in planes, and for columns that are not whole blocks; as the functions below do.
int64_t planes_bytes(int quant_type, int64_t rows, int64_t cols);

// Rows [first_row, first_row + num_rows) of a matrix [rows, cols] from `source`, which holds these rows alone as blocks
// row-major, into its planes. `planes` is aligned to 256 bytes.
void repack_planes(int quant_type, const void* source, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
                   void* planes, Stream stream);

// The inverse: the bytes that were repacked.
void unpack_planes(int quant_type, const void* planes, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
                   void* out, Stream stream);

}  // namespace helexa::cuda
