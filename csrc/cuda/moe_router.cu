// The router of a sparse block and the grouping of its tokens by expert.
//
// A logit is added up by one warp, whatever the number of tokens: lane l takes columns 128 j + 4 l to + 3 in ascending
// order, fused, and the lanes' sums meet in warp_sum. So a token's experts do not depend on what is computed beside it.
// Nothing here may be rounded to fewer bits than float32: one flipped expert changes a token more than all products.
#include "common.cuh"
#include "moe_router.h"
#include "order.cuh"
#include "quantised_rows.cuh"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kStep = 4 * kWarpSize;  // columns that a warp takes at once
using Float4 = Vector<float, 4>;

// 1 / sqrt(mean(x^2) + eps) of a row, in every lane.
__device__ __forceinline__ float row_scale(const float* x, int64_t cols, float eps) {
  float sum = 0;
  for (int64_t at = 4 * lane_index(); at < cols; at += kStep) {
    const Float4 part = load_global<Float4>(x + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(part[i], part[i], sum);
  }
  return 1.0f / sqrtf(warp_sum(sum) / float(cols) + eps);
}

// Of an RMSNorm; ones without one, which change no bit.
__device__ __forceinline__ Float4 load_norm_weight(const float* norm_weight, int64_t at) {
  return norm_weight ? load_global<Float4>(norm_weight + at) : Float4{1.0f, 1.0f, 1.0f, 1.0f};
}
__device__ __forceinline__ Float4 normalised(Float4 x, const Float4& norm_weight, float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = norm_weight[i] * x[i] * scale;
  return x;
}

__device__ __forceinline__ void add_products(float& sum, const Float4& a, const Float4& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(a[i], b[i], sum);
}

__device__ __forceinline__ void store_normalised(const MoeRouter& call, int64_t row, float scale) {
  const int64_t first = row * call.cols;
  for (int64_t from = 0; from < call.cols; from += kStep) {
    const int64_t at = from + 4 * lane_index();
    const bool holds = at < call.cols;
    Float4 part = {};
    if (holds) {
      part = normalised(load_global<Float4>(call.x + first + at), load_norm_weight(call.norm_weight, at), scale);
      store_global(call.normed + first + at, part);
    }
    if (call.normed_bf16 && holds) {
      Vector<uint16_t, 4> rounded, remainder;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rounded[i] = bfloat16_from_float(part[i]);
        remainder[i] = bfloat16_from_float(part[i] - float_from_bfloat16(rounded[i]));
      }
      store_global(call.normed_bf16 + first + at, rounded);
      if (call.normed_remainder) store_global(call.normed_remainder + first + at, remainder);
    }
    if (call.codes) store_quantised(part, holds, call.codes, call.scales, first + at);
  }
}

// One row's choice, by one warp.
__device__ __forceinline__ void choose_row(const MoeRouter& call, int64_t row) {
  constexpr int kPerLane = kMostExperts / kWarpSize;
  const int lane = lane_index(), width = call.num_experts + call.shared;
  const float* logits = call.logits + row * width;
  uint32_t keys[kPerLane];  // of expert 32 i + lane; 0 when there is none or it is taken
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    keys[i] = expert < call.num_experts ? order_of(load_fresh(logits + expert)) : 0;
  }
  float largest = 0, all = 0, logit = 0;  // `logit` and `mine` are those of rank `lane`
  int mine = 0;
  for (int rank = 0; rank < call.top_k; ++rank) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (keys[i] > best) best = keys[i], at = i;
    const uint32_t top = warp_max(best);
    // The lowest index among equals: the largest of the indices' complements.
    const int winner = int(~warp_max(best == top ? ~uint32_t(at * kWarpSize + lane) : 0u));
    if (rank == 0) {
      largest = value_of(top);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (keys[i]) all += expf(value_of(keys[i]) - largest);
      all = warp_sum(all);
    }
    if (lane == rank) mine = winner, logit = value_of(top);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (winner == i * kWarpSize + lane) keys[i] = 0;
  }
  const bool takes = lane < call.top_k;
  const float exponential = takes ? expf(logit - largest) : 0.0f;
  const float total = call.norm_topk_prob ? warp_sum(exponential) : all;
  int place = 0;
  for (int rank = 0; rank < call.top_k; ++rank) place += shuffle(mine, rank) < mine;
  if (takes) {
    call.chosen[row * call.top_k + place] = mine;
    // A NaN among the logits hides from comparisons but not from their sum.
    call.weights[row * (call.top_k + call.shared) + place] = all != all ? all : exponential / total;
  }
  if (call.shared && lane == 0)
    call.weights[row * (call.top_k + 1) + call.top_k] = 1.0f / (1.0f + expf(-load_fresh(logits + call.num_experts)));
}

