// Attention of a few new tokens: the keys of a sequence are split over blocks, and a second kernel adds what they
// found.
//
// A block takes 16 query rows (new tokens times the heads of a key-value head), which all meet the keys it loads. How a
// sequence is split depends on its own length alone, so that its context has the same bits whatever it is batched with.
// The heads of the new tokens are normed and rotated in the block itself: a launch for that would cost more.
//
// Each of the four warps takes 16 keys of a page and is a pipeline of its own, with a ring of `units` (16 keys or 16
// values, or half of their dimensions) that arrive while it computes; no barrier of the block is needed before the four
// results are added. A block has 32 to 48 KB on the way, so that one on each multiprocessor keeps an H200 busy.
#include "paged_attention.cuh"

namespace helexa::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kUnitRows = kPageSize / kWarps;
constexpr int kLeastPages = 2;  // of a split: what a block writes should be little beside what it reads
constexpr int kMostSplits = 64;

// Splits of the longest sequences: about 128 blocks for one of them, which is a block for each multiprocessor.
int most_splits(int num_kv_heads) {
  const int splits = 128 / num_kv_heads;
  return splits < 8 ? 8 : splits > kMostSplits ? kMostSplits : splits;
}

struct Splits {
  int pages_each, count;
};
__device__ __forceinline__ Splits splits_of(int length, int most) {
  const int pages = (length + kPageSize - 1) / kPageSize;
  const int even = (pages + most - 1) / most, each = even < kLeastPages ? kLeastPages : even;
  const int count = (pages + each - 1) / each;
  return {each, count < 1 ? 1 : count};
}

// The most splits that a sequence of so many pages can have.
int64_t splits_of_table(const PagedAttention& p) {
  const int64_t by_pages = (p.pages_per_sequence + kLeastPages - 1) / kLeastPages, most = most_splits(p.num_kv_heads);
  return by_pages < 1 ? 1 : by_pages < most ? by_pages : most;
}

// What the blocks leave for the second kernel, for each sequence, new token, head and split: sums [.., head_dim], and
// behind all of them the maximum and the sum of the softmax [.., 2].
struct Partial {
  float* sums;
  float* softmax;
};
__device__ __forceinline__ Partial partial_of(const PagedAttention& p, int64_t sequence, int token, int head, int split,
                                              int splits) {
  float* sums = static_cast<float*>(p.workspace);
  const int64_t entry = ((sequence * p.most_new_tokens + token) * p.num_heads + head) * splits + split;
  const int64_t entries = p.num_sequences * p.most_new_tokens * p.num_heads * splits;
  return {sums + entry * p.head_dim, sums + entries * p.head_dim + entry * 2};
}

// Sizes of the shared memory: a ring of units for each warp, for Q8_0 with a tile that a unit is dequantised into.
template <int kDim, bool kQuantised>
struct Ring {
  static constexpr int kColumns = kQuantised || kDim < 128 ? kDim : 128;  // dimensions of a unit
  static constexpr int kPieces = kDim / kColumns;
  static constexpr int kUnits = kQuantised ? (kDim == 256 ? 3 : 1024 / kDim) : 512 / kColumns;
  static constexpr int kStepsAhead = (kUnits - 1 + 2 * kPieces - 1) / (2 * kPieces);  // that units on the way belong to
  static constexpr int kTile = kUnitRows * kColumns;                                  // in elements of 16 bits
  static constexpr int kUnit = kQuantised ? kTile / 32 * 17 : kTile;
  static constexpr int kOfWarp = kUnits * kUnit + (kQuantised ? kTile : 0);
  static constexpr int kBytes = 2 * (kWarps * kOfWarp + kRows * kDim) + 4 * (kWarps * kDim + 3 * kWarps * kRows);
};

// One warp's way through its units: all pieces of 16 keys, all of their values, then of the next keys, ...
template <int kDim, bool kQuantised>
class Units {
  using Sizes = Ring<kDim, kQuantised>;
  static constexpr int kColumns = Sizes::kColumns, kOfStep = 2 * Sizes::kPieces;

 public:
  __device__ Units(const PagedAttention& p, const Shared<uint16_t>& ring, const int32_t* table, int kv_head, int first,
                   int last)
      : p_(p), ring_(ring), table_(table), kv_head_(kv_head), first_(first), last_(last) {}

