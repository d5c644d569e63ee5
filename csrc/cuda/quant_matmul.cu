// Products with many rows of activations: the tiles of quant_matmul.cuh over merged matrices, matrices decoded as a
// whole for a library's product, and what stands behind a product.
#include <algorithm>

#include "quant_matmul.cuh"
#include "quant_matmul.h"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

struct Part {
  WeightPlanes planes;
  QuantType type;
  int32_t rows, first_tile, passes;
  int64_t column;  // of the output
  float scale;
};
// With silu_mul part i + count are the ups of part i, and `count` the gates alone.
struct Parts {
  int count;
  Part parts[kMostMatmulParts];
};
struct Output {
  float* out;
  int64_t rows, pitch;  // pitch: columns of the output, or of a split's sums
  bool add, partial;
};

template <int kTokens, bool kGated>
__global__ void __launch_bounds__(kMatmulThreads, kTokens == kWideTokens ? 1 : 2)
    multiply(const Parts parts, MatmulInput input, Output output) {
  int p = 0;
  while (p + 1 < parts.count && parts.parts[p + 1].first_tile <= int(blockIdx.y)) ++p;
  const Part& part = parts.parts[p];
  const Part& other = parts.parts[kGated ? p + parts.count : p];
  const int tile = int(blockIdx.y) - part.first_tile;
  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  // Gated, a fragment's first eight rows are gates and the others their ups, so that one thread has both sums.
  const auto place = [&](int local) {
    return kGated ? tile * (kTileRows / 2) + local / 16 * 8 + local % 8 : tile * kTileRows + local;
  };
  input.passes = part.passes;
  const int steps = int((input.cols + kStepColumns - 1) / kStepColumns) * part.passes;
  const int first = int(int64_t(steps) * blockIdx.z / gridDim.z),
            last = int(int64_t(steps) * (blockIdx.z + 1) / gridDim.z);
  float* out = output.out + (output.partial ? int64_t(blockIdx.z) * output.rows * output.pitch : 0);

  multiply_tile<kTokens>(
      input, first, last,
      [&](int local) {
        const Part& of = kGated && local / 8 % 2 ? other : part;
        const int row = place(local);
        return WeightRow{&of.planes, of.type, row < of.rows ? row : of.rows - 1};
      },
      [&](int local) {
        const int64_t token = first_token + local;
        return token < output.rows ? token : output.rows - 1;
      },
      [&](int local, int local_token, float sum, float other_sum) {
        const int64_t token = first_token + local_token;
        if (token >= output.rows) return;
        float* row = out + token * output.pitch;
        const int at = place(local);
        if constexpr (kGated) {
          if (at >= part.rows) return;
          const float gate = sum * part.scale, up = other_sum * other.scale;
          if (output.partial) {
            row[part.column + at] = gate;
            row[other.column + at] = up;
          } else {
            row[part.column + at] = silu_mul(gate, up);
          }
        } else {
          const float values[2] = {sum * part.scale, other_sum * part.scale};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (at + 8 * i >= part.rows) continue;
            float* target = row + part.column + at + 8 * i;
            *target = output.add ? *target + values[i] : values[i];
          }
        }
      });
}

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) decode_planes(QuantType type, const WeightPlanes planes, int64_t first_row,
                                                          int64_t num_rows, int groups, uint16_t* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= num_rows * groups) return;
  const int64_t row = at / groups;
  uint32_t pairs[16] = {};
  load_rounded(type, planes, first_row + row, int(at % groups), false, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store_global(out + at * 32 + i * 8, Words{pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]});
}

__global__ void __launch_bounds__(kThreads) finish(const FinishProducts call) {
  const int64_t width = call.silu_mul ? call.width / 2 : call.width;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= call.rows * width) return;
  const int64_t row = at / width, column = at % width;
  const auto sum_at = [&](int64_t c) {
    float sum = 0.0f;
    for (int s = 0; s < call.splits; ++s) sum += call.products[(s * call.rows + row) * call.width + c];
    return sum;
  };
  float value = sum_at(column) * call.first_scale;
  if (call.silu_mul) value = silu_mul(value, sum_at(width + column) * call.second_scale);
  float* target = call.out + row * call.pitch + call.column + column;
  *target = call.add ? *target + value : value;
}

int tokens_of(int64_t rows) { return rows <= kNarrowTokens ? kNarrowTokens : kWideTokens; }
int64_t tiles_of(int64_t rows, bool gated) {
  const int64_t height = gated ? kTileRows / 2 : kTileRows;
  return (rows + height - 1) / height;
}

template <int kTokens>
void multiply_with(const Parts& parts, const MatmulInput& input, const Output& output, int64_t tiles, int splits,
                   bool gated, Stream stream) {
  const dim3 grid(unsigned((output.rows + kTokens - 1) / kTokens), unsigned(tiles), unsigned(splits));
  constexpr size_t shared = matmul_shared_bytes(kTokens);
  if (gated)
    launch<multiply<kTokens, true>>("quant_matmul", grid, kMatmulThreads, shared, stream, parts, input, output);
  else
    launch<multiply<kTokens, false>>("quant_matmul", grid, kMatmulThreads, shared, stream, parts, input, output);
}

}  // namespace

