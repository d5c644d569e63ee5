// Up to eight rows of activations times merged matrices in planes, on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace helexa::cuda {

using Stream = uintptr_t;

constexpr int kMatvecRows = 8;

// A matrix [rows, cols] in planes (quant_planes.h), whose products are multiplied with `scale`.
struct PlanarPart {
  int quant_type;
  const void* planes;
  int64_t rows;
  float scale;
};

struct QuantMatvec {
  std::vector<PlanarPart> parts;  // outputs stand side by side
  int64_t cols = 0;
  const float* x = nullptr;  // [rows, cols], aligned to 16 bytes
  int64_t rows = 0;          // at most kMatvecRows
  // RMSNorm in front, unless null.
  const float* norm_weight = nullptr;
  float norm_eps = 0;
  bool silu_mul = false;      // parts are gates, then as many ups; out = silu(gate) * up
  bool add = false;           // out += instead of out =; not with silu_mul
  bool exact = false;         // BF16 weights meet float32 activations, not bfloat16 ones
  float* out = nullptr;       // [rows, sum of the parts' rows], half of it with silu_mul
  void* workspace = nullptr;  // quant_matvec_workspace(rows, cols) bytes, aligned to 16
};

// Bytes of `workspace`; 0 where none is needed.
size_t quant_matvec_workspace(int64_t rows, int64_t cols);

// Quantised types meet activations quantised to int8, a float32 scale for 32 values; F32, F16, BF16 and I8 float32
// ones, BF16 rounded ones unless `exact`. A row's result is the same bit for bit whatever rows run beside it. Throws
// std::invalid_argument: no parts, more than kMatvecRows rows, a type that is not kept in planes, columns that are not
// whole blocks, with silu_mul a gate and an up of two types or heights.
void quant_matvec(const QuantMatvec& call, Stream stream);

}  // namespace helexa::cuda
