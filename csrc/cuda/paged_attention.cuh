// What the attention kernels share: a head made ready by a warp, rows of pages, and tiles for the matrix instructions.
#pragma once

#include "common.cuh"
#include "paged_attention.h"

namespace helexa::cuda {

constexpr int kPageSize = 64;
constexpr int kScaleBlock = 32;  // dimensions of a block of Q8_0
constexpr int kRows = 16;        // query rows of a matrix instruction
constexpr int kMaxHeadDim = 256;
constexpr int kFewTokens = 8;  // new tokens of a sequence up to which its keys are split over blocks
constexpr float kLog2E = 1.44269504f;

// Queries are stored times scale * log2 e: the softmax is then one of powers of 2.
__device__ __forceinline__ float query_factor(const PagedAttention& p) { return p.scale * kLog2E; }

__device__ __forceinline__ int64_t query_stride(const PagedAttention& p) {
  return int64_t(p.gated ? 2 : 1) * p.head_dim;
}
__device__ __forceinline__ int64_t qkv_width(const PagedAttention& p) {
  return p.num_heads * query_stride(p) + int64_t(2) * p.num_kv_heads * p.head_dim;
}

// -- A head in a warp: value i of lane l is dimension l + 32 i, 0 from head_dim on.

template <int kValues>
__device__ __forceinline__ void load_head(float (&head)[kValues], const float* x, int head_dim) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int d = lane_index() + 32 * i;
    head[i] = d < head_dim ? x[d] : 0.0f;
  }
}

// RMSNorm, then the rotation of the first rotary_dim dimensions by `cos_sin`. The operations of the twin in its order,
// none fused, and squares summed in double, so that cached keys are equal to its bit for bit. `exchange` [rotary_dim]
// is the warp's own.
template <int kValues>
__device__ __forceinline__ void norm_and_rotate(float (&head)[kValues], const float* weight, const float* cos_sin,
                                                const PagedAttention& p, const Shared<float>& exchange) {
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) squares += double(head[i]) * double(head[i]);
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
  const double mean = squares / p.head_dim + p.eps;
  // One Newton step from the root in float gives 1 / sqrt in double but for its last ten bits, at a fifth of the price.
  const double guess = 1.0f / sqrtf(float(mean));
  double inverse = guess + 0.5 * guess * (1.0 - mean * guess * guess);
  if (!(mean < 1e37)) inverse = 1.0 / sqrt(mean);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int d = lane_index() + 32 * i;
    if (d < p.head_dim) head[i] = head[i] * float(inverse) * weight[d];
    if (d < p.rotary_dim) exchange[d] = head[i];
  }
  sync_warp();
  const int half = p.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int d = lane_index() + 32 * i;
    if (d < half)
      head[i] = multiply_rounded(head[i], cos_sin[d]) - multiply_rounded(exchange[d + half], cos_sin[d + half]);
    else if (d < p.rotary_dim)
      head[i] = multiply_rounded(head[i], cos_sin[d - half]) + multiply_rounded(exchange[d - half], cos_sin[d]);
  }
  sync_warp();
}

// -- Pages

// Where codes or numbers of the 64 tokens of a head's page begin.
__device__ __forceinline__ const uint16_t* page_numbers(const PagedAttention& p, const void* cache, int64_t page,
                                                        int kv_head) {
  return static_cast<const uint16_t*>(cache) + (page * p.num_kv_heads + kv_head) * kPageSize * p.head_dim;
}
__device__ __forceinline__ const int8_t* page_codes(const PagedAttention& p, const void* cache, int64_t page,
                                                    int kv_head) {
  return static_cast<const int8_t*>(cache) + (page * p.num_kv_heads + kv_head) * (kPageSize / 16 * 17) * p.head_dim;
}

