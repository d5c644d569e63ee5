// Attention over paged keys and values on a device: from the q|k|v product to the context.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// N sequences with T new tokens in all, packed. Names, shapes and meaning as in ops/paged_attention; every address is a
// multiple of 16.
struct PagedAttention {
  const float* qkv;             // [T, width]: rows q | k | v, a gated query head is followed by its gate
  const float* q_norm;          // [head_dim]
  const float* k_norm;          // [head_dim]
  const float* cos_sin;         // [max_positions, rotary_dim], cos then sin
  const int64_t* positions;     // [T]: rows of cos_sin
  const int64_t* slot_mapping;  // [T]
  const int32_t* page_tables;   // [N, pages_per_sequence]
  const int32_t* cu_seqlens;    // [N + 1]: a sequence has at least one new token
  const int32_t* seq_lens;      // [N]; 0: a row that only fills a batch up, its context is 0 and nothing is written
  // bfloat16 [num_pages, num_kv_heads, 64, head_dim]. Quantised: int8 [.., 64 + 4, head_dim], a row of codes for each
  // token, then float16 scales [64, head_dim / 32].
  void *k_cache, *v_cache;
  float* ctx;       // [T, num_heads * head_dim]
  void* workspace;  // of workspace_bytes(); what it holds is of no use afterwards
  int64_t num_tokens, num_sequences, pages_per_sequence;
  int num_heads, num_kv_heads, head_dim;
  int rotary_dim;  // the first dimensions of each head, half-split; the others do not rotate
  bool gated;      // the context is multiplied by sigmoid(gate)
  bool quantised;  // pages of Q8_0
  double eps;
  float scale;
  // Set by paged_attention():
  int most_new_tokens;  // of a sequence that the decode kernels take; prompts are those with more
  int most_splits;      // of a sequence's keys
};

// Writes keys and values of the new tokens, then attends. Which kernels run and how many blocks depends on shapes
// alone, so that a captured call may be replayed with other lengths and tables. What a sequence gets depends on its own
// tokens and length, never on what lies beside it. Throws std::invalid_argument naming the shape that is not supported.
void paged_attention(const PagedAttention& args, Stream stream);

// Bytes that paged_attention() needs as a workspace, from the shapes in `args`.
int64_t paged_attention_workspace_bytes(const PagedAttention& args);

}  // namespace helexa::cuda
