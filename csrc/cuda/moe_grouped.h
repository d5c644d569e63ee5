// Products of many tokens with their experts' matrices, on tensor cores.
#pragma once

#include <cstdint>

#include "moe_matmul.h"
#include "moe_router.h"

namespace helexa::cuda {

// Rows of a tile (MoeTile::rows at most) that the products take.
constexpr int kNarrowMoeTile = 32, kWideMoeTile = 128;

// out[place] = silu(gate . row) * (up . row) for every place of every tile, or down . row.
struct MoeGrouped {
  ExpertStack a, b;  // gate and up; or down alone
  int num_experts = 0;
  // bfloat16 rows of activations [*, a.cols], and what rounding left of them, which F32 weights need. Place p takes row
  // pair[p] / top_k, or without `pair` row p.
  const uint16_t *x = nullptr, *remainder = nullptr;
  const int32_t* pair = nullptr;
  int top_k = 1;
  // Tiles in device memory, of which there are at most `most_tiles`. Without them places 0 to rows - 1, all of expert
  // 0.
  const MoeTile* tiles = nullptr;
  const int32_t* num_tiles = nullptr;
  int64_t most_tiles = 0, rows = 0;
  int tile_rows = kNarrowMoeTile;
  // [places, a.rows]: of gate and up bfloat16, with what rounding left unless null; of down float32.
  uint16_t *gated = nullptr, *gated_remainder = nullptr;
  float* out = nullptr;
};
// Throws std::invalid_argument for shapes that are no multiples of 32, and without a remainder for F32 weights.
void moe_grouped(const MoeGrouped& call, Stream stream);

// x[t] += sum over ranks of weights[t, rank] * products[place[t * top_k + rank]], then of the shared expert's product.
struct MoeSum {
  float* x;  // [rows, hidden], hidden a multiple of 4
  int64_t rows, hidden;
  int top_k;
  const float* weights;          // [rows, top_k + 1 with a shared expert]
  const int32_t* place;          // [rows * top_k]
  const float* products;         // [rows * top_k, hidden]
  const float* shared_products;  // [rows, hidden], or null
};
void moe_sum(const MoeSum& call, Stream stream);

}  // namespace helexa::cuda