int quant_matmul_splits(const std::vector<int64_t>& part_rows, int64_t cols, int64_t rows, bool silu_mul,
                        int multiprocessors) {
  int64_t tiles = 0;
  for (size_t i = 0; i < (silu_mul ? part_rows.size() / 2 : part_rows.size()); ++i)
    tiles += tiles_of(part_rows[i], silu_mul);
  const int64_t blocks = tiles * ((rows + tokens_of(rows) - 1) / tokens_of(rows));
  if (blocks == 0) return 1;
  // Two blocks run on a multiprocessor at a time. A split of fewer than eight steps is mostly its own start, and more
  // than eight splits write and read more sums than they save.
  const int64_t wanted = 2 * int64_t(multiprocessors) / blocks, most = cols / (8 * kStepColumns);
  return int(std::max<int64_t>(1, std::min<int64_t>({wanted, most, 8})));
}

void quant_matmul(const QuantMatmul& call, Stream stream) {
  constexpr const char* f = "quant_matmul";
  const int64_t count = int64_t(call.parts.size());
  check(count >= 1 && count <= kMostMatmulParts, f, "parts", "1 to 8", count);
  check(!call.silu_mul || count % 2 == 0, f, "parts", "gates and as many ups", count);
  check(!call.silu_mul || !call.add, f, "add", "0 with silu_mul", 1);
  check(call.cols > 0 && call.cols % 32 == 0 && call.cols <= 1 << 24, f, "cols", "a multiple of 32", call.cols);
  check(call.rows >= 0, f, "rows", "at least 0", call.rows);
  check(call.splits >= 1 && call.splits <= 8, f, "splits", "1 to 8", call.splits);
  if (call.splits > 1) check_pointer(reinterpret_cast<uintptr_t>(call.partial), f, "partial");
  Parts parts = {};
  parts.count = int(call.silu_mul ? count / 2 : count);
  int64_t tiles = 0, width = 0;
  for (int i = 0; i < int(count); ++i) {
    const MatmulPart& from = call.parts[size_t(i)];
    check_planes(f, from.quant_type, from.rows, call.cols);
    check(from.rows >= 1 && from.rows <= INT32_MAX / 2, f, "parts", "matrices of at least one row", from.rows);
    Part& part = parts.parts[i];
    part.type = static_cast<QuantType>(from.quant_type);
    part.planes = weight_planes(part.type, from.planes, from.rows, call.cols);
    part.rows = int32_t(from.rows), part.column = width, part.scale = from.scale;
    const bool wide = part.type == QuantType::F32 || (call.exact && part.type == QuantType::F16);
    part.passes = wide ? 3 : call.exact && part.type == QuantType::BF16 ? 2 : 1;
    if (part.passes > 1) check_pointer(reinterpret_cast<uintptr_t>(call.remainder), f, "remainder");
    width += from.rows;
    if (i >= parts.count) {
      const MatmulPart& gate = call.parts[size_t(i - parts.count)];
      check(from.rows == gate.rows, f, "parts", "gates and ups of the same rows", from.rows);
      part.passes = std::max(part.passes, parts.parts[i - parts.count].passes);
      parts.parts[i - parts.count].passes = part.passes;
      continue;
    }
    part.first_tile = int32_t(tiles);
    tiles += tiles_of(from.rows, call.silu_mul);
  }
  check(tiles <= 65535, f, "parts", "at most 65535 tiles of 128 rows", tiles);
  if (call.rows == 0) return;
  const bool split = call.splits > 1;
  const Output output = {split ? call.partial : call.out, call.rows, split || !call.silu_mul ? width : width / 2,
                         !split && call.add, split};
  const MatmulInput input = {call.x, call.remainder, call.cols, 1};
  if (tokens_of(call.rows) == kNarrowTokens)
    multiply_with<kNarrowTokens>(parts, input, output, tiles, call.splits, call.silu_mul, stream);
  else
    multiply_with<kWideTokens>(parts, input, output, tiles, call.splits, call.silu_mul, stream);
  if (!split) return;
  const int64_t out_width = call.silu_mul ? width / 2 : width;
  finish_products(
      {call.partial, call.splits, call.rows, width, 1.0f, 1.0f, call.silu_mul, call.add, call.out, out_width, 0},
      stream);
}

void dequantize_planes(int quant_type, const void* planes, int64_t first_row, int64_t num_rows, int64_t rows,
                       int64_t cols, uint16_t* out, Stream stream) {
  constexpr const char* f = "dequantize_planes";
  check_planes(f, quant_type, rows, cols);
  check(cols % 32 == 0 && cols <= 1 << 24, f, "cols", "a multiple of 32", cols);
  check(first_row >= 0 && num_rows >= 0 && first_row + num_rows <= rows, f, "num_rows", "rows of the matrix", num_rows);
  if (num_rows == 0) return;
  const auto type = static_cast<QuantType>(quant_type);
  const int64_t groups = cols / 32;
  launch<decode_planes>(f, dim3(unsigned((num_rows * groups + kThreads - 1) / kThreads)), kThreads, 0, stream, type,
                        weight_planes(type, planes, rows, cols), first_row, num_rows, int(groups), out);
}

void finish_products(const FinishProducts& call, Stream stream) {
  constexpr const char* f = "finish_products";
  check(call.splits >= 1, f, "splits", "at least 1", call.splits);
  check(!call.silu_mul || (call.width % 2 == 0 && !call.add), f, "width", "gates and ups, not added", call.width);
  const int64_t values = call.rows * (call.silu_mul ? call.width / 2 : call.width);
  if (values == 0) return;
  launch<finish>(f, dim3(unsigned((values + kThreads - 1) / kThreads)), kThreads, 0, stream, call);
}

}  // namespace helexa::cuda
