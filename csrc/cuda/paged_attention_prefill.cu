// Attention of prompts and their chunks: a block takes a tile of query rows of one key-value head through all keys that
// they see. Rows are new tokens times the heads of the key-value head, heads innermost, so that all of them share each
// key that is loaded. Keys arrive while the values before them are multiplied, and the other way round.
#include "paged_attention.cuh"

namespace helexa::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;

// Fragments of 16 rows for each warp: two use each key and value that is read from shared memory twice, but the sums of
// two do not fit into the registers at 256 dimensions.
template <int kDim>
constexpr int kTiles = kDim <= 128 ? 2 : 1;
template <int kDim>
constexpr int kBlockRows = kWarps * kTiles<kDim> * kRows;
// Keys at once. With two fragments of 128 dimensions more scores would not fit into the registers.
template <int kDim>
constexpr int kKeys = kDim == 128 ? 32 : 64;
static_assert(kPageSize % kKeys<128> == 0);
template <int kDim>
constexpr int kTileBytes = 2 * (kBlockRows<kDim> + 2 * kKeys<kDim>)*kDim;

// What a block knows of its tile lies in shared memory: its registers are full of sums.
enum Fact {
  kSequence,
  kBegin,     // its first new token in the batch
  kBefore,    // position of that token
  kLength,    // of the sequence
  kGroup,     // query heads of a key-value head
  kFirstRow,  // of the tile, among the rows of the sequence
  kLastRow,
  kSteps,  // of so many keys at once, until the last row has seen all it sees
  kFacts
};

struct Tile {
  int64_t sequence;
  int first_row, rows;  // of the sequence's
};

// Tile `nth` of all, counted sequence by sequence; rows is 0 behind the last one. All lanes of a warp call it.
__device__ __forceinline__ Tile find_tile(const PagedAttention& p, int nth, int block_rows) {
  const int group = p.num_heads / p.num_kv_heads, lane = lane_index();
  for (int64_t base = 0; base < p.num_sequences; base += kWarpSize) {
    const int64_t sequence = base + lane;
    int rows = 0;
    if (sequence < p.num_sequences) {
      const int new_tokens = p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence];
      if (new_tokens > p.most_new_tokens) rows = new_tokens * group;
    }
    int tiles = (rows + block_rows - 1) / block_rows, until = tiles;  // up to and with this lane's
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int other = shuffle(until, lane >= by ? lane - by : lane);
      if (lane >= by) until += other;
    }
    const uint32_t behind = ballot(nth < until);
    if (behind != 0) {
      int first = 0;
      while (!(behind >> first & 1)) ++first;
      const int within = nth - shuffle(until - tiles, first);
      return {base + first, within * block_rows, shuffle(rows, first)};
    }
    nth -= shuffle(until, kWarpSize - 1);
  }
  return {0, 0, 0};
}