  // Loads the next unit, if there is one, into the slot that was read longest ago.
  __device__ __forceinline__ void fetch() {
    const int step = fetched_ / kOfStep, piece = fetched_ % kOfStep;
    const int key = first_ + step * kPageSize + warp_index() * kUnitRows;
    if (key < last_) {
      if (piece == 0 && step % kWarpSize == 0) {  // the ids of 32 pages at once, one in each lane
        const int page = key / kPageSize + lane_index();
        pages_ = page * kPageSize < last_ ? table_[page] : 0;
      }
      copy(shuffle(pages_, step % kWarpSize), piece < Sizes::kPieces ? p_.k_cache : p_.v_cache,
           piece % Sizes::kPieces * kColumns, key);
    }
    copy_async_commit();
    ++fetched_;
    fetch_slot_ = fetch_slot_ + 1 == Sizes::kUnits ? 0 : fetch_slot_ + 1;
  }

  // Waits for the next unit and has another one loaded. Returns where its tile begins; the tile is there until the next
  // call. `key`: the position of its first row.
  __device__ __forceinline__ int next(int key) {
    copy_async_wait<Sizes::kUnits - 2>();
    sync_warp();
    const int slot = slot_ * Sizes::kUnit;
    slot_ = slot_ + 1 == Sizes::kUnits ? 0 : slot_ + 1;
    fetch();
    if constexpr (!kQuantised) return slot;
    dequantise(slot, key);
    return Sizes::kUnits * Sizes::kUnit;
  }

 private:
  static constexpr int kRowsAtOnce = kWarpSize / (kColumns / 8);  // of a tile, eight elements a lane

  __device__ __forceinline__ void copy(int64_t page, const void* cache, int first_column, int key) {
    const int at = fetch_slot_ * Sizes::kUnit, offset = key % kPageSize;
    if constexpr (kQuantised) {
      const int8_t* codes = page_codes(p_, cache, page, kv_head_);
      const int8_t* scales = codes + kPageSize * p_.head_dim + offset * (p_.head_dim / 16);
      codes += offset * p_.head_dim;
      for (int i = lane_index(); i < p_.head_dim; i += kWarpSize) copy_async<Eight>(ring_, at + 8 * i, codes + 16 * i);
      for (int i = lane_index(); i < p_.head_dim / 16; i += kWarpSize)
        copy_async<Eight>(ring_, at + 8 * (p_.head_dim + i), scales + 16 * i);
    } else {
      const int column = lane_index() % (kColumns / 8) * 8, first = lane_index() / (kColumns / 8);
      const int rows = first_column + column < p_.head_dim ? last_ - key : 0;
      const uint16_t* from =
          page_numbers(p_, cache, page, kv_head_) + (offset + first) * p_.head_dim + first_column + column;
#pragma unroll 4
      for (int row = first; row < kUnitRows; row += kRowsAtOnce) {
        const int place = at + tile_at<kColumns>(row, column);
        // What lies behind the last token may be anything, also NaN.
        if (row < rows)
          copy_async<Eight>(ring_, place, from);
        else
          store_shared(ring_, place, Eight{});
        from += kRowsAtOnce * p_.head_dim;
      }
    }
  }

  __device__ __forceinline__ void dequantise(int slot, int key) {
    const int tile = Sizes::kUnits * Sizes::kUnit, scales = slot + kUnitRows / 2 * p_.head_dim;
    const int column = lane_index() % (kDim / 8) * 8, first = lane_index() / (kDim / 8);
    const int rows = column < p_.head_dim ? last_ - key : 0;
#pragma unroll 2
    for (int row = first; row < kUnitRows; row += kRowsAtOnce) {
      Eight numbers{};
      if (row < rows)
        numbers = dequantised(load_shared<Vector<int8_t, 8>>(ring_, slot + (row * p_.head_dim + column) / 2),
                              ring_[scales + row * (p_.head_dim / kScaleBlock) + column / kScaleBlock]);
      store_shared(ring_, tile + tile_at<kDim>(row, column), numbers);
    }
    sync_warp();
  }

  const PagedAttention& p_;
  const Shared<uint16_t> ring_;
  const int32_t* table_;
  const int kv_head_, first_, last_;
  int fetched_ = 0, fetch_slot_ = 0, slot_ = 0, pages_ = 0;
};

