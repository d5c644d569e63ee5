// Every stored type to float32 or bfloat16 on the device, bit for bit as helexa_engine/quant/dequantize.py (compiled
// with -fmad=false). A thread writes eight neighbouring values at once; what a group of them shares is computed once
// for the eight.
#include "common.cuh"
#include "dequantize.h"
// Behind common.cuh.
#include "../check.h"
#include "../quant_values.h"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256, kValues = 8;

__device__ __forceinline__ void store_values(float* out, const float (&values)[kValues]) {
  Vector<float, 4> halves[2];
#pragma unroll
  for (int i = 0; i < kValues; ++i) halves[i / 4][i % 4] = values[i];
  store_global(out, halves[0]);
  store_global(out + 4, halves[1]);
}
__device__ __forceinline__ void store_values(uint16_t* out, const float (&values)[kValues]) {
  Vector<uint16_t, kValues> rounded;
#pragma unroll
  for (int i = 0; i < kValues; ++i) rounded[i] = bfloat16_from_float(values[i]);
  store_global(out, rounded);
}

// blocks [n / kSize] -> out [n], n a multiple of kSize.
template <class Block, int kSize, class Out>
__global__ void __launch_bounds__(kThreads) dequantize_blocks(const Block* blocks, int64_t n, Out* out) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kValues;
  if (first >= n) return;
  const Block& block = blocks[first / kSize];
  const int within = int(first % kSize);
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = value(block, within / 32, within % 32 + i);
  store_values(out + first, values);
}

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(int8_t x) { return float(x); }
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
__device__ __forceinline__ float number(Half x) { return float_from_half(x.bits); }
__device__ __forceinline__ float number(Bfloat16 x) { return float_from_bfloat16(x.bits); }
__device__ __forceinline__ void store_value(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_value(uint16_t* out, float value) { *out = bfloat16_from_float(value); }

template <class Number, class Out>
__global__ void __launch_bounds__(kThreads) convert_numbers(const Number* numbers, int64_t n, Out* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) store_value(out + i, number(numbers[i]));
}

dim3 grid_for(int64_t threads) { return dim3(unsigned((threads + kThreads - 1) / kThreads)); }

template <class Block, int kSize, class Out>
void blocks(const void* source, int64_t n, Out* out, Stream stream) {
  if (n % kSize) fail("dequantize", "n", "a multiple of the block size " + std::to_string(kSize), std::to_string(n));
  launch<dequantize_blocks<Block, kSize, Out>>("dequantize", grid_for(n / kValues), kThreads, 0, stream,
                                               static_cast<const Block*>(source), n, out);
}

template <class Number, class Out>
void numbers(const void* source, int64_t n, Out* out, Stream stream) {
  launch<convert_numbers<Number, Out>>("dequantize", grid_for(n), kThreads, 0, stream,
                                       static_cast<const Number*>(source), n, out);
}

}  // namespace

template <class Out>
void dequantize(int quant_type, const void* source, int64_t n, Out* out, Stream stream) {
  check(n >= 0, "dequantize", "n", "at least 0", n);
  if (n == 0) return;
  switch (static_cast<QuantType>(quant_type)) {
    case QuantType::F32:
      return numbers<float>(source, n, out, stream);
    case QuantType::F16:
      return numbers<Half>(source, n, out, stream);
    case QuantType::BF16:
      return numbers<Bfloat16>(source, n, out, stream);
    case QuantType::I8:
      return numbers<int8_t>(source, n, out, stream);
    case QuantType::Q4_0:
      return blocks<block_q4_0, 32>(source, n, out, stream);
    case QuantType::Q4_1:
      return blocks<block_q4_1, 32>(source, n, out, stream);
    case QuantType::Q5_0:
      return blocks<block_q5_0, 32>(source, n, out, stream);
    case QuantType::Q5_1:
      return blocks<block_q5_1, 32>(source, n, out, stream);
    case QuantType::Q8_0:
      return blocks<block_q8_0, 32>(source, n, out, stream);
    case QuantType::Q1_0:
      return blocks<block_q1_0, 128>(source, n, out, stream);
    case QuantType::Q2_K:
      return blocks<block_q2_K, 256>(source, n, out, stream);
    case QuantType::Q3_K:
      return blocks<block_q3_K, 256>(source, n, out, stream);
    case QuantType::Q4_K:
      return blocks<block_q4_K, 256>(source, n, out, stream);
    case QuantType::Q5_K:
      return blocks<block_q5_K, 256>(source, n, out, stream);
    case QuantType::Q6_K:
      return blocks<block_q6_K, 256>(source, n, out, stream);
    case QuantType::IQ4_NL:
      return blocks<block_iq4_nl, 32>(source, n, out, stream);
    case QuantType::IQ4_XS:
      return blocks<block_iq4_xs, 256>(source, n, out, stream);
    case QuantType::IQ3_S:
      return blocks<block_iq3_s, 256>(source, n, out, stream);
    case QuantType::IQ3_XXS:
      return blocks<block_iq3_xxs, 256>(source, n, out, stream);
    case QuantType::IQ2_S:
      return blocks<block_iq2_s, 256>(source, n, out, stream);
    case QuantType::IQ2_XS:
      return blocks<block_iq2_xs, 256>(source, n, out, stream);
    case QuantType::IQ2_XXS:
      return blocks<block_iq2_xxs, 256>(source, n, out, stream);
    case QuantType::IQ1_S:
      return blocks<block_iq1_s, 256>(source, n, out, stream);
    case QuantType::IQ1_M:
      return blocks<block_iq1_m, 256>(source, n, out, stream);
    case QuantType::TQ1_0:
      return blocks<block_tq1_0, 256>(source, n, out, stream);
    case QuantType::TQ2_0:
      return blocks<block_tq2_0, 256>(source, n, out, stream);
    case QuantType::MXFP4:
      return blocks<block_mxfp4, 32>(source, n, out, stream);
    case QuantType::NVFP4:
      return blocks<block_nvfp4, 64>(source, n, out, stream);
    default:
      fail("dequantize", "quant_type", "the ggml number of a type that models are stored in",
           std::to_string(quant_type));
  }
}

template void dequantize(int, const void*, int64_t, float*, Stream);
template void dequantize(int, const void*, int64_t, uint16_t*, Stream);

}  // namespace helexa::cuda