// A head to its token's row in a page.
template <int kValues>
__device__ __forceinline__ void store_head(const float (&head)[kValues], const PagedAttention& p, void* cache,
                                           int64_t slot, int kv_head) {
  const int64_t page = slot / kPageSize;
  const int offset = int(slot % kPageSize), lane = lane_index();
  if (!p.quantised) {
    uint16_t* row = const_cast<uint16_t*>(page_numbers(p, cache, page, kv_head)) + offset * p.head_dim;
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (lane + 32 * i < p.head_dim) row[lane + 32 * i] = bfloat16_from_float(head[i]);
    return;
  }
  int8_t* codes = const_cast<int8_t*>(page_codes(p, cache, page, kv_head));
  uint16_t* scales = reinterpret_cast<uint16_t*>(codes + kPageSize * p.head_dim) + offset * (p.head_dim / kScaleBlock);
  codes += offset * p.head_dim;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (kScaleBlock * i >= p.head_dim) break;
    // quant/quantize.py bit for bit; what is not finite leaves codes of 0 and a scale that is NaN.
    const float scale = warp_max(fabsf(head[i])) / 127.0f;
    const bool finite = ballot(!(fabsf(head[i]) <= 3.402823466e38f)) == 0;
    float over = 1.0f / scale;
    if (!(over <= 3.402823466e38f)) over = 0.0f;
    const float scaled = multiply_rounded(head[i], over);
    codes[lane + 32 * i] = finite ? int8_t(int(scaled + copysignf(0.5f, scaled))) : int8_t(0);
    if (lane == 0) scales[i] = finite ? half_from_float(fminf(scale, 65504.0f)) : uint16_t(0x7e00);
  }
}

// -- Tiles of rows of kDim bfloat16 in shared memory

// The place of an element. Groups of eight change places with the row, so that the same columns of eight rows, which is
// what the matrix instructions read, lie in different banks. d columns behind tile_at(row, 0 or 8), d a multiple of 16,
// is tile_at(row, 0 or 8) ^ d.
template <int kDim>
__device__ __forceinline__ int tile_at(int row, int column) {
  return row * kDim + ((column / 8 ^ row % 8) * 8 + column % 8);
}

using Eight = Vector<uint16_t, 8>;

// Codes as numbers, times their block's scale.
__device__ __forceinline__ Eight dequantised(const Vector<int8_t, 8>& codes, uint16_t scale) {
  const float factor = float_from_half(scale);
  Vector<uint32_t, 4> pairs;
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = bfloat16_pair(float(codes[2 * i]) * factor, float(codes[2 * i + 1]) * factor);
  return bit_cast<Eight>(pairs);
}

// -- Softmax, online: row r of a fragment is row lane / 4 + 8 r of its tile.

struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};  // the same in the four lanes of a row
  float sum[2] = {0.0f, 0.0f};                // of this lane's columns
};

// Scores of 8 kTiles columns become powers of 2 under the new maximum. Returns what sums so far are to be multiplied
// by.
template <int kTiles>
__device__ __forceinline__ Vector<float, 2> soften(Softmax& state, float (&scores)[kTiles][4]) {
  Vector<float, 2> factor;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = state.largest[r];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) largest = fmaxf(largest, scores[i][2 * r + j]);
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const float reference = largest == -INFINITY ? 0.0f : largest;  // nothing visible yet
    factor[r] = exp2_fast(state.largest[r] - reference);
    float sum = state.sum[r] * factor[r];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores[i][2 * r + j] = exp2_fast(scores[i][2 * r + j] - reference);
        sum += scores[i][2 * r + j];
      }
    state.largest[r] = largest;
    state.sum[r] = sum;
  }
  return factor;
}

__device__ __forceinline__ float sum_over_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// The gates of a head, where it has any.
__device__ __forceinline__ const float* gates_of(const PagedAttention& p, int64_t token, int head) {
  return p.qkv + token * qkv_width(p) + head * query_stride(p) + p.head_dim;
}
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-kLog2E * x)); }

// -- Launched by paged_attention.cu

void attend_decode(PagedAttention args, Stream stream);
int64_t decode_workspace_floats(const PagedAttention& args);

// `queries` [T, num_heads, head_dim] bfloat16, normed, rotated and times query_factor.
void attend_prefill(const PagedAttention& args, const uint16_t* queries, Stream stream);

}  // namespace helexa::cuda
