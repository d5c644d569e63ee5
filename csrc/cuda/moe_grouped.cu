// Many tokens times their experts' matrices: the tiles of quant_matmul.cuh, each of one expert's tokens, which the
// device itself has grouped (moe_group). The grid is for the most tiles that there can be; blocks without one leave.
#include "moe_grouped.h"
#include "quant_matmul.cuh"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr const char* kName = "moe_grouped";
static_assert(kNarrowMoeTile == kNarrowTokens && kWideMoeTile == kWideTokens);

struct Grouped {
  WeightPlanes a, b;
  QuantType type_a, type_b;
  int rows;  // of an expert
  const float *scales_a, *scales_b;
  MatmulInput input;
  const int32_t* pair;
  int top_k;
  const MoeTile* tiles;
  const int32_t* num_tiles;
  int64_t places;  // without tiles
  uint16_t *gated, *gated_remainder;
  float* out;
};

template <int kTokens, bool kGated>
__global__ void __launch_bounds__(kMatmulThreads, kTokens == kWideTokens ? 1 : 2)
    multiply_grouped(const __grid_constant__ Grouped call) {
  MoeTile tile;
  if (call.tiles) {
    if (int(blockIdx.y) >= call.num_tiles[0]) return;
    tile = call.tiles[blockIdx.y];
  } else {
    const int64_t first = int64_t(blockIdx.y) * kTokens, left = call.places - first;
    tile = {0, int32_t(first), int32_t(left < kTokens ? left : kTokens)};
  }
  const int rows = call.rows;
  // Gated, a fragment's first eight rows are gates and the others their ups, so that one thread has both sums.
  const auto row_at = [&](int local) {
    return kGated ? int(blockIdx.x) * (kTileRows / 2) + local / 16 * 8 + local % 8
                  : int(blockIdx.x) * kTileRows + local;
  };
  const float scale_a = call.scales_a ? call.scales_a[tile.expert] : 1.0f;
  const float scale_b = call.scales_b ? call.scales_b[tile.expert] : 1.0f;
  const int steps = int((call.input.cols + kStepColumns - 1) / kStepColumns) * call.input.passes;
  multiply_tile<kTokens>(
      call.input, 0, steps,
      [&](int local) {
        const bool is_up = kGated && local / 8 % 2;
        const int row = row_at(local);
        return WeightRow{is_up ? &call.b : &call.a, is_up ? call.type_b : call.type_a,
                         int64_t(tile.expert) * rows + (row < rows ? row : rows - 1)};
      },
      [&](int local) {
        const int place = tile.first + (local < tile.rows ? local : tile.rows - 1);
        return int64_t(call.pair ? call.pair[place] / call.top_k : place);
      },
      [&](int local, int token, float first, float second) {
        if (token >= tile.rows) return;
        const int row = row_at(local);
        const int64_t at = (int64_t(tile.first) + token) * rows + row;
        if constexpr (kGated) {
          if (row >= rows) return;
          const float value = silu_mul(first * scale_a, second * scale_b);
          const uint16_t rounded = bfloat16_from_float(value);
          call.gated[at] = rounded;
          if (call.gated_remainder)
            call.gated_remainder[at] = bfloat16_from_float(value - float_from_bfloat16(rounded));
        } else {
          if (row < rows) call.out[at] = first * scale_a;
          if (row + 8 < rows) call.out[at + 8] = second * scale_a;
        }
      });
}