template <int kDim, bool kQuantised>
__global__ void __launch_bounds__(kThreads) attend_split(const PagedAttention p) {
  using Sizes = Ring<kDim, kQuantised>;
  const int split = int(blockIdx.x), kv_head = int(blockIdx.y) % p.num_kv_heads;
  const int first_row = int(blockIdx.y) / p.num_kv_heads * kRows;
  const int64_t sequence = blockIdx.z;
  const int begin = p.cu_seqlens[sequence], new_tokens = p.cu_seqlens[sequence + 1] - begin;
  const int length = p.seq_lens[sequence], group = p.num_heads / p.num_kv_heads;
  const Splits splits = splits_of(length, p.most_splits);
  if (new_tokens > p.most_new_tokens || first_row >= new_tokens * group || split >= splits.count) return;
  const int rows = new_tokens * group - first_row < kRows ? new_tokens * group - first_row : kRows;
  const int first = split * splits.pages_each * kPageSize;
  const int last = length < first + splits.pages_each * kPageSize ? length : first + splits.pages_each * kPageSize;
  const int before = length - new_tokens;  // position of the first new token
  const int first_new = first < before ? before : first;
  const int new_here = first_new < last ? last - first_new : 0;

  SharedArena arena;
  const Shared<uint16_t> rings = arena.take<uint16_t>(kWarps * Sizes::kOfWarp);
  const Shared<uint16_t> queries = arena.take<uint16_t>(kRows * kDim);
  const Shared<float> exchanges = arena.take<float>(kWarps * kDim);
  const Shared<float> largest = arena.take<float>(kWarps * kRows), sums = arena.take<float>(kWarps * kRows);
  const Shared<float> factors = arena.take<float>(kWarps * kRows);
  const int warp = warp_index(), lane = lane_index();
  Units<kDim, kQuantised> units(p, rings + warp * Sizes::kOfWarp, p.page_tables + sequence * p.pages_per_sequence,
                                kv_head, first, last);
  const auto fill_ring = [&] {
#pragma unroll 1
    for (int i = 0; i < Sizes::kUnits - 1; ++i) units.fetch();
  };

  // Heads made ready, a warp each: the queries, and keys and values of what is new in this split. Those must be written
  // before they are read with the others; of most splits they are not among the first.
  const bool may_fill = new_here == 0 || first_new >= first + Sizes::kStepsAhead * kPageSize;
  if (may_fill) fill_ring();
  const Shared<float> exchange = exchanges + warp * kDim;
#pragma unroll 1
  for (int task = warp; task < kRows + 2 * new_here; task += kWarps) {
    constexpr int kValues = kDim / 32;
    float head[kValues];
    const bool is_query = task < kRows;
    const int nth = (task - kRows) / 2;  // of the new tokens here
    const int64_t token = begin + (is_query ? (first_row + task) / group : first_new - before + nth);
    const bool is_value = !is_query && (task - kRows) % 2;
    if (is_query && task >= rows) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) queries[tile_at<kDim>(task, lane + 32 * i)] = 0;
      continue;
    }
    const float* x = p.qkv + token * qkv_width(p);
    x += is_query ? (kv_head * group + (first_row + task) % group) * query_stride(p)
                  : p.num_heads * query_stride(p) + (is_value ? p.num_kv_heads + kv_head : kv_head) * p.head_dim;
    load_head(head, x, p.head_dim);
    if (!is_value)
      norm_and_rotate(head, is_query ? p.q_norm : p.k_norm, p.cos_sin + p.positions[token] * p.rotary_dim, p, exchange);
    if (is_query) {
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        queries[tile_at<kDim>(task, lane + 32 * i)] = bfloat16_from_float(head[i] * query_factor(p));
    } else {
      store_head(head, p, is_value ? p.v_cache : p.k_cache, p.slot_mapping[token], kv_head);
    }
  }
  sync_threads();
  if (!may_fill) fill_ring();

  Softmax softmax;
  float context[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) context[i][j] = 0.0f;
  int visible[2];  // the last key that a row sees
#pragma unroll
  for (int r = 0; r < 2; ++r) visible[r] = before + (first_row + lane / 4 + 8 * r) / group;

  // Where this lane's rows of fragments begin in the tiles.
  const int query_at = tile_at<kDim>(lane % 16, lane / 16 * 8);
  const int key_at = tile_at<Sizes::kColumns>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const int value_at = tile_at<Sizes::kColumns>(lane % 16, lane / 16 * 8);
  const Shared<uint16_t> ring = rings + warp * Sizes::kOfWarp;
