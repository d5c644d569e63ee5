// Rows of a table in planes to float32. A thread writes the values of one segment, or of 16 bytes of numbers.
#include "quant_embedding.h"
#include "quant_planes.cuh"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256;

template <QuantType kType>
constexpr int kValuesOf = kIsNumber<kType> ? 16 / block_fields(kType).block_bytes : 16;  // a thread

template <QuantType kType>
__device__ __forceinline__ void load_values(const WeightPlanes& weight, int64_t row, int piece,
                                            float (&values)[kValuesOf<kType>]) {
  if constexpr (kIsNumber<kType>) {
    const Words words = NumberUnit<kType>::load(weight, row, piece);
#pragma unroll
    for (int i = 0; i < kValuesOf<kType>; ++i) values[i] = NumberUnit<kType>::value(words, i);
  } else {
    const Segment segment = load_segment<kType>(weight, row, piece);
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = value_of(segment, i);
  }
}

template <QuantType kType>
__global__ void __launch_bounds__(kThreads)
    embed(WeightPlanes weight, int64_t rows, int cols, float scale, const int64_t* ids, int64_t n, float* out) {
  constexpr int kValues = kValuesOf<kType>;
  const int pieces = (cols + kValues - 1) / kValues;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, t = thread / pieces;
  if (t >= n) return;
  const int piece = int(thread % pieces);
  const int64_t id = ids[t];
  float values[kValues];
  if (id >= 0 && id < rows) {
    load_values<kType>(weight, id, piece, values);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = bit_cast<float>(0x7fc00000u);
  }
  float* const at = out + t * cols + int64_t(piece) * kValues;
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    Vector<float, 4> four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = values[i + j] * scale;
    if (cols % 4 == 0) {  // so is every row's place
      if (piece * kValues + i < cols) store_global(at + i, four);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (piece * kValues + i + j < cols) at[i + j] = four[j];
    }
  }
}

}  // namespace

void quant_embedding(int quant_type, const void* planes, int64_t rows, int64_t cols, float scale, const int64_t* ids,
                     int64_t n, float* out, Stream stream) {
  constexpr const char* kName = "quant_embedding";
  check_planes(kName, quant_type, rows, cols);
  check(n >= 0, kName, "n", "at least 0", n);
  if (n == 0) return;
  const auto type = static_cast<QuantType>(quant_type);
  visit_type(type, [&](auto constant) {
    constexpr QuantType kType = decltype(constant)::value;
    constexpr int kValues = kValuesOf<kType>;
    const int64_t threads = n * ((cols + kValues - 1) / kValues);
    launch<embed<kType>>(kName, dim3(unsigned((threads + kThreads - 1) / kThreads)), kThreads, 0, stream,
                         weight_planes(type, planes, rows, cols), rows, int(cols), scale, ids, n, out);
  });
}

}  // namespace helexa::cuda
