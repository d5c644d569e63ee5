// Many rows of activations times merged matrices in planes, on the device.
#pragma once

#include <cstdint>
#include <vector>

namespace helexa::cuda {

using Stream = uintptr_t;

constexpr int kMostMatmulParts = 8;

struct MatmulPart {
  int quant_type;
  const void* planes;
  int64_t rows;
  float scale;
};

struct QuantMatmul {
  std::vector<MatmulPart> parts;  // outputs stand side by side
  int64_t cols = 0;               // a multiple of 32
  const uint16_t* x = nullptr;    // bfloat16 [rows, cols]
  // What rounding left of the activations, as bfloat16. Null where nothing is `exact` and no part F32.
  const uint16_t* remainder = nullptr;
  int64_t rows = 0;
  bool silu_mul = false;     // parts are gates, then as many ups of the same heights; out = silu(gate) * up
  bool exact = false;        // F16 and BF16 weights meet what rounding left too
  bool add = false;          // out += instead of out =; not with silu_mul
  float* out = nullptr;      // [rows, sum of the parts' rows], half of it with silu_mul
  int splits = 1;            // the columns are cut into so many ranges, whose sums are added in order
  float* partial = nullptr;  // [splits, rows, sum of the parts' rows] where splits > 1
};

// Weights are rounded to bfloat16. F32 ones, and F16 and BF16 ones that are `exact`, are sums of three products of
// bfloat16 (BF16 of two) that make up about 16 bits of mantissa. Throws std::invalid_argument.
void quant_matmul(const QuantMatmul& call, Stream stream);

// How many splits let a launch fill a device: a function of the shapes alone.
int quant_matmul_splits(const std::vector<int64_t>& part_rows, int64_t cols, int64_t rows, bool silu_mul,
                        int multiprocessors);

// Rows [first_row, first_row + num_rows) of a matrix [rows, cols] in planes, rounded to bfloat16 [num_rows, cols].
void dequantize_planes(int quant_type, const void* planes, int64_t first_row, int64_t num_rows, int64_t rows,
                       int64_t cols, uint16_t* out, Stream stream);

// The sums of products [splits, rows, width]; out [rows, pitch] from `column` on. With silu_mul the first half of
// `width` are gates and the other ups; scales are what each half is multiplied with.
struct FinishProducts {
  const float* products;
  int splits;
  int64_t rows, width;
  float first_scale, second_scale;
  bool silu_mul, add;
  float* out;
  int64_t pitch, column;
};
void finish_products(const FinishProducts& call, Stream stream);

}  // namespace helexa::cuda