// Keys or values from position `key` on into a tile; what lies behind the sequence's last token may be anything, also
// NaN, and becomes 0, as do dimensions that the heads do not have.
template <int kDim>
__device__ __forceinline__ void load_rows(const PagedAttention& p, const Shared<uint16_t>& tile, const void* cache,
                                          const Shared<int>& facts, int key) {
  const int64_t page = p.page_tables[facts[kSequence] * p.pages_per_sequence + key / kPageSize];
  const int kv_head = int(blockIdx.y), offset = key % kPageSize;
  int tokens = facts[kLength] - key;
  constexpr int kRowsAtOnce = kThreads / (kDim / 8);
  const int thread = opaque(int(threadIdx.x));  // what follows from it may not wait in registers from step to step
  const int column = thread % (kDim / 8) * 8, first_row = thread / (kDim / 8);
  if (column >= p.head_dim) tokens = 0;
  if (p.quantised) {
    const int8_t* codes = page_codes(p, cache, page, kv_head);
    const auto* scales = reinterpret_cast<const uint16_t*>(codes + kPageSize * p.head_dim) + column / kScaleBlock;
    codes += offset * p.head_dim, scales += offset * (p.head_dim / kScaleBlock);
#pragma unroll 4
    for (int row = first_row; row < kKeys<kDim>; row += kRowsAtOnce) {
      Eight numbers{};
      if (row < tokens)
        numbers = dequantised(load_global<Vector<int8_t, 8>>(codes + row * p.head_dim + column),
                              scales[row * (p.head_dim / kScaleBlock)]);
      store_shared(tile, tile_at<kDim>(row, column), numbers);
    }
    return;
  }
  const uint16_t* from = page_numbers(p, cache, page, kv_head) + (offset + first_row) * p.head_dim + column;
#pragma unroll 4
  for (int row = first_row; row < kKeys<kDim>; row += kRowsAtOnce) {
    if (row < tokens)
      copy_async<Eight>(tile, tile_at<kDim>(row, column), from);
    else
      store_shared(tile, tile_at<kDim>(row, column), Eight{});
    from += kRowsAtOnce * p.head_dim;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) attend_tiles(const PagedAttention p, const uint16_t* prepared) {
  constexpr int kTilesHere = kTiles<kDim>, kBlock = kBlockRows<kDim>, kStep = kKeys<kDim>;
  // The last tiles see the most keys: they begin first.
  const Tile tile = find_tile(p, int(gridDim.x - 1 - blockIdx.x), kBlock);
  if (tile.rows == 0) return;
  const int kv_head = int(blockIdx.y), warp = warp_index(), lane = lane_index();

  SharedArena arena;
  const Shared<uint16_t> queries = arena.take<uint16_t>(kBlock * kDim);
  const Shared<uint16_t> keys = arena.take<uint16_t>(kStep * kDim), values = arena.take<uint16_t>(kStep * kDim);
  const Shared<int> facts = arena.take<int>(kFacts);
  if (threadIdx.x == 0) {
    const int begin = p.cu_seqlens[tile.sequence], length = p.seq_lens[tile.sequence];
    const int before = length - (p.cu_seqlens[tile.sequence + 1] - begin), group = p.num_heads / p.num_kv_heads;
    const int last_row = (tile.first_row + kBlock < tile.rows ? tile.first_row + kBlock : tile.rows) - 1;
    facts[kSequence] = int(tile.sequence), facts[kBegin] = begin, facts[kBefore] = before, facts[kLength] = length;
    facts[kGroup] = group, facts[kFirstRow] = tile.first_row, facts[kLastRow] = last_row;
    facts[kSteps] = length > 0 ? (before + last_row / group) / kStep + 1 : 0;
  }
  sync_threads();

#pragma unroll 2
  for (int i = 0; i < kBlock * kDim / 8 / kThreads; ++i) {
    const int chunk = int(threadIdx.x) + kThreads * i, row = chunk / (kDim / 8), column = chunk % (kDim / 8) * 8;
    const int of_sequence = facts[kFirstRow] + row, group = facts[kGroup];
    if (of_sequence <= facts[kLastRow] && column < p.head_dim) {
      const int64_t token = facts[kBegin] + of_sequence / group, head = kv_head * group + of_sequence % group;
      copy_async<Eight>(queries, tile_at<kDim>(row, column),
                        prepared + (token * p.num_heads + head) * p.head_dim + column);
    } else {
      store_shared(queries, tile_at<kDim>(row, column), Eight{});
    }
  }
  if (facts[kSteps] > 0) load_rows<kDim>(p, keys, p.k_cache, facts, 0);
  copy_async_commit();
  if (facts[kSteps] > 0) load_rows<kDim>(p, values, p.v_cache, facts, 0);
  copy_async_commit();

  Softmax softmax[kTilesHere];
  float context[kTilesHere][kDim / 8][4];
#pragma unroll
  for (int t = 0; t < kTilesHere; ++t)
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) context[t][i][j] = 0.0f;
  const int warp_row = warp * kTilesHere * kRows;
  // Where this lane's rows of fragments begin in the tiles.
  const int query_at = tile_at<kDim>(warp_row + lane % 16, lane / 16 * 8);
  const int key_at = tile_at<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const int value_at = tile_at<kDim>(lane % 16, lane / 16 * 8);

#pragma unroll 1
  for (int step = 0; step < facts[kSteps]; ++step) {
    float scores[kTilesHere][kStep / 8][4] = {};
    copy_async_wait<1>();
    sync_threads();  // queries and keys are there
    const int q_at = opaque(query_at), k_at = opaque(key_at);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t q[kTilesHere][4];
#pragma unroll
      for (int t = 0; t < kTilesHere; ++t) load_matrices(q[t], queries, (q_at ^ d) + t * kRows * kDim);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t k[4];
        load_matrices(k, keys, (k_at ^ d) + 16 * n * kDim);
#pragma unroll
        for (int t = 0; t < kTilesHere; ++t) {
          mma_bf16(scores[t][2 * n], q[t], {k[0], k[1]});
          mma_bf16(scores[t][2 * n + 1], q[t], {k[2], k[3]});
        }
      }
    }
    sync_threads();  // the keys are read
    if (step + 1 < facts[kSteps]) load_rows<kDim>(p, keys, p.k_cache, facts, (step + 1) * kStep);
    copy_async_commit();

