// The gated delta rule with its norms and gates: interface, and what every instruction-set level implements.
#pragma once

#include <cstdint>

#include "packed_sequences.h"

namespace helexa {

constexpr int kDeltaChunk = 16;  // tokens, from the sequence's first of the call on; what is left goes token by token
constexpr int kMaxDeltaHeadDim = 256;

// Names, shapes and meaning as in ops/gated_delta_rule; rows of the activations lie *_stride apart.
struct GatedDeltaRule {
  const float* qkv;            // [T, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim]
  const float* z;              // [T, num_v_heads * head_v_dim]
  const float* b;              // [T, num_v_heads]
  const float* a;              // [T, num_v_heads]
  const float* a_coefficient;  // [num_v_heads]
  const float* dt_bias;        // [num_v_heads]
  const float* norm_weight;    // [head_v_dim]
  float* state;                // [num_slots, num_v_heads, head_k_dim, head_v_dim]
  float* out;                  // [T, num_v_heads * head_v_dim]
  PackedSequences sequences;
  int64_t qkv_stride, z_stride, b_stride, a_stride;
  int num_k_heads, num_v_heads, head_k_dim, head_v_dim;
  bool tiled;
  double eps;
};

// Advances every sequence's state over its tokens. What a sequence gets does not depend on its company, nor, bit for
// bit, on a cut of its tokens at multiples of kDeltaChunk. Throws std::invalid_argument naming the first argument that
// is out of range; nothing is written then.
void gated_delta_rule(const GatedDeltaRule& args);

// Some value heads of one sequence: the value heads number first to first + count of those that read `key_head`.
struct DeltaTile {
  int64_t sequence;
  int key_head, first, count;
};

// What one instruction-set level provides.
struct DeltaKernels {
  // scratch: delta_scratch_floats(...) floats, 64-byte aligned.
  void (*run)(const GatedDeltaRule& args, const DeltaTile& tile, float* scratch);
};

// For a tile of `count` value heads.
constexpr int64_t delta_scratch_floats(int head_k_dim, int head_v_dim, int count) {
  return int64_t(kDeltaChunk) * (3 * head_k_dim + head_v_dim + 4 * kDeltaChunk + 80) +
         int64_t(count) * head_k_dim * head_v_dim;
}

extern const DeltaKernels kDeltaGeneric;
#if defined(__x86_64__)
extern const DeltaKernels kDeltaAvx2;
extern const DeltaKernels kDeltaAvx512;
#endif

}  // namespace helexa
