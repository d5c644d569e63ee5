// Which experts a token goes to, and with what weights; and the tokens grouped by expert.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

constexpr int kMostExperts = 512, kMostTopK = 16;

// logits = norm(x) weight^T in float32; their softmax over all experts; the top_k largest, of equal ones the lowest
// index first. All arrays lie on the device, rows one behind the other.
struct MoeRouter {
  const float* x;            // [rows, cols]
  int64_t rows, cols;        // cols a multiple of 32
  const float* norm_weight;  // [cols], of an RMSNorm; null without one
  float norm_eps;
  const float* weight;  // [num_experts, cols], and with a shared expert its gate as one more row
  int num_experts, top_k;
  bool norm_topk_prob, shared;
  uint32_t* ticket;            // [1], 0 before and after
  float* logits;               // [rows, num_experts + shared]
  float* normed;               // [rows, cols]
  uint16_t* normed_bf16;       // the same as bfloat16, or null
  uint16_t* normed_remainder;  // what rounding left of them, as bfloat16, or null
  uint8_t* codes;              // the same as int8 with scales as quantised_rows.cuh says, or null
  float* scales;               // [rows, cols / 16, 2]
  int32_t* chosen;             // [rows, top_k] in ascending order
  float* weights;  // [rows, top_k + shared] in the order of `chosen`, then the sigmoid of the shared gate's logit
};

// One launch up to kFewTokens rows, three of more; the same bits for a row however many stand beside it.
void moe_router(const MoeRouter& call, Stream stream);

constexpr int kFewTokens = 8;

// Up to `tile_rows` pairs of one expert: places [first, first + rows) in the grouped order.
struct MoeTile {
  int32_t expert, first, rows;
};

// Most tiles that `pairs` pairs can make.
constexpr int64_t most_moe_tiles(int64_t pairs, int64_t num_experts, int64_t tile_rows) {
  return pairs / tile_rows + (pairs < num_experts ? pairs : num_experts);
}

// The pairs (token * top_k + rank) sorted by expert, of one expert in ascending order, and cut into tiles.
struct MoeGroups {
  const int32_t* chosen;  // [pairs]
  int64_t pairs;
  int num_experts, tile_rows;
  int32_t* pair;       // [pairs]: which one stands at a place
  int32_t* place;      // [pairs]: where a pair stands
  MoeTile* tiles;      // [most_moe_tiles]
  int32_t* num_tiles;  // [1]
};

void moe_group(const MoeGroups& call, Stream stream);

}  // namespace helexa::cuda
