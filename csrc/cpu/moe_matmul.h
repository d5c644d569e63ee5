// A sparse feed-forward block in one call: norm, router, the chosen experts' SwiGLU and their weighted sum, x added.
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace helexa {

// Gates and ups [F, H], downs [H, F]; stacks of one size. A gate and its up may differ in type.
struct Experts {
  const PackedMatrix *gate, *up, *down;
};

struct MoeMatmul {
  float* x;  // [rows, H]; the block's output is added in place
  int64_t rows;
  const float* norm_weight;  // [H] of the RMSNorm in front, or null
  float norm_eps;
  const PackedMatrix* router;  // F32 [E, H]; with a shared expert [E + 1, H], the last row that expert's gate
  Experts experts;             // stacks of E
  Experts shared;              // one expert that every token uses, times sigmoid of its gate; nulls: none
  int top_k;                   // experts a token
  bool norm_topk_prob;         // the weights of the chosen experts are divided by their sum
};

// Throws std::invalid_argument. Calls from several threads take turns. A row's result does not depend on the others.
void moe_matmul(const MoeMatmul& call);

}  // namespace helexa
