// Memory that a kernel needs for a moment.
#pragma once

#include <cstdint>

namespace helexa {

// The calling thread's scratch memory, 64-byte aligned: at least `floats`, contents undefined. It grows to the largest
// request, stays until the thread ends, and is the same for every caller: the next request may take it over.
float* thread_scratch(int64_t floats);

}  // namespace helexa