#pragma unroll 1
  for (int key = first + warp * kUnitRows; key < last; key += kPageSize) {
    float scores[2][4] = {};
#pragma unroll
    for (int piece = 0; piece < kDim; piece += Sizes::kColumns) {
      const Shared<uint16_t> keys = ring + units.next(key);
      const int q_at = opaque(query_at), k_at = opaque(key_at);
#pragma unroll
      for (int d = 0; d < Sizes::kColumns; d += 16) {
        uint32_t q[4], k[4];
        load_matrices(q, queries, q_at ^ (piece + d));
        load_matrices(k, keys, k_at ^ d);
        mma_bf16(scores[0], q, {k[0], k[1]});
        mma_bf16(scores[1], q, {k[2], k[3]});
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (key + 8 * i + lane % 4 * 2 + j % 2 > visible[j / 2]) scores[i][j] = -INFINITY;
    const Vector<float, 2> factor = soften(softmax, scores);
    if (ballot(factor[0] != 1.0f || factor[1] != 1.0f)) {  // the maximum seldom changes after the first keys
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) context[i][j] *= factor[j / 2];
    }
    const uint32_t weights[4] = {bfloat16_pair(scores[0][0], scores[0][1]), bfloat16_pair(scores[0][2], scores[0][3]),
                                 bfloat16_pair(scores[1][0], scores[1][1]), bfloat16_pair(scores[1][2], scores[1][3])};
#pragma unroll
    for (int piece = 0; piece < kDim; piece += Sizes::kColumns) {
      const Shared<uint16_t> values = ring + units.next(key);
      const int v_at = opaque(value_at);
#pragma unroll
      for (int d = 0; d < Sizes::kColumns; d += 16) {
        uint32_t v[4];
        load_matrices_transposed(v, values, v_at ^ d);
        mma_bf16(context[(piece + d) / 8], weights, {v[0], v[1]});
        mma_bf16(context[(piece + d) / 8 + 1], weights, {v[2], v[3]});
      }
    }
  }

  // The four warps' results, over the rings and the queries. Rows are padded so that those of a fragment lie in
  // different banks.
  constexpr int kPitch = kDim + 8;
  static_assert(4 * kWarps * kRows * kPitch <= 2 * (kWarps * Sizes::kOfWarp + kRows * kDim));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_over_row(softmax.sum[r]);
    if (lane % 4 == 0) {
      largest[warp * kRows + lane / 4 + 8 * r] = softmax.largest[r];
      sums[warp * kRows + lane / 4 + 8 * r] = sum;
    }
  }
  sync_threads();
  const Shared<float> contexts = SharedArena().take<float>(kWarps * kRows * kPitch);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_shared(contexts, (warp * kRows + lane / 4 + 8 * r) * kPitch + 8 * i + lane % 4 * 2,
                   Vector<float, 2>{{context[i][2 * r], context[i][2 * r + 1]}});
  if (int(threadIdx.x) < rows) {
    const int row = int(threadIdx.x), token = (first_row + row) / group;
    const int head = kv_head * group + (first_row + row) % group;
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, largest[w * kRows + row]);
    float shares[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      shares[w] = exp2_fast(largest[w * kRows + row] - (top == -INFINITY ? 0.0f : top));
      sum += sums[w * kRows + row] * shares[w];
    }
    // One split is the whole sequence: its context is ready here.
    const float over = splits.count > 1 ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) factors[w * kRows + row] = shares[w] * over;
    if (splits.count > 1)
      store_global(partial_of(p, sequence, token, head, split, int(gridDim.x)).softmax, Vector<float, 2>{{top, sum}});
  }
  sync_threads();
#pragma unroll 1
  for (int row = warp; row < rows; row += kWarps) {
    const int token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    float* out = splits.count > 1 ? partial_of(p, sequence, token, head, split, int(gridDim.x)).sums
                                  : p.ctx + ((begin + token) * int64_t(p.num_heads) + head) * p.head_dim;
    for (int d = lane; d < p.head_dim; d += kWarpSize) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += factors[w * kRows + row] * contexts[(w * kRows + row) * kPitch + d];
      if (splits.count == 1 && p.gated) value *= sigmoid(gates_of(p, begin + token, head)[d]);
      out[d] = value;
    }
  }
}