template <int kTokens>
void launch_tiles(const Grouped& call, int64_t tiles, bool gated, Stream stream) {
  const int height = gated ? kTileRows / 2 : kTileRows;
  const dim3 grid(unsigned((call.rows + height - 1) / height), unsigned(tiles));
  constexpr size_t kSharedBytes = matmul_shared_bytes(kTokens);
  if (gated)
    launch<multiply_grouped<kTokens, true>>(kName, grid, kMatmulThreads, kSharedBytes, stream, call);
  else
    launch<multiply_grouped<kTokens, false>>(kName, grid, kMatmulThreads, kSharedBytes, stream, call);
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) add_weighted(MoeSum call) {
  const int64_t pieces = call.hidden / 4, thread = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t token = thread / pieces, column = thread % pieces * 4;
  if (token >= call.rows) return;
  using Float4 = Vector<float, 4>;
  const float* weights = call.weights + token * (call.top_k + (call.shared_products != nullptr));
  Float4 sum = {};
  const auto add = [&](float weight, const float* product) {
    const auto values = load_global<Float4>(product);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(weight, values[i], sum[i]);
  };
#pragma unroll 4
  for (int rank = 0; rank < call.top_k; ++rank)
    add(weights[rank], call.products + int64_t(call.place[token * call.top_k + rank]) * call.hidden + column);
  if (call.shared_products) add(weights[call.top_k], call.shared_products + token * call.hidden + column);
  float* const x = call.x + token * call.hidden + column;
  auto out = load_global<Float4>(x);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] += sum[i];
  store_global(x, out);
}

}  // namespace

void moe_grouped(const MoeGrouped& call, Stream stream) {
  const bool gated = call.b.planes != nullptr;
  const ExpertStack &a = call.a, &b = gated ? call.b : call.a;
  check(call.num_experts >= 1, kName, "num_experts", "at least 1", call.num_experts);
  bool wide = false;
  for (const ExpertStack* stack : {&a, &b}) {
    if (!stack->planes || stack->rows != a.rows || stack->cols != a.cols || a.rows % 32 || a.cols % 32 || a.rows <= 0 ||
        a.rows > INT32_MAX / 2)
      fail(kName, "stacks", "planes of one shape of multiples of 32",
           "[" + std::to_string(stack->rows) + ", " + std::to_string(stack->cols) + "]");
    check_planes(kName, stack->quant_type, call.num_experts * stack->rows, stack->cols);
    wide |= static_cast<QuantType>(stack->quant_type) == QuantType::F32;
  }
  if (wide) check_pointer(reinterpret_cast<uintptr_t>(call.remainder), kName, "remainder");
  check_pointer(gated ? reinterpret_cast<uintptr_t>(call.gated) : reinterpret_cast<uintptr_t>(call.out), kName, "out");
  if (call.tile_rows != kNarrowMoeTile && call.tile_rows != kWideMoeTile)
    fail(kName, "tile_rows", "32 or 128", std::to_string(call.tile_rows));
  const int64_t tiles = call.tiles ? call.most_tiles : (call.rows + call.tile_rows - 1) / call.tile_rows;
  check(tiles >= 0 && tiles <= 65535, kName, "tiles", "0 to 65535", tiles);
  if (tiles == 0) return;
  Grouped grouped = {};
  grouped.type_a = static_cast<QuantType>(a.quant_type), grouped.type_b = static_cast<QuantType>(b.quant_type);
  grouped.a = weight_planes(grouped.type_a, a.planes, call.num_experts * a.rows, a.cols);
  grouped.b = weight_planes(grouped.type_b, b.planes, call.num_experts * b.rows, b.cols);
  grouped.rows = int(a.rows), grouped.scales_a = a.scales, grouped.scales_b = b.scales;
  grouped.input = {call.x, call.remainder, a.cols, wide ? kMostPasses : 1};
  grouped.pair = call.pair, grouped.top_k = call.top_k;
  grouped.tiles = call.tiles, grouped.num_tiles = call.num_tiles, grouped.places = call.rows;
  grouped.gated = call.gated, grouped.gated_remainder = call.gated_remainder, grouped.out = call.out;
  if (call.tile_rows == kNarrowMoeTile)
    launch_tiles<kNarrowTokens>(grouped, tiles, gated, stream);
  else
    launch_tiles<kWideTokens>(grouped, tiles, gated, stream);
}

void moe_sum(const MoeSum& call, Stream stream) {
  check(call.rows >= 0, "moe_sum", "rows", "0 or more", call.rows);
  check(call.hidden > 0 && call.hidden % 4 == 0, "moe_sum", "hidden", "a multiple of 4", call.hidden);
  if (call.rows == 0) return;
  const int64_t threads = call.rows * (call.hidden / 4);
  launch<add_weighted>("moe_sum", dim3(unsigned((threads + kSumThreads - 1) / kSumThreads)), kSumThreads, 0, stream,
                       call);
}

}  // namespace helexa::cuda
