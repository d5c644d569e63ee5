#include "dequantize.h"

#include <cstring>
#include <string>

#include "check.h"
#include "quant_values.h"
#include "thread_pool.h"

namespace helexa {
namespace {

template <class Block, int kSize>
void decode(const void* p, float* out) {
  const auto& block = *static_cast<const Block*>(p);
  for (int g = 0; g < kSize / 32; ++g) {
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i) out[32 * g + i] = value(block, g, i);
  }
}
// The same by whole vectors of kLength values: a grid is read once for each.
template <class Block, int kLength>
void decode_grid(const void* p, float* out) {
  const auto& block = *static_cast<const Block*>(p);
  for (int v = 0; v < 256 / kLength; ++v) {
    const GridVector vector = grid_vector(block, v);
    for (int i = 0; i < kLength; ++i) out[kLength * v + i] = component(vector, i);
  }
}
template <class Number>
void plain(const void* p, float* out) {
  Number value;
  std::memcpy(&value, p, sizeof value);
  *out = static_cast<float>(value);
}
void f16(const void* p, float* out) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  *out = float_from_half(bits);
}
void bf16(const void* p, float* out) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  *out = float_from_bfloat16(bits);
}

using T = QuantType;
constexpr TypeTraits kTypes[] = {
    {T::F32, "F32", 1, 4, plain<float>},
    {T::F16, "F16", 1, 2, f16},
    {T::BF16, "BF16", 1, 2, bf16},
    {T::F64, "F64", 1, 8, plain<double>},
    {T::I8, "I8", 1, 1, plain<int8_t>},
    {T::I16, "I16", 1, 2, plain<int16_t>},
    {T::I32, "I32", 1, 4, plain<int32_t>},
    {T::I64, "I64", 1, 8, plain<int64_t>},
    {T::Q4_0, "Q4_0", 32, 18, decode<block_q4_0, 32>},
    {T::Q4_1, "Q4_1", 32, 20, decode<block_q4_1, 32>},
    {T::Q5_0, "Q5_0", 32, 22, decode<block_q5_0, 32>},
    {T::Q5_1, "Q5_1", 32, 24, decode<block_q5_1, 32>},
    {T::Q8_0, "Q8_0", 32, 34, decode<block_q8_0, 32>},
    {T::Q1_0, "Q1_0", 128, 18, decode<block_q1_0, 128>},
    {T::Q2_K, "Q2_K", 256, 84, decode<block_q2_K, 256>},
    {T::Q3_K, "Q3_K", 256, 110, decode<block_q3_K, 256>},
    {T::Q4_K, "Q4_K", 256, 144, decode<block_q4_K, 256>},
    {T::Q5_K, "Q5_K", 256, 176, decode<block_q5_K, 256>},
    {T::Q6_K, "Q6_K", 256, 210, decode<block_q6_K, 256>},
    {T::IQ4_NL, "IQ4_NL", 32, 18, decode<block_iq4_nl, 32>},
    {T::IQ4_XS, "IQ4_XS", 256, 136, decode<block_iq4_xs, 256>},
    {T::IQ3_S, "IQ3_S", 256, 110, decode_grid<block_iq3_s, 4>},
    {T::IQ3_XXS, "IQ3_XXS", 256, 98, decode_grid<block_iq3_xxs, 4>},
    {T::IQ2_S, "IQ2_S", 256, 82, decode_grid<block_iq2_s, 8>},
    {T::IQ2_XS, "IQ2_XS", 256, 74, decode_grid<block_iq2_xs, 8>},
    {T::IQ2_XXS, "IQ2_XXS", 256, 66, decode_grid<block_iq2_xxs, 8>},
    {T::IQ1_S, "IQ1_S", 256, 50, decode_grid<block_iq1_s, 8>},
    {T::IQ1_M, "IQ1_M", 256, 56, decode_grid<block_iq1_m, 8>},
    {T::TQ1_0, "TQ1_0", 256, 54, decode<block_tq1_0, 256>},
    {T::TQ2_0, "TQ2_0", 256, 66, decode<block_tq2_0, 256>},
    {T::MXFP4, "MXFP4", 32, 17, decode<block_mxfp4, 32>},
    {T::NVFP4, "NVFP4", 64, 36, decode<block_nvfp4, 64>},
};

}  // namespace

const TypeTraits& type_traits(int quant_type, const char* function) {
  for (const TypeTraits& traits : kTypes)
    if (static_cast<int>(traits.type) == quant_type) return traits;
  fail(function, "quant_type", "the ggml number of a stored type", std::to_string(quant_type));
}

void dequantize_row(const TypeTraits& traits, const void* source, int64_t n, float* out) {
  if (traits.type == QuantType::F32) {
    std::memcpy(out, source, size_t(n) * 4);
    return;
  }
  const auto* p = static_cast<const uint8_t*>(source);
  for (int64_t i = 0; i < n; i += traits.block_size, p += traits.block_bytes) traits.dequantize_block(p, out + i);
}

void dequantize(int quant_type, const void* source, int64_t n, float* out) {
  const TypeTraits& traits = type_traits(quant_type, "dequantize");
  if (n < 0 || n % traits.block_size)
    fail("dequantize", "n", "a multiple of the block size " + std::to_string(traits.block_size), std::to_string(n));
  const auto* p = static_cast<const uint8_t*>(source);
  parallel_for(n / traits.block_size, 4096 / traits.block_size, [&](int64_t begin, int64_t end, int) {
    dequantize_row(traits, p + begin * traits.block_bytes, (end - begin) * traits.block_size,
                   out + begin * traits.block_size);
  });
}

}  // namespace helexa
