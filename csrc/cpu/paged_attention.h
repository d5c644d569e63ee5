// Attention over paged keys and values: interface, and the two phases that every instruction-set level implements.
#pragma once

#include <cstdint>

#include "quant_blocks.h"

namespace helexa {

constexpr int kPageSize = 64;           // keys in a page; also the block of the online softmax
constexpr int kAttentionTileRows = 48;  // query rows that share one conversion of a page
constexpr int kMaxHeadDim = 512;
constexpr int kScaleBlock = 32;  // dimensions of a block of Q8_0

// Bytes of the keys (or the values) of one head in a page of Q8_0: int8 codes, then a float16 scale a block.
constexpr int64_t quantised_page_bytes(int head_dim) {
  return int64_t(kPageSize) * (head_dim + head_dim / kScaleBlock * 2);
}

// N sequences with T new tokens in all, packed. Names, shapes and meaning as in ops/paged_attention.
struct PagedAttention {
  const float* qkv;             // [T, qkv_width()]; a gated query head is followed by its gate
  const float* q_norm;          // [head_dim]
  const float* k_norm;          // [head_dim]
  const float* cos_sin;         // [max_positions, rotary_dim], cos then sin
  const int64_t* positions;     // [T]
  const int64_t* slot_mapping;  // [T]
  const int32_t* page_tables;   // [N, pages_per_sequence]
  const int32_t* cu_seqlens;    // [N + 1]
  const int32_t* seq_lens;      // [N]
  // float: [num_pages, num_kv_heads, head_dim, kPageSize] and [.., kPageSize, head_dim]. Q8_0: [num_pages,
  // num_kv_heads, quantised_page_bytes], codes of keys [head_dim / 4, kPageSize, 4], of values [kPageSize, head_dim];
  // then scales [head_dim / 32, kPageSize].
  void *k_cache, *v_cache;
  float* ctx;  // [T, num_heads * head_dim]
  int64_t num_tokens, num_sequences, pages_per_sequence, num_pages, max_positions;
  int num_heads, num_kv_heads, head_dim;
  int rotary_dim;     // the first dimensions of each head, half-split; the others do not rotate
  bool gated;         // the context is multiplied by sigmoid(gate)
  QuantType kv_type;  // F32, F16 or Q8_0
  double eps;
  float scale;

  int64_t query_stride() const { return int64_t(gated ? 2 : 1) * head_dim; }
  int64_t keys_at() const { return num_heads * query_stride(); }
  int64_t qkv_width() const { return keys_at() + int64_t(2) * num_kv_heads * head_dim; }
};

// Writes keys and values of the new tokens, then attends. Each query goes over its keys page by page in one fixed
// order: its result does not depend on the tokens beside it, nor on how its prompt was cut into chunks. Throws
// std::invalid_argument naming the first page, slot or position that is out of range; nothing is written then.
void paged_attention(const PagedAttention& args);

// One query tile: up to kAttentionTileRows rows (token, head), heads innermost, of one sequence and one key-value head.
struct AttentionTile {
  int64_t sequence, first_token, num_tokens;
  int kv_head;
};

// What one instruction-set level provides.
struct AttentionKernels {
  // Norm, rotation and cache write of key and value of pairs [begin, end) of (head, new token), token innermost.
  void (*write_kv)(const PagedAttention& args, int64_t begin, int64_t end);
  // scratch: attention_scratch_floats(head_dim) floats, 64-byte aligned.
  void (*attend)(const PagedAttention& args, const AttentionTile& tile, float* scratch);
};

constexpr int64_t attention_scratch_floats(int head_dim) {
  const int64_t blocks = head_dim / kScaleBlock;
  const int64_t quantised = 2 * (kPageSize + kAttentionTileRows) * blocks + kAttentionTileRows * head_dim / 4;
  return int64_t(kPageSize + 2 * kAttentionTileRows) * head_dim + kAttentionTileRows * kPageSize + quantised;
}

extern const AttentionKernels kAttentionGeneric;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#endif

}  // namespace helexa
