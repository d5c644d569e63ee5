// The place of each row's largest value on a device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// Words of scratch memory that argmax needs.
int64_t argmax_scratch_words(int64_t rows, int64_t cols);

// values [rows, cols] -> out [rows]: the first place among equals; a NaN counts as the largest of all. `scratch` has
// argmax_scratch_words and may hold anything.
void argmax(const float* values, int64_t rows, int64_t cols, uint64_t* scratch, int64_t* out, Stream stream);

}  // namespace helexa::cuda