// Up to kFewTokens rows in one launch: a warp takes one row of the router for all tokens; the block that ends last
// makes the choice. What is read of the weights does not wait for the norm.
__global__ void __launch_bounds__(128) route_few(MoeRouter call) {
  SharedArena arena;
  const Shared<uint32_t> ticket = arena.take<uint32_t>(1);
  const int warps = int(blockDim.x) / kWarpSize, width = call.num_experts + call.shared;
  const int output = int(blockIdx.x) * warps + warp_index(), rows = int(call.rows);
  const int64_t cols = call.cols;
  constexpr int kAhead = 8;
  Float4 ahead[kAhead] = {};
  const auto load = [&](int64_t from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = from + i * kStep + 4 * lane_index();
      if (at < cols) ahead[i] = load_streaming<Float4>(call.weight + output * cols + at);
    }
  };
  if (output < width) load(0);
  float scales[kFewTokens];
#pragma unroll
  for (int t = 0; t < kFewTokens; ++t) {
    scales[t] = t < rows && call.norm_weight ? row_scale(call.x + t * cols, cols, call.norm_eps) : 1.0f;
    if (t == output && t < rows) store_normalised(call, t, scales[t]);
  }
  if (output < width) {
    float sums[kFewTokens] = {};
    for (int64_t from = 0; from < cols; from += kAhead * kStep) {
      if (from) load(from);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = from + i * kStep + 4 * lane_index();
        if (at >= cols) continue;
        const Float4 norm_weight = load_norm_weight(call.norm_weight, at);
#pragma unroll
        for (int t = 0; t < kFewTokens; ++t) {
          if (t >= rows) continue;
          const Float4 x = load_global<Float4>(call.x + t * cols + at);
          add_products(sums[t], normalised(x, norm_weight, scales[t]), ahead[i]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kFewTokens; ++t) {
      if (t >= rows) continue;
      const float sum = warp_sum(sums[t]);
      if (lane_index() == 0) call.logits[t * width + output] = sum;
    }
  }
  fence_device();
  sync_threads();
  if (threadIdx.x == 0) ticket[0] = add_atomic(call.ticket, 0, 1u);
  sync_threads();
  if (ticket[0] != gridDim.x - 1) return;
  fence_device();
  for (int row = warp_index(); row < rows; row += warps) choose_row(call, row);
  if (threadIdx.x == 0) call.ticket[0] = 0;
}

constexpr int kRowWarps = 8;

__global__ void __launch_bounds__(kRowWarps* kWarpSize) normalise_rows(MoeRouter call) {
  const int64_t row = int64_t(blockIdx.x) * kRowWarps + warp_index();
  if (row >= call.rows) return;
  const float scale = call.norm_weight ? row_scale(call.x + row * call.cols, call.cols, call.norm_eps) : 1.0f;
  store_normalised(call, row, scale);
}

// logits [rows, width] = normed weight^T. A warp computes kTokens x kOutputs of them, a block kWarps x kWarps warps'.
// Operands come from the L1 cache, where the block's warps meet: 14 loads of 16 bytes for 192 fused products (8 x 6)
// keep the cache and the multipliers almost equally busy; 8 x 8 would leave room for half as many warps.
template <int kTokens, int kOutputs, int kWarps>
__global__ void __launch_bounds__(kWarps * kWarps * kWarpSize) router_logits(MoeRouter call) {
  const int width = call.num_experts + call.shared;
  int64_t first_row = (int64_t(blockIdx.y) * kWarps + warp_index() / kWarps) * kTokens;
  int first_output = (int(blockIdx.x) * kWarps + warp_index() % kWarps) * kOutputs;
  if (first_row >= call.rows || first_output >= width) return;
  // The last tile lies within the matrix and computes some of its neighbour's logits again: the same bits.
  if (first_row > call.rows - kTokens) first_row = call.rows - kTokens;
  if (first_output > width - kOutputs) first_output = width - kOutputs;
  const int cols = int(call.cols);
  const float* rows = call.normed + first_row * cols + 4 * lane_index();
  const float* outputs = call.weight + int64_t(first_output) * cols + 4 * lane_index();
  float sums[kTokens][kOutputs] = {};
  for (int left = cols - 4 * lane_index(); left > 0; left -= kStep, rows += kStep, outputs += kStep) {
    Float4 weights[kOutputs];
#pragma unroll
    for (int e = 0; e < kOutputs; ++e) weights[e] = load_global<Float4>(outputs + e * cols);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const Float4 value = load_global<Float4>(rows + t * cols);
#pragma unroll
      for (int e = 0; e < kOutputs; ++e) add_products(sums[t][e], value, weights[e]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int e = 0; e < kOutputs; ++e) {
      const float sum = warp_sum(sums[t][e]);
      if (lane_index() == 0) call.logits[(first_row + t) * width + first_output + e] = sum;
    }
  }
}

__global__ void __launch_bounds__(kRowWarps* kWarpSize) choose_experts(MoeRouter call) {
  const int64_t row = int64_t(blockIdx.x) * kRowWarps + warp_index();
  if (row < call.rows) choose_row(call, row);
}

// One block an expert. Each counts all pairs, so that none waits for another: the pairs are few and lie in the cache.
constexpr int kGroupWarps = 8, kGroupThreads = kGroupWarps * kWarpSize;

__global__ void __launch_bounds__(kGroupThreads) group_by_expert(MoeGroups call) {
  SharedArena arena;
  const Shared<int> counts = arena.take<int>(call.num_experts);
  const Shared<int> before = arena.take<int>(2);  // pairs and tiles of the experts below
  const Shared<int> found = arena.take<int>(kGroupWarps);
  const int expert = int(blockIdx.x), lane = lane_index(), warp = warp_index();
  for (int e = int(threadIdx.x); e < call.num_experts; e += kGroupThreads) counts[e] = 0;
  if (threadIdx.x < 2) before[threadIdx.x] = 0;
  sync_threads();
  // A warp has the same part of the pairs here and below, so that places ascend with the pairs.
  const int64_t part = (call.pairs + kGroupThreads - 1) / kGroupThreads * kWarpSize;
  const int64_t first = part * warp, end = first + part < call.pairs ? first + part : call.pairs;
  int mine = 0;
  for (int64_t p = first + lane; p < end; p += kWarpSize) {
    const int e = call.chosen[p];
    add_atomic(counts, e, 1);
    mine += e == expert;
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) mine += shuffle_xor(mine, mask);
  if (lane == 0) found[warp] = mine;
  sync_threads();
  for (int e = int(threadIdx.x); e < expert; e += kGroupThreads) {
    const int count = counts[e];
    add_atomic(before, 0, count);
    add_atomic(before, 1, (count + call.tile_rows - 1) / call.tile_rows);
  }
  sync_threads();
  const int count = counts[expert], first_place = before[0], first_tile = before[1];
  int place = first_place;
  for (int w = 0; w < warp; ++w) place += found[w];
  for (int64_t from = first; from < end; from += kWarpSize) {
    const int64_t p = from + lane;
    const bool belongs = p < end && call.chosen[p] == expert;
    const uint32_t all = ballot(belongs);
    if (belongs) {
      const int at = place + count_bits(all & ((1u << lane) - 1));
      call.pair[at] = int32_t(p);
      call.place[p] = at;
    }
    place += count_bits(all);
  }
  const int tiles = (count + call.tile_rows - 1) / call.tile_rows;
  for (int i = int(threadIdx.x); i < tiles; i += kGroupThreads) {
    const int done = i * call.tile_rows, left = count - done;
    call.tiles[first_tile + i] = {expert, first_place + done, left < call.tile_rows ? left : call.tile_rows};
  }
  if (expert == call.num_experts - 1 && threadIdx.x == 0) call.num_tiles[0] = first_tile + tiles;
}

unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

template <int kTokens, int kOutputs, int kWarps>
void launch_logits(const MoeRouter& call, Stream stream) {
  const dim3 grid(blocks(call.num_experts + call.shared, kOutputs * kWarps), blocks(call.rows, kTokens * kWarps));
  launch<router_logits<kTokens, kOutputs, kWarps>>("moe_router", grid, kWarps * kWarps * kWarpSize, 0, stream, call);
}

}  // namespace

