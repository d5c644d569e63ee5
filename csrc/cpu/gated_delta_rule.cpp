// The gated delta rule: checks, the cut into tiles, and the choice of the instruction-set level.
#include "gated_delta_rule.h"

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu_features.h"
#include "scratch.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr const char* kName = "gated_delta_rule";

void check_arguments(const GatedDeltaRule& p) {
  for (const auto& [name, dim] : {std::pair("head_k_dim", p.head_k_dim), std::pair("head_v_dim", p.head_v_dim)}) {
    check(dim > 0 && dim % 16 == 0 && dim <= kMaxDeltaHeadDim, kName, name, "a multiple of 16 up to 256", dim);
  }
  check(p.num_k_heads > 0, kName, "num_k_heads", "at least 1", p.num_k_heads);
  check(p.num_v_heads > 0 && p.num_v_heads % p.num_k_heads == 0, kName, "num_v_heads", "a multiple of num_k_heads",
        p.num_v_heads);
  const int64_t value_dim = int64_t(p.num_v_heads) * p.head_v_dim;
  const auto check_stride = [](const char* name, int64_t stride, int64_t width) {
    check(stride >= width, kName, name, "rows at least as far apart as they are wide", stride);
  };
  check_stride("qkv", p.qkv_stride, 2 * int64_t(p.num_k_heads) * p.head_k_dim + value_dim);
  check_stride("z", p.z_stride, value_dim);
  check_stride("b", p.b_stride, p.num_v_heads);
  check_stride("a", p.a_stride, p.num_v_heads);
}

}  // namespace

void gated_delta_rule(const GatedDeltaRule& args) {
  check_arguments(args);
  const PackedSequences& sequences = args.sequences;
  if (sequences.num_sequences == 0 && sequences.num_tokens == 0) return;
  check_packed_sequences(kName, sequences);

  // The value heads of one key head share its norms and products while there is work for every thread without cutting.
  const int group = args.num_v_heads / args.num_k_heads;
  const bool share = sequences.num_sequences * args.num_k_heads >= 2 * num_threads();
  std::vector<DeltaTile> tiles;
  for (int64_t i = 0; i < sequences.num_sequences; ++i) {
    const int64_t length = sequences.end(i) - sequences.begin(i);
    const int count = share && length >= kDeltaChunk ? group : 1;
    for (int head = 0; head < args.num_k_heads && length; ++head) {
      for (int first = 0; first < group; first += count) tiles.push_back({i, head, first, count});
    }
  }
  // The longest first, so that the threads end together.
  const auto length = [&](const DeltaTile& tile) {
    return sequences.end(tile.sequence) - sequences.begin(tile.sequence);
  };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const DeltaTile& a, const DeltaTile& b) { return length(a) > length(b); });
  const DeltaKernels& level = HELEXA_AT_LEVEL(kDelta);
  parallel_for(int64_t(tiles.size()), 1, [&](int64_t begin, int64_t end, int) {
    float* memory = thread_scratch(delta_scratch_floats(args.head_k_dim, args.head_v_dim, group));
    for (int64_t i = begin; i < end; ++i) level.run(args, tiles[size_t(i)], memory);
  });
}

}  // namespace helexa
