// Attention over paged keys and values: checks, which kernels run, and the one that makes the heads of a prompt ready.
#include "paged_attention.cuh"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr const char* kName = "paged_attention";
constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

// A warp a head of a token: queries normed, rotated and scaled into `queries`, keys and values into their pages.
__global__ void __launch_bounds__(kThreads) prepare_heads(const PagedAttention p, uint16_t* queries) {
  SharedArena arena;
  const Shared<float> exchanges = arena.take<float>(kWarps * kMaxHeadDim);
  const int heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t pair = int64_t(blockIdx.x) * kWarps + warp_index(), token = pair / heads;
  if (token >= p.num_tokens) return;
  const int head = int(pair % heads), kv_head = head - p.num_heads;
  const bool is_query = kv_head < 0, is_value = kv_head >= p.num_kv_heads;
  float values[kMaxHeadDim / 32];
  load_head(values,
            p.qkv + token * qkv_width(p) +
                (is_query ? head * query_stride(p) : p.num_heads * query_stride(p) + int64_t(kv_head) * p.head_dim),
            p.head_dim);
  if (!is_value)
    norm_and_rotate(values, is_query ? p.q_norm : p.k_norm, p.cos_sin + p.positions[token] * p.rotary_dim, p,
                    exchanges + warp_index() * kMaxHeadDim);
  if (is_query) {
    uint16_t* row = queries + (token * p.num_heads + head) * p.head_dim;
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 32; ++i)
      if (lane_index() + 32 * i < p.head_dim)
        row[lane_index() + 32 * i] = bfloat16_from_float(values[i] * query_factor(p));
  } else if (is_value) {
    store_head(values, p, p.v_cache, p.slot_mapping[token], kv_head - p.num_kv_heads);
  } else {
    store_head(values, p, p.k_cache, p.slot_mapping[token], kv_head);
  }
}

// How the work is shared out, by shapes alone.
struct Ways {
  int most_new_tokens;   // of a sequence that the decode kernels take
  bool decode, prefill;  // whether there may be sequences for either
  int64_t workspace_bytes, queries_at;
};

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Ways ways_of(PagedAttention p) {
  check(p.num_kv_heads >= 1 && p.num_heads >= 1 && p.num_heads % p.num_kv_heads == 0, kName, "num_heads",
        "a multiple of num_kv_heads", p.num_heads);
  check(p.head_dim >= 16 && p.head_dim <= kMaxHeadDim && p.head_dim % 16 == 0, kName, "head_dim",
        "a multiple of 16 up to 256", p.head_dim);
  check(!p.quantised || p.head_dim % kScaleBlock == 0, kName, "head_dim", "a multiple of 32 for pages of Q8_0",
        p.head_dim);
  check(p.rotary_dim >= 0 && p.rotary_dim <= p.head_dim && p.rotary_dim % 2 == 0, kName, "rotary_dim",
        "even and at most head_dim", p.rotary_dim);
  check(p.num_sequences >= 1 && p.num_sequences <= 65535, kName, "num_sequences", "1 to 65535", p.num_sequences);
  check(p.num_tokens >= p.num_sequences, kName, "num_tokens", "a new token or more for each sequence", p.num_tokens);
  check(p.pages_per_sequence >= 1, kName, "pages_per_sequence", "at least 1", p.pages_per_sequence);
  const int64_t longest = p.num_tokens - p.num_sequences + 1;
  Ways ways = {int(longest < kFewTokens ? longest : kFewTokens), true, longest > kFewTokens, 0, 0};
  ways.decode = !(ways.prefill && p.num_sequences == 1);
  p.most_new_tokens = ways.most_new_tokens;
  ways.queries_at = ways.decode ? aligned(4 * decode_workspace_floats(p)) : 0;
  ways.workspace_bytes = ways.queries_at + (ways.prefill ? 2 * p.num_tokens * p.num_heads * p.head_dim : 0);
  return ways;
}

}  // namespace

int64_t paged_attention_workspace_bytes(const PagedAttention& args) { return ways_of(args).workspace_bytes; }

void paged_attention(const PagedAttention& args, Stream stream) {
  const Ways ways = ways_of(args);
  check(ways.workspace_bytes == 0 || args.workspace != nullptr, kName, "workspace",
        "the address of a tensor of the bytes that it needs", 0);
  PagedAttention p = args;
  p.most_new_tokens = ways.most_new_tokens;
  auto* queries = reinterpret_cast<uint16_t*>(static_cast<unsigned char*>(p.workspace) + ways.queries_at);
  if (ways.prefill) {
    // For all tokens; what the decode kernels write again has the same bits.
    const int64_t pairs = p.num_tokens * (p.num_heads + 2 * p.num_kv_heads);
    launch<prepare_heads>(kName, dim3(unsigned((pairs + kWarps - 1) / kWarps)), kThreads,
                          kWarps * kMaxHeadDim * sizeof(float), stream, p, queries);
    attend_prefill(p, queries, stream);
  }
  if (ways.decode) attend_decode(p, stream);
}

}  // namespace helexa::cuda
