// out = f(norm(x) @ [parts]^T): norm, quantisation of the activations, all parts and the epilogue in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_matrix.h"

namespace helexa {

enum class Activation { kNone, kSiluMul };

struct QuantMatmul {
  std::vector<const PackedMatrix*> parts;  // all of one column count K; outputs stand side by side
  const float* x;                          // [rows, K]
  int64_t rows;
  float* out;                // [rows, N], N the sum of the parts' rows; [rows, N / 2] with kSiluMul
  const float* norm_weight;  // [K] of an RMSNorm in front, or null
  float norm_eps;
  Activation activation;  // kSiluMul: parts are the gates, then as many ups of equal shapes; out = silu(gate) * up
  bool exact;             // bfloat16 weights meet activations that are not rounded to bfloat16
  const float* residual;  // added to the result, may be `out` itself; null: nothing is added; not with kSiluMul
};

// x and out may not overlap. Throws std::invalid_argument. Calls from several threads take turns.
void quant_matmul(const QuantMatmul& call);

// out [n, cols]: row ids[i] of the matrix, exact. Throws std::invalid_argument for an id out of range.
void quant_embedding(const PackedMatrix& matrix, const int64_t* ids, int64_t n, float* out);

}  // namespace helexa