#pragma unroll
    for (int t = 0; t < kTilesHere; ++t) {
      const int before = facts[kBefore] - step * kStep, group = facts[kGroup];
      if (kStep - 1 > before + facts[kFirstRow] / group) {  // not all rows see all of these keys
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = facts[kFirstRow] + warp_row + t * kRows + lane / 4 + 8 * r;
          const int last_seen = before + row / group - lane % 4 * 2;  // of this lane's columns
#pragma unroll
          for (int i = 0; i < kStep / 8; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (8 * i + j > last_seen) scores[t][i][2 * r + j] = -INFINITY;
        }
      }
      const Vector<float, 2> factor = soften(softmax[t], scores[t]);
      if (ballot(factor[0] != 1.0f || factor[1] != 1.0f)) {  // the maximum seldom changes after the first keys
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) context[t][i][j] *= factor[j / 2];
      }
    }

    copy_async_wait<1>();
    sync_threads();  // the values are there
    const int v_at = opaque(value_at);
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      uint32_t weights[kTilesHere][4];
#pragma unroll
      for (int t = 0; t < kTilesHere; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          weights[t][i] = bfloat16_pair(scores[t][2 * n + i / 2][i % 2 * 2], scores[t][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t v[4];
        load_matrices_transposed(v, values, (v_at ^ d) + 16 * n * kDim);
#pragma unroll
        for (int t = 0; t < kTilesHere; ++t) {
          mma_bf16(context[t][d / 8], weights[t], {v[0], v[1]});
          mma_bf16(context[t][d / 8 + 1], weights[t], {v[2], v[3]});
        }
      }
    }
    sync_threads();  // the values are read
    if (step + 1 < facts[kSteps]) load_rows<kDim>(p, values, p.v_cache, facts, (step + 1) * kStep);
    copy_async_commit();
  }
  copy_async_wait<0>();
  sync_threads();

  // Contexts go out by way of shared memory, each warp's over what the block is done with: from there whole rows are
  // written, and gates are read likewise. Groups of eight change places with the row, for the banks.
  static_assert(4 * kWarps * kRows * kDim <= kTileBytes<kDim>);
  const Shared<float> contexts = SharedArena().take<float>(kWarps * kRows * kDim) + warp * kRows * kDim;
#pragma unroll
  for (int t = 0; t < kTilesHere; ++t) {
    sync_warp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over_row(softmax[t].sum[r]), over = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = lane / 4 + 8 * r;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
        store_shared(contexts, row * kDim + (8 * (i ^ row % 4) + lane % 4 * 2),
                     Vector<float, 2>{{context[t][i][2 * r] * over, context[t][i][2 * r + 1] * over}});
    }
    sync_warp();
#pragma unroll 1
    for (int i = lane; i < kRows * kDim / 4; i += kWarpSize) {
      const int row = i / (kDim / 4), d = i % (kDim / 4) * 4, group = facts[kGroup];
      const int of_sequence = facts[kFirstRow] + warp_row + t * kRows + row;
      if (of_sequence > facts[kLastRow] || d >= p.head_dim) continue;
      const int64_t token = facts[kBegin] + of_sequence / group;
      const int head = kv_head * group + of_sequence % group;
      auto out = load_shared<Vector<float, 4>>(contexts, row * kDim + (d ^ row % 4 * 8));
      if (p.gated) {
        const auto gates = load_global<Vector<float, 4>>(gates_of(p, token, head) + d);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] *= sigmoid(gates[j]);
      }
      store_global(p.ctx + (token * p.num_heads + head) * p.head_dim + d, out);
    }
  }
}

template <int kDim>
void launch_tiles(const PagedAttention& p, const uint16_t* queries, dim3 grid, Stream stream) {
  launch<attend_tiles<kDim>>("paged_attention", grid, kThreads, kTileBytes<kDim> + kFacts * sizeof(int), stream, p,
                             queries);
}

}  // namespace

void attend_prefill(const PagedAttention& p, const uint16_t* queries, Stream stream) {
  const int64_t rows = p.num_tokens * (p.num_heads / p.num_kv_heads);
  const int block_rows = p.head_dim <= 64 ? kBlockRows<64> : p.head_dim <= 128 ? kBlockRows<128> : kBlockRows<256>;
  // The most tiles that these rows can make, however they fall into sequences.
  const dim3 grid(unsigned(rows / block_rows + p.num_sequences), unsigned(p.num_kv_heads));
  const auto run = p.head_dim <= 64 ? launch_tiles<64> : p.head_dim <= 128 ? launch_tiles<128> : launch_tiles<256>;
  run(p, queries, grid, stream);
}

}  // namespace helexa::cuda