// The context of one row from its splits; a block a row. Warp w adds splits w, w + 4, ..., in this order.
__global__ void __launch_bounds__(kThreads) combine_splits(const PagedAttention p, int most) {
  const int head = int(blockIdx.x), token = int(blockIdx.y);
  const int64_t sequence = blockIdx.z;
  const int begin = p.cu_seqlens[sequence], new_tokens = p.cu_seqlens[sequence + 1] - begin;
  const Splits splits = splits_of(p.seq_lens[sequence], p.most_splits);
  if (splits.count == 1 || new_tokens > p.most_new_tokens || token >= new_tokens) return;
  SharedArena arena;
  const Shared<float> sums = arena.take<float>(kWarps * kMaxHeadDim);
  const int warp = warp_index(), lane = lane_index();

  constexpr int kOfLane = kMostSplits / kWarpSize;
  float largest[kOfLane], sum = 0.0f, top = -INFINITY, shares[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int split = lane + kWarpSize * i;
    Vector<float, 2> softmax{{-INFINITY, 0.0f}};
    if (split < splits.count)
      softmax = load_global<Vector<float, 2>>(partial_of(p, sequence, token, head, split, most).softmax);
    largest[i] = softmax[0], shares[i] = softmax[1];
    top = fmaxf(top, largest[i]);
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const float factor = exp2_fast(largest[i] - (top == -INFINITY ? 0.0f : top));
    sum += shares[i] * factor;
    shares[i] = factor;
  }
  sum = warp_sum(sum);

  constexpr int kVectors = kMaxHeadDim / 4 / kWarpSize;
  Vector<float, 4> context[kVectors] = {};
#pragma unroll 4
  for (int split = warp; split < splits.count; split += kWarps) {
    const float low = shuffle(shares[0], split % kWarpSize), high = shuffle(shares[1], split % kWarpSize);
    const float share = split < kWarpSize ? low : high;
    const float* from = partial_of(p, sequence, token, head, split, most).sums;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int d = 4 * (lane + kWarpSize * i);
      if (d >= p.head_dim) continue;
      const auto part = load_global<Vector<float, 4>>(from + d);
#pragma unroll
      for (int j = 0; j < 4; ++j) context[i][j] += share * part[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) store_shared(sums, warp * kMaxHeadDim + 4 * (lane + kWarpSize * i), context[i]);
  sync_threads();
  float* out = p.ctx + ((begin + token) * int64_t(p.num_heads) + head) * p.head_dim;
  for (int d = int(threadIdx.x); d < p.head_dim; d += kThreads) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += sums[w * kMaxHeadDim + d];
    value = sum == 0.0f ? 0.0f : value / sum;
    if (p.gated) value *= sigmoid(gates_of(p, begin + token, head)[d]);
    out[d] = value;
  }
}

template <int kDim, bool kQuantised>
void launch_splits(const PagedAttention& p, dim3 grid, Stream stream) {
  launch<attend_split<kDim, kQuantised>>("paged_attention", grid, kThreads, Ring<kDim, kQuantised>::kBytes, stream, p);
}

}  // namespace

int64_t decode_workspace_floats(const PagedAttention& p) {
  const int64_t splits = splits_of_table(p);
  return splits == 1 ? 0 : p.num_sequences * p.most_new_tokens * p.num_heads * splits * (p.head_dim + 2);
}

void attend_decode(PagedAttention p, Stream stream) {
  p.most_splits = most_splits(p.num_kv_heads);
  const int64_t splits = splits_of_table(p), group = p.num_heads / p.num_kv_heads;
  const int64_t tiles = (p.most_new_tokens * group + kRows - 1) / kRows;
  const dim3 grid(unsigned(splits), unsigned(tiles * p.num_kv_heads), unsigned(p.num_sequences));
  const auto run = p.head_dim <= 64    ? p.quantised ? launch_splits<64, true> : launch_splits<64, false>
                   : p.head_dim <= 128 ? p.quantised ? launch_splits<128, true> : launch_splits<128, false>
                   : p.quantised       ? launch_splits<256, true>
                                       : launch_splits<256, false>;
  run(p, grid, stream);
  if (splits > 1)
    launch<combine_splits>("paged_attention",
                           dim3(unsigned(p.num_heads), unsigned(p.most_new_tokens), unsigned(p.num_sequences)),
                           kThreads, kWarps * kMaxHeadDim * sizeof(float), stream, p, int(splits));
}

}  // namespace helexa::cuda
