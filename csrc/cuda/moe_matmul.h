// The experts of a sparse block: x += sum over a token's experts of weight * down(silu(gate(y)) * up(y)).
#pragma once

#include <cstdint>

#include "quant_planes.h"

namespace helexa::cuda {

using Stream = uintptr_t;

// Matrices [rows, cols] of one type, the planes (quant_planes.h) of a matrix [experts * rows, cols].
struct ExpertStack {
  int quant_type = 0;
  const void* planes = nullptr;  // null: there is none
  int64_t rows = 0, cols = 0;
  const float* scales = nullptr;  // [experts] that products are multiplied with, or null
};

// gate and up [width, hidden], down [hidden, width]; both sizes are multiples of 32.
struct ExpertStacks {
  ExpertStack gate, up, down;
};

struct MoeMatmul {
  float* x;  // [rows, hidden], added to
  int64_t rows;
  int num_experts, top_k;
  ExpertStacks routed, shared;  // of `shared` one expert, or none
  const int32_t* chosen;        // [rows, top_k], as moe_router left it, and the next
  const float* weights;         // [rows, top_k + 1 with a shared expert]
};

// Up to kFewTokens rows in two launches. A token's result does not depend on the others.
struct MoeFew {
  MoeMatmul moe;
  const float* normed;    // [rows, hidden], and the same quantised, from moe_router
  const uint8_t* codes;   // [rows, hidden]
  const float* scales;    // [rows, hidden / 16, 2]
  float* hidden;          // [rows * (top_k * width + shared width)] for the gated products
  uint8_t* hidden_codes;  // the same quantised
  float* hidden_scales;   // an eighth of that
};
void moe_matmul_few(const MoeFew& call, Stream stream);

}  // namespace helexa::cuda
