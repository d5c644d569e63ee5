#include "dequantize.h"

#include <cmath>
#include <cstring>
#include <string>

#include "check.h"
#include "half.h"
#include "iq_grids.h"
#include "thread_pool.h"

namespace helexa {
namespace {

float as_float(half_bits h) { return float_from_half(h); }

// Value i of a 32-value block of nibbles: 0..15 are the low halves, 16..31 the high ones.
int nibble(const uint8_t* qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }

template <class Block>
int five_bits(const Block& b, int i) {
  return nibble(b.qs, i) | (b.qh[i / 8] >> (i % 8) & 1) << 4;
}

void block(const block_q4_0& b, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = as_float(b.d) * float(nibble(b.qs, i) - 8);
}
void block(const block_q4_1& b, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = as_float(b.d) * float(nibble(b.qs, i)) + as_float(b.m);
}
void block(const block_q5_0& b, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = as_float(b.d) * float(five_bits(b, i) - 16);
}
void block(const block_q5_1& b, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = as_float(b.d) * float(five_bits(b, i)) + as_float(b.m);
}
void block(const block_q8_0& b, float* out) {
  for (int i = 0; i < 32; ++i) out[i] = float(b.qs[i]) * as_float(b.d);
}
void block(const block_q1_0& b, float* out) {
  for (int i = 0; i < 128; ++i) out[i] = as_float(b.d) * float(2 * (b.qs[i / 8] >> (i % 8) & 1) - 1);
}
void iq4_nl(const void* p, float* out) {
  const auto& b = *static_cast<const block_iq4_nl*>(p);
  for (int i = 0; i < 32; ++i) out[i] = as_float(b.d) * float(kIq4Values[nibble(b.qs, i)]);
}
void block(const block_mxfp4& b, float* out) {
  const float d = float_from_bits(b.e < 2 ? 0x00200000u << b.e : uint32_t(b.e - 1) << 23);
  for (int i = 0; i < 32; ++i) out[i] = d * float(kE2m1Doubled[nibble(b.qs, i)]);
}
void block(const block_nvfp4& b, float* out) {
  for (int s = 0; s < 4; ++s) {
    const int code = b.d[s], exponent = code >> 3 & 15;
    const float mantissa = float(code & 7);
    const float scale = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(1 + mantissa / 8, exponent - 7);
    const float d = code == 0 || code == 0x7f ? 0.0f : scale * 0.5f;
    for (int i = 0; i < 16; ++i) {
      const int q = i < 8 ? b.qs[s][i] & 15 : b.qs[s][i - 8] >> 4;
      out[16 * s + i] = d * float(kE2m1Doubled[q]);
    }
  }
}

int two_bits(const uint8_t (*qs)[32], int i) { return qs[i / 128][i % 32] >> (i % 128 / 32 * 2) & 3; }

void block(const block_q2_K& b, float* out) {
  for (int i = 0; i < 256; ++i) {
    const float scale = as_float(b.d) * float(b.scales[i / 16] & 15);
    const float minimum = as_float(b.dmin) * float(b.scales[i / 16] >> 4);
    out[i] = scale * float(two_bits(b.qs, i)) - minimum;
  }
}
void block(const block_q3_K& b, float* out) {
  for (int i = 0; i < 256; ++i) {
    const int s = i / 16;
    const int low = s < 8 ? b.scales[s] & 15 : b.scales[s - 8] >> 4;
    const int high = b.scales[8 + s % 4] >> (2 * (s / 4)) & 3;
    const float scale = as_float(b.d) * float((low | high << 4) - 32);
    out[i] = scale * float(two_bits(b.qs, i) + 4 * (b.hmask[i % 32] >> (i / 32) & 1) - 4);
  }
}

// Scale (first) and minimum (second) of group g: 12 bytes hold eight of each, six bits wide.
void six_bit_scales(const uint8_t* packed, int g, int* scale, int* minimum) {
  if (g < 4) {
    *scale = packed[g] & 63, *minimum = packed[g + 4] & 63;
  } else {
    *scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
    *minimum = packed[g + 4] >> 4 | (packed[g] >> 6) << 4;
  }
}

template <class Block, class Code>
void scaled_with_minimum(const Block& b, Code code, float* out) {
  for (int g = 0; g < 8; ++g) {
    int s, m;
    six_bit_scales(b.scales, g, &s, &m);
    const float scale = as_float(b.d) * float(s), minimum = as_float(b.dmin) * float(m);
    for (int i = 0; i < 32; ++i) out[32 * g + i] = scale * float(code(g, i)) - minimum;
  }
}
void block(const block_q4_K& b, float* out) {
  scaled_with_minimum(b, [&](int g, int i) { return b.qs[g / 2][i] >> (g % 2 * 4) & 15; }, out);
}
void block(const block_q5_K& b, float* out) {
  const auto code = [&](int g, int i) { return (b.qs[g / 2][i] >> (g % 2 * 4) & 15) | (b.qh[i] >> g & 1) << 4; };
  scaled_with_minimum(b, code, out);
}
void block(const block_q6_K& b, float* out) {
  for (int i = 0; i < 256; ++i) {
    const int h = i / 128, j = i % 128;
    const int low = b.ql[h][j % 64] >> (j / 64 * 4) & 15, high = b.qh[h][j % 32] >> (j / 32 * 2) & 3;
    out[i] = as_float(b.d) * float(b.scales[i / 16]) * float((low | high << 4) - 32);
  }
}
void block(const block_tq1_0& b, float* out) {
  static constexpr int kPowers[5] = {1, 3, 9, 27, 81};
  const auto emit = [&](uint8_t byte, int digit) {
    const uint8_t top = uint8_t(byte * kPowers[digit]);
    *out++ = as_float(b.d) * float((top * 3 >> 8) - 1);
  };
  for (int digit = 0; digit < 5; ++digit)
    for (int i = 0; i < 32; ++i) emit(b.qs[i], digit);
  for (int digit = 0; digit < 5; ++digit)
    for (int i = 32; i < 48; ++i) emit(b.qs[i], digit);
  for (int digit = 0; digit < 4; ++digit)
    for (int i = 0; i < 4; ++i) emit(b.qh[i], digit);
}
void block(const block_tq2_0& b, float* out) {
  for (int i = 0; i < 256; ++i) out[i] = as_float(b.d) * float(two_bits(b.qs, i) - 1);
}

// `count` signed magnitudes of one grid vector times the scale.
template <class Vector>
void emit_vector(float scale, Vector vector, int signs, float* out) {
  for (int i = 0; i < int(sizeof(Vector)); ++i) {
    const float magnitude = float(int8_t(vector >> 8 * i & 0xff));
    out[i] = scale * magnitude * (signs >> i & 1 ? -1.0f : 1.0f);
  }
}

uint32_t word_at(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

void block(const block_iq2_xxs& b, float* out) {
  for (int g = 0; g < 8; ++g) {
    uint8_t index[4];
    std::memcpy(index, b.qs + 4 * g, 4);
    const uint32_t word = word_at(b.qs + 4 * g + 2);
    const float scale = as_float(b.d) * (0.5f + float(word >> 28)) * 0.25f;
    for (int v = 0; v < 4; ++v)
      emit_vector(scale, kIq2XxsGrid[index[v]], kEvenSigns[word >> 7 * v & 127], out + 32 * g + 8 * v);
  }
}
void block(const block_iq2_xs& b, float* out) {
  for (int v = 0; v < 32; ++v) {
    const float scale = as_float(b.d) * (0.5f + float(b.scales[v / 4] >> (v / 2 % 2 * 4) & 15)) * 0.25f;
    emit_vector(scale, kIq2XsGrid[b.qs[v] & 511], kEvenSigns[b.qs[v] >> 9], out + 8 * v);
  }
}
void block(const block_iq2_s& b, float* out) {
  for (int v = 0; v < 32; ++v) {
    const float scale = as_float(b.d) * (0.5f + float(b.scales[v / 4] >> (v / 2 % 2 * 4) & 15)) * 0.25f;
    const int index = b.qs[v] | (b.qh[v / 4] >> (v % 4 * 2) & 3) << 8;
    emit_vector(scale, kIq2SGrid[index], b.signs[v], out + 8 * v);
  }
}
void block(const block_iq3_xxs& b, float* out) {
  for (int v = 0; v < 64; ++v) {
    const uint32_t word = word_at(b.signs_scale + v / 8 * 4);
    const float scale = as_float(b.d) * (0.5f + float(word >> 28)) * 0.5f;
    const int signs = kEvenSigns[word >> 7 * (v / 2 % 4) & 127] >> (v % 2 * 4);
    emit_vector(scale, kIq3XxsGrid[b.qs[v]], signs, out + 4 * v);
  }
}
void block(const block_iq3_s& b, float* out) {
  for (int v = 0; v < 64; ++v) {
    const float scale = as_float(b.d) * (1 + 2 * float(b.scales[v / 16] >> (v / 8 % 2 * 4) & 15));
    const int index = b.qs[v] | (b.qh[v / 8] >> (v % 8) & 1) << 8;
    emit_vector(scale, kIq3SGrid[index], b.signs[v / 2] >> (v % 2 * 4), out + 4 * v);
  }
}

void emit_shifted(float scale, uint64_t vector, float shift, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = scale * (float(int8_t(vector >> 8 * i & 0xff)) + shift);
}
void block(const block_iq1_s& b, float* out) {
  for (int v = 0; v < 32; ++v) {
    const int qh = b.qh[v / 4];
    const float scale = as_float(b.d) * (2 * float(qh >> 12 & 7) + 1);
    const int index = b.qs[v] | (qh >> (v % 4 * 3) & 7) << 8;
    emit_shifted(scale, kIq1SGrid[index], qh & 0x8000 ? -0.125f : 0.125f, out + 8 * v);
  }
}
void block(const block_iq1_m& b, float* out) {
  const uint16_t* s = b.scales;
  const float d = as_float(half_bits(s[0] >> 12 | (s[1] >> 12) << 4 | (s[2] >> 12) << 8 | (s[3] >> 12) << 12));
  for (int v = 0; v < 32; ++v) {
    const float scale = d * (2 * float(s[v / 8] >> (v / 2 % 4 * 3) & 7) + 1);
    const int high = b.qh[v / 2] >> (v % 2 * 4) & 15;
    emit_shifted(scale, kIq1SGrid[b.qs[v] | (high & 7) << 8], high & 8 ? -0.125f : 0.125f, out + 8 * v);
  }
}
void block(const block_iq4_xs& b, float* out) {
  for (int g = 0; g < 8; ++g) {
    const int s = (b.scales_l[g / 2] >> (g % 2 * 4) & 15) | (b.scales_h >> 2 * g & 3) << 4;
    const float scale = as_float(b.d) * float(s - 32);
    for (int i = 0; i < 32; ++i) out[32 * g + i] = scale * float(kIq4Values[nibble(b.qs[g], i)]);
  }
}

template <class Block>
void decode(const void* p, float* out) {
  block(*static_cast<const Block*>(p), out);
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
    {T::Q4_0, "Q4_0", 32, 18, decode<block_q4_0>},
    {T::Q4_1, "Q4_1", 32, 20, decode<block_q4_1>},
    {T::Q5_0, "Q5_0", 32, 22, decode<block_q5_0>},
    {T::Q5_1, "Q5_1", 32, 24, decode<block_q5_1>},
    {T::Q8_0, "Q8_0", 32, 34, decode<block_q8_0>},
    {T::Q1_0, "Q1_0", 128, 18, decode<block_q1_0>},
    {T::Q2_K, "Q2_K", 256, 84, decode<block_q2_K>},
    {T::Q3_K, "Q3_K", 256, 110, decode<block_q3_K>},
    {T::Q4_K, "Q4_K", 256, 144, decode<block_q4_K>},
    {T::Q5_K, "Q5_K", 256, 176, decode<block_q5_K>},
    {T::Q6_K, "Q6_K", 256, 210, decode<block_q6_K>},
    {T::IQ4_NL, "IQ4_NL", 32, 18, iq4_nl},
    {T::IQ4_XS, "IQ4_XS", 256, 136, decode<block_iq4_xs>},
    {T::IQ3_S, "IQ3_S", 256, 110, decode<block_iq3_s>},
    {T::IQ3_XXS, "IQ3_XXS", 256, 98, decode<block_iq3_xxs>},
    {T::IQ2_S, "IQ2_S", 256, 82, decode<block_iq2_s>},
    {T::IQ2_XS, "IQ2_XS", 256, 74, decode<block_iq2_xs>},
    {T::IQ2_XXS, "IQ2_XXS", 256, 66, decode<block_iq2_xxs>},
    {T::IQ1_S, "IQ1_S", 256, 50, decode<block_iq1_s>},
    {T::IQ1_M, "IQ1_M", 256, 56, decode<block_iq1_m>},
    {T::TQ1_0, "TQ1_0", 256, 54, decode<block_tq1_0>},
    {T::TQ2_0, "TQ2_0", 256, 66, decode<block_tq2_0>},
    {T::MXFP4, "MXFP4", 32, 17, decode<block_mxfp4>},
    {T::NVFP4, "NVFP4", 64, 36, decode<block_nvfp4>},
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
