// Ceilings of this machine, measured: what the benchmarks hold results against.
#pragma once

#include <cstdint>

namespace helexa {

// Bytes a second of the best of `repeats` passes that read `nbytes` on `threads` threads (0: all).
double read_bandwidth(int64_t nbytes, int threads, int repeats);
// Operations (a multiply and an add count two) a second of int8 dot products, of float32 multiply-adds and of bfloat16
// products added to float32, all threads.
double int8_rate();
double float_rate();
double bfloat16_rate();

}  // namespace helexa
