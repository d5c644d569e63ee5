// Attention over paged keys and values: checks, the cut into tiles, and the choice of the instruction-set level.
#include "paged_attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu_features.h"
#include "scratch.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr const char* kName = "paged_attention";

// Everything that is used as an index, before it is: a wrong page would read or overwrite another sequence's memory.
void check_arguments(const PagedAttention& p) {
  check(p.head_dim > 0 && p.head_dim % 16 == 0 && p.head_dim <= kMaxHeadDim, kName, "head_dim",
        "a multiple of 16 up to 512", p.head_dim);
  check(p.kv_type == QuantType::F32 || p.kv_type == QuantType::F16 || p.kv_type == QuantType::Q8_0, kName, "kv_type",
        "the number of F32, F16 or Q8_0", int64_t(p.kv_type));
  check(p.kv_type != QuantType::Q8_0 || p.head_dim % kScaleBlock == 0, kName, "head_dim",
        "a multiple of 32 for Q8_0 pages", p.head_dim);
  check(p.rotary_dim > 0 && p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim, kName, "rotary_dim",
        "even, up to head_dim", p.rotary_dim);
  check(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, kName, "num_heads", "a multiple of num_kv_heads",
        p.num_heads);
  check(p.num_heads / p.num_kv_heads <= kAttentionTileRows, kName, "num_heads", "at most 48 a key-value head",
        p.num_heads);
  if (p.num_sequences == 0 && p.num_tokens == 0) return;
  if (p.cu_seqlens[0] != 0) fail_at(kName, "cu_seqlens", 0, "0", p.cu_seqlens[0]);
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1], length = p.seq_lens[i];
    if (end < begin || end > p.num_tokens)
      fail_at(kName, "cu_seqlens", i + 1, std::to_string(begin) + " to " + std::to_string(p.num_tokens), end);
    if (length < end - begin)
      fail_at(kName, "seq_lens", i, "at least its " + std::to_string(end - begin) + " new tokens", length);
    const int64_t pages = (length + kPageSize - 1) / kPageSize;
    if (pages > p.pages_per_sequence)
      fail_at(kName, "seq_lens", i, "at most what " + std::to_string(p.pages_per_sequence) + " pages hold", length);
    const int32_t* table = p.page_tables + i * p.pages_per_sequence;
    for (int64_t j = 0; j < pages; ++j) {
      if (table[j] < 0 || table[j] >= p.num_pages)
        fail_at(kName, "page_tables[" + std::to_string(i) + "]", j, "a page below " + std::to_string(p.num_pages),
                table[j]);
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = length - (end - t);
      if (p.positions[t] != position)
        fail_at(kName, "positions", t, std::to_string(position) + " (the end of its sequence)", p.positions[t]);
      if (position >= p.max_positions)
        fail_at(kName, "positions", t, "below " + std::to_string(p.max_positions), position);
      const int64_t slot = table[position / kPageSize] * int64_t(kPageSize) + position % kPageSize;
      if (p.slot_mapping[t] != slot)
        fail_at(kName, "slot_mapping", t, std::to_string(slot) + " (from page_tables)", p.slot_mapping[t]);
    }
  }
  if (p.cu_seqlens[p.num_sequences] != p.num_tokens)
    fail_at(kName, "cu_seqlens", p.num_sequences, std::to_string(p.num_tokens), p.cu_seqlens[p.num_sequences]);
}

}  // namespace

void paged_attention(const PagedAttention& args) {
  check_arguments(args);
  const AttentionKernels& level = HELEXA_AT_LEVEL(kAttention);
  constexpr int64_t kHeadsPerRange = 32;  // one decode step stays on the calling thread
  parallel_for(args.num_kv_heads * args.num_tokens, kHeadsPerRange,
               [&](int64_t begin, int64_t end, int) { level.write_kv(args, begin, end); });

  const int64_t tile_tokens = kAttentionTileRows / (args.num_heads / args.num_kv_heads);
  std::vector<AttentionTile> tiles;
  for (int64_t i = 0; i < args.num_sequences; ++i) {
    const int64_t begin = args.cu_seqlens[i], end = args.cu_seqlens[i + 1];
    for (int64_t first = begin; first < end; first += tile_tokens) {
      for (int head = 0; head < args.num_kv_heads; ++head) {
        tiles.push_back({i, first, std::min(tile_tokens, end - first), head});
      }
    }
  }
  // The tiles with most keys first, so that the threads end together.
  std::stable_sort(tiles.begin(), tiles.end(), [&](const AttentionTile& a, const AttentionTile& b) {
    return args.positions[a.first_token] > args.positions[b.first_token];
  });
  parallel_for(int64_t(tiles.size()), 1, [&](int64_t begin, int64_t end, int) {
    float* memory = thread_scratch(attention_scratch_floats(args.head_dim));
    for (int64_t i = begin; i < end; ++i) level.attend(args, tiles[i], memory);
  });
}

}  // namespace helexa
