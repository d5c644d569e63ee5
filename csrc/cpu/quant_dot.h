// The inner kernels of quant_matmul, one table of them an instruction-set level. All levels read the same packed
// weights and compute the same integers; float32 sums run over the columns in one fixed order, whatever number of
// activation rows is computed together, so a row's result does not depend on its company.
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace helexa {

constexpr int kChunk = 256;  // columns of activations stored together
constexpr int kChunkGroups = kChunk / 32;

// 256 activations as int8, one scale for each 32. Activations of many rows are stored chunk by chunk: [chunk][row].
struct ActivationChunk {
  int8_t q[kChunk];
  float scale[kChunkGroups];
  int32_t negative_sum_32[kChunkGroups];  // -(sum of q) over 32 columns: the cure for a code's offset
  int32_t negative_sum_16[2 * kChunkGroups];
  float negative_total_32[kChunkGroups];  // scale times the above: what a minimum is multiplied with
  float negative_total_16[2 * kChunkGroups];
};

// 256 activations for float weights.
struct alignas(64) FloatChunk {
  float x[kChunk];
};

// The same rounded to bfloat16 (to nearest, ties to even) for bfloat16 weights: products of two are exact in float32,
// and there are instructions for them. A last odd column has a zero beside it.
struct alignas(64) RoundedChunk {
  uint16_t x[kChunk];
};

// 32 columns of 16 rows ready for the dot product: the scratch form of every code type in a matmul.
struct alignas(64) UnpackedGroup {
  uint8_t codes[8 * 64];  // vector j: quad j
  float scale[2][kLanes];
  float minimum[2][kLanes];
};

// Activations handed to a kernel: `columns` is the weights' column count, `rows` how many activation rows to compute.
// Results go to sums[32 * row + lane]; the 16 lanes are the rows of one weight group.
constexpr int kSumStride = 2 * kLanes;

struct CodeKernels {
  // Any number of rows, best for a few: unpacks as it goes. `x` points at chunk 0 of the first row.
  void (*matvec)(const uint8_t* group, int64_t header_area, int64_t cols, const ActivationChunk* x,
                 int64_t chunk_stride, int rows, float* sums);
  // Chunk `chunk` of a row group into `groups` UnpackedGroups.
  void (*unpack)(const uint8_t* group, int64_t header_area, int64_t chunk, int groups, UnpackedGroup* out);
  // sums += dot products of the unpacked groups of one or (b not null) two row groups with `rows` chunks at x.
  void (*tile)(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows,
               float* sums);
};

struct Kernels {
  // Normalises (norm_weight may be null) and quantises one row. Chunk i goes to out[i * chunk_stride].
  void (*quantize_row)(const float* x, int64_t cols, const float* norm_weight, float eps, ActivationChunk* out,
                       int64_t chunk_stride);
  // The same without quantising, and with rounding to bfloat16.
  void (*normalize_row)(const float* x, int64_t cols, const float* norm_weight, float eps, FloatChunk* out,
                        int64_t chunk_stride);
  void (*round_row)(const float* x, int64_t cols, const float* norm_weight, float eps, RoundedChunk* out,
                    int64_t chunk_stride);
  const CodeKernels* (*codes)(QuantType type);  // null unless packed_layout(type).storage is kCodes
  // `depth` columns of packed F16 or BF16 to float32 [depth][16]; of BF16 an even number is written.
  void (*widen)(QuantType type, const uint8_t* source, int depth, float* out);
  // sums += over `depth` columns of [depth][16] float weights and `rows` chunks at x.
  void (*float_tile)(const float* a, const float* b, int depth, const FloatChunk* x, int rows, float* sums);
  // The same with packed bfloat16 weights, whose columns are in pairs, and rounded activations. `next` is what will be
  // wanted next in the place of a and b: it is brought near while these are multiplied.
  void (*bfloat16_tile)(const uint8_t* a, const uint8_t* b, const uint8_t* const* next, int depth,
                        const RoundedChunk* x, int rows, float* sums);
  // The whole width for rows <= 8, straight from packed F32 or F16, or from BF16, of one or two row groups.
  void (*float_matvec)(QuantType type, const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x,
                       int64_t chunk_stride, int rows, float* sums);
  void (*bfloat16_matvec)(const uint8_t* a, const uint8_t* b, int64_t cols, const RoundedChunk* x, int64_t chunk_stride,
                          int rows, float* sums);
  void (*silu_mul)(const float* gate, const float* up, float* out);  // 16 lanes
  double (*int8_rate_loop)(int64_t turns);                           // multiply-adds done (for the rate probes)
  double (*float_rate_loop)(int64_t turns);
  double (*bfloat16_rate_loop)(int64_t turns);
  float (*read_loop)(const float* data, int64_t n);
};

extern const Kernels kKernelsGeneric;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx2Vnni;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Bf16;  // the same with the instruction for bfloat16 products
#endif

// The table of the level in use.
const Kernels& kernels();

}  // namespace helexa
