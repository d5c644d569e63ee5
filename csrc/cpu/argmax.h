// The places of rows' largest values.
#pragma once

#include <cstdint>

namespace helexa {

// out [rows]: of each row of values [rows, cols] the first place of its largest value, or of its first NaN. Throws
// std::invalid_argument for cols < 1.
void argmax(const float* values, int64_t rows, int64_t cols, int64_t* out);

}  // namespace helexa
