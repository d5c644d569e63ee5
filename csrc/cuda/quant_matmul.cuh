// The main loop of products with many rows of activations: a tile of kTileRows weight rows times up to kTokens rows of
// activations, on tensor cores. The weights are the M operand: they are read from their planes 64 columns at a time,
// decoded in float32 and rounded to bfloat16 into shared memory, in turn with the product of the 64 columns before.
// Activations arrive by asynchronous copies, two steps ahead. Sums are float32.
//
// The type is looked at when a tile runs, by one branch for 32 values: a launch may mix types, and the loop is compiled
// once for each width of tile. Which weight rows and which activations meet, and where sums go, the caller says, so
// that experts use the same loop.
#pragma once

#include "quant_planes.cuh"

namespace helexa::cuda {

constexpr int kMatmulThreads = 256, kTileRows = 128;
constexpr int kStepColumns = 64, kActivationSteps = 3;
// Tiles of activations: a narrow one for a batch's decoding, a wide one for prompts.
constexpr int kNarrowTokens = 32, kWideTokens = 128;

constexpr size_t matmul_shared_bytes(int tokens) {
  return size_t(2 * kTileRows + kActivationSteps * tokens) * kStepColumns * sizeof(uint16_t);
}

// A weight row: `row` of planes of a type.
struct WeightRow {
  const WeightPlanes* planes;
  QuantType type;
  int64_t row;
};

// How float32 values become products of bfloat16: the first, or for `exact` numbers two or three of (weight,
// activation) (rounded, rounded), (rounded, remainder), (remainder, rounded). What is left out is 2^-16 of a product.
constexpr int kMostPasses = 3;

struct MatmulInput {
  const uint16_t* rounded;    // bfloat16 [rows, cols]
  const uint16_t* remainder;  // what rounding left of them, as bfloat16; may be null where passes is 1
  int64_t cols;               // a multiple of 32
  int passes;
};

// Value i % 4 of four int8 codes as float, without a conversion, of which a multiprocessor has few: 2^23 + code + 128
// is put together from bits.
__device__ __forceinline__ float float_of_code(uint32_t shifted, int i) {
  return bit_cast<float>(byte_permute(shifted, 0x4b000000u, 0x7440u + uint32_t(i))) - 8388736.0f;
}

__device__ __forceinline__ uint32_t rounded_pair(float low, float high, bool remainder) {
  const uint32_t pair = bfloat16_pair(low, high);
  if (!remainder) return pair;
  return bfloat16_pair(low - bit_cast<float>(pair << 16), high - bit_cast<float>(pair & 0xffff0000u));
}

// Values [32 group, 32 group + 32) of a row, rounded to bfloat16, or what rounding leaves of them.
template <QuantType kType>
__device__ __forceinline__ void load_rounded(const WeightPlanes& w, int64_t row, int group, bool remainder,
                                             uint32_t (&pairs)[16]) {
  if constexpr (kIsNumber<kType>) {
    using N = NumberUnit<kType>;
    constexpr int kUnits = 32 / N::kValues, kPairs = N::kValues / 2;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Words words = N::load(w, row, group * kUnits + u);
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        pairs[u * kPairs + i] = rounded_pair(N::value(words, 2 * i), N::value(words, 2 * i + 1), remainder);
    }
  } else {
    const Group values = load_group<kType>(w, row, group);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Segment& s = values.half[h];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t shifted = s.codes[i / 2] ^ 0x80808080u;
        const float low = multiply_rounded(s.scale, float_of_code(shifted, i % 2 * 2));
        const float high = multiply_rounded(s.scale, float_of_code(shifted, i % 2 * 2 + 1));
        pairs[h * 8 + i] = rounded_pair(subtract_rounded(low, s.minimum), subtract_rounded(high, s.minimum), remainder);
      }
    }
  }
}

__device__ __forceinline__ void load_rounded(QuantType type, const WeightPlanes& w, int64_t row, int group,
                                             bool remainder, uint32_t (&pairs)[16]) {
  switch (type) {
#define HELEXA_LOAD(name)                                           \
  case QuantType::name:                                             \
    load_rounded<QuantType::name>(w, row, group, remainder, pairs); \
    break;
    HELEXA_LOAD(F32)
    HELEXA_LOAD(F16)
    HELEXA_LOAD(BF16)
    HELEXA_LOAD(I8)
    HELEXA_LOAD(Q4_0)
    HELEXA_LOAD(Q4_1)
    HELEXA_LOAD(Q5_0)
    HELEXA_LOAD(Q5_1)
    HELEXA_LOAD(Q8_0)
    HELEXA_LOAD(Q1_0)
    HELEXA_LOAD(Q2_K)
    HELEXA_LOAD(Q3_K)
    HELEXA_LOAD(Q4_K)
    HELEXA_LOAD(Q5_K)
    HELEXA_LOAD(Q6_K)
    HELEXA_LOAD(TQ1_0)
    HELEXA_LOAD(TQ2_0)
    HELEXA_LOAD(IQ4_NL)
    HELEXA_LOAD(IQ4_XS)
    HELEXA_LOAD(IQ3_S)
    HELEXA_LOAD(IQ3_XXS)
    HELEXA_LOAD(IQ2_S)
    HELEXA_LOAD(IQ2_XS)
    HELEXA_LOAD(IQ2_XXS)
    HELEXA_LOAD(IQ1_S)
    HELEXA_LOAD(IQ1_M)
    HELEXA_LOAD(MXFP4)
    HELEXA_LOAD(NVFP4)
#undef HELEXA_LOAD
    default:  // the launcher let no other through
      break;
  }
}