void moe_router(const MoeRouter& call, Stream stream) {
  constexpr const char* f = "moe_router";
  check(call.rows >= 0, f, "rows", "0 or more", call.rows);
  check(call.cols > 0 && call.cols % 32 == 0 && call.cols <= 1 << 20, f, "cols", "a multiple of 32 up to 2^20",
        call.cols);
  check(call.num_experts >= 1 && call.num_experts <= kMostExperts, f, "num_experts", "1 to 512", call.num_experts);
  const int most = call.num_experts < kMostTopK ? call.num_experts : kMostTopK;
  if (call.top_k < 1 || call.top_k > most) fail(f, "top_k", "1 to " + std::to_string(most), std::to_string(call.top_k));
  if (call.rows == 0) return;
  const int width = call.num_experts + call.shared;
  if (call.rows <= kFewTokens) {
    const int warps = call.rows <= 2 ? 2 : 4;  // enough blocks for every multiprocessor, then enough warps to choose
    // At least as many warps as tokens, each of which one writes out.
    const unsigned grid = blocks(width > call.rows ? width : call.rows, warps);
    launch<route_few>(f, dim3(grid), warps * kWarpSize, 16, stream, call);
    return;
  }
  launch<normalise_rows>(f, dim3(blocks(call.rows, kRowWarps)), kRowWarps * kWarpSize, 0, stream, call);
  static_assert(kFewTokens >= 8, "a tile of the logits has eight rows");
  if (call.rows <= 128 || width < 6)
    launch_logits<8, 1, 2>(call, stream);
  else
    launch_logits<8, 6, 4>(call, stream);
  launch<choose_experts>(f, dim3(blocks(call.rows, kRowWarps)), kRowWarps * kWarpSize, 0, stream, call);
}

void moe_group(const MoeGroups& call, Stream stream) {
  constexpr const char* f = "moe_group";
  check(call.pairs >= 0 && call.pairs <= INT32_MAX, f, "pairs", "0 to 2^31 - 1", call.pairs);
  check(call.num_experts >= 1 && call.num_experts <= kMostExperts, f, "num_experts", "1 to 512", call.num_experts);
  check(call.tile_rows >= 1, f, "tile_rows", "at least 1", call.tile_rows);
  const size_t shared_bytes = size_t((call.num_experts + 3) / 4 * 4 + 4 + kGroupWarps) * sizeof(int);
  launch<group_by_expert>(f, dim3(unsigned(call.num_experts)), kGroupThreads, shared_bytes, stream, call);
}

}  // namespace helexa::cuda
