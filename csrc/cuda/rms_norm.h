// float32 activations as a product on tensor cores takes them.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

struct RmsNorm {
  const float* x;  // [rows, cols], aligned to 16 bytes; cols a multiple of 4
  int64_t rows, cols;
  const float* weight;  // [cols] of an RMSNorm; null: x as it is
  float eps;
  uint16_t* out;        // bfloat16 [rows, cols]
  uint16_t* remainder;  // the same of what rounding leaves, or null
};

// One launch; a row's result does not depend on the others.
void rms_norm(const RmsNorm& call, Stream stream);

}  // namespace helexa::cuda
