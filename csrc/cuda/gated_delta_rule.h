// The gated delta rule with its norms and gates, token by token, on a device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

constexpr int kMaxDeltaHeadDim = 128;  // of keys and of values

// Names, shapes and meaning as in ops/gated_delta_rule; rows of the activations lie *_stride apart. Slots and borders
// lie on the device and are taken on trust; rows of `out` that belong to no sequence are left as they are.
struct GatedDeltaRule {
  const float* qkv;            // [T, channels], channels = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim
  const float* z;              // [T, num_v_heads * head_v_dim]
  const float* b;              // [T, num_v_heads]
  const float* a;              // [T, num_v_heads]
  const float* a_coefficient;  // [num_v_heads]
  const float* dt_bias;        // [num_v_heads]
  const float* norm_weight;    // [head_v_dim]
  float* state;                // [num_slots, num_v_heads, head_k_dim, head_v_dim]
  const int32_t* state_slots;  // [num_sequences]
  const int32_t* cu_seqlens;   // [num_sequences + 1]
  float* out;                  // [T, num_v_heads * head_v_dim]
  int64_t qkv_stride, z_stride, b_stride, a_stride;
  int num_sequences, num_k_heads, num_v_heads, head_k_dim, head_v_dim;
  float eps;
  bool tiled;
  // Which of a sequence's tokens: all of them (chunk 0), or those behind its whole chunks of `chunk` tokens, where a
  // rest of `chunk_from` tokens or more counts as a chunk.
  int chunk, chunk_from;
  // The convolution in front, where qkv is what it takes and not what it gave: names as in ops/causal_conv1d. Only
  // with chunk 0.
  const float* conv_weight;  // [channels, taps], null without a convolution
  float* conv_state;         // [num_slots, taps - 1, channels]
  int taps;
  int32_t* arrivals;  // [num_sequences * num_k_heads], 0 before and after a launch
};

// One launch, whatever the lengths. What a sequence gets is the same, bit for bit, whatever runs beside it and however
// its tokens are cut. Throws std::invalid_argument for sizes that it can't take.
void gated_delta_rule(const GatedDeltaRule& args, Stream stream);

}  // namespace helexa::cuda