// A row of a step in shared memory is eight pieces of 16 bytes; where piece `piece` lies, so that eight rows' pieces of
// one column lie in all banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * kStepColumns + (piece ^ (row & 7)) * 8; }

// Sums of steps [first_step, last_step) of `input.passes` times the columns' steps. All threads of the block call it.
//   row_of(local) -> WeightRow, local < kTileRows; called once by each thread. Rows that do not count may be any.
//   token_of(local) -> the row of the activations, local < kTokens; the same.
//   store(local row, local token, sum, sum of local row + 8): for local rows with local row % 16 < 8.
template <int kTokens, class RowOf, class TokenOf, class Store>
__device__ __forceinline__ void multiply_tile(const MatmulInput& input, int first_step, int last_step, RowOf row_of,
                                              TokenOf token_of, Store store) {
  constexpr bool kWide = kTokens == kWideTokens;
  constexpr int kWarpRows = kWide ? 32 : 16, kWarpTokens = kWide ? 64 : 32;
  constexpr int kRowWarps = kTileRows / kWarpRows;
  constexpr int kFragments = kWarpRows / 16, kColumns = kWarpTokens / 8;
  static_assert(kRowWarps * (kTokens / kWarpTokens) * kWarpSize == kMatmulThreads);

  SharedArena arena;
  const Shared<uint16_t> weights = arena.take<uint16_t>(2 * kTileRows * kStepColumns);
  const Shared<uint16_t> activations = arena.take<uint16_t>(kActivationSteps * kTokens * kStepColumns);
  const int thread = int(threadIdx.x), lane = lane_index();
  const int warp_row = warp_index() % kRowWarps * kWarpRows, warp_token = warp_index() / kRowWarps * kWarpTokens;
  const int cols = int(input.cols), steps = (cols + kStepColumns - 1) / kStepColumns;

  // Weights: two threads a row, 32 columns each.
  const int my_row = thread / 2, my_half = thread % 2;
  const WeightRow source = row_of(my_row);
  const auto decode = [&](int step) {
    const int pass = step / steps, column = step % steps * kStepColumns + my_half * 32;
    uint32_t pairs[16] = {};
    if (column < cols) load_rounded(source.type, *source.planes, source.row, column / 32, pass == 2, pairs);
    const int base = step % 2 * kTileRows * kStepColumns;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece)
      store_shared(weights, base + swizzled(my_row, my_half * 4 + piece),
                   Words{pairs[4 * piece], pairs[4 * piece + 1], pairs[4 * piece + 2], pairs[4 * piece + 3]});
  };

  // Activations: eight neighbouring threads copy the 128 bytes of a row.
  constexpr int kCopies = kTokens * 8 / kMatmulThreads;
  const int piece = thread % 8;
  int64_t tokens[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) tokens[i] = token_of(thread / 8 + i * (kMatmulThreads / 8));
  const auto copy = [&](int step) {
    if (step < last_step) {
      const uint16_t* x = step / steps == 1 ? input.remainder : input.rounded;
      const int column = step % steps * kStepColumns + piece * 8;
      const int base = step % kActivationSteps * kTokens * kStepColumns;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int at = base + swizzled(thread / 8 + i * (kMatmulThreads / 8), piece);
        if (column < cols)
          copy_async<Words>(activations, at, x + tokens[i] * input.cols + column);
        else
          store_shared(activations, at, Words{});
      }
    }
    copy_async_commit();
  };

  float sums[kFragments][kColumns][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < kActivationSteps - 1; ++ahead) copy(first_step + ahead);
  decode(first_step);
#pragma unroll 1
  for (int step = first_step; step < last_step; ++step) {
    copy_async_wait<kActivationSteps - 2>();
    sync_threads();
    copy(step + kActivationSteps - 1);
    if (step + 1 < last_step) decode(step + 1);
    const int w = step % 2 * kTileRows * kStepColumns, x = step % kActivationSteps * kTokens * kStepColumns;
#pragma unroll
    for (int k = 0; k < kStepColumns / 16; ++k) {
      uint32_t left[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
        load_matrices(left[f], weights, w + swizzled(warp_row + f * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        uint32_t right[4];
        load_matrices(right, activations,
                      x + swizzled(warp_token + c * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          mma_bf16(sums[f][c], left[f], first);
          mma_bf16(sums[f][c + 1], left[f], second);
        }
      }
    }
  }
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store(warp_row + f * 16 + lane / 4, warp_token + c * 8 + lane % 4 * 2 + i, sums[f][c][i], sums[f][c][2 + i]);
}

// silu(gate) * up. Large negative gates: the exponential is infinite and the result 0.
__device__ __forceinline__ float silu_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

}  // namespace helexa::cuda
