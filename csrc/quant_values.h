// Value i of group g, 32 values each, of a block of every type, bit for bit as helexa_engine/quant/dequantize.py: one
// definition for the CPU and for CUDA. Whoever includes it may not let products fuse into sums (-ffp-contract=off,
// -fmad=false). CUDA includes cuda/common.cuh first.
#pragma once

#include <cstdint>

#include "quant_blocks.h"

#ifdef __CUDACC__
#define HELEXA_TABLE static __device__ const
#define HELEXA_VALUE __device__ __forceinline__
#else
#include "cpu/half.h"
#define HELEXA_VALUE static inline
#endif
#include "iq_grids.h"

namespace helexa {

#ifdef __CUDACC__
HELEXA_VALUE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
HELEXA_VALUE float float_from_half(half_bits half) { return cuda::float_from_half(half); }
#endif

// Value i of a 32-value block of nibbles: 0..15 are the low halves, 16..31 the high ones.
HELEXA_VALUE int nibble(const uint8_t* qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }

HELEXA_VALUE float value(const block_q4_0& b, int, int i) { return float_from_half(b.d) * float(nibble(b.qs, i) - 8); }
HELEXA_VALUE float value(const block_q4_1& b, int, int i) {
  return float_from_half(b.d) * float(nibble(b.qs, i)) + float_from_half(b.m);
}
template <class Block>
HELEXA_VALUE int five_bits(const Block& b, int i) {
  return nibble(b.qs, i) | (b.qh[i / 8] >> (i % 8) & 1) << 4;
}
HELEXA_VALUE float value(const block_q5_0& b, int, int i) { return float_from_half(b.d) * float(five_bits(b, i) - 16); }
HELEXA_VALUE float value(const block_q5_1& b, int, int i) {
  return float_from_half(b.d) * float(five_bits(b, i)) + float_from_half(b.m);
}
HELEXA_VALUE float value(const block_q8_0& b, int, int i) { return float(b.qs[i]) * float_from_half(b.d); }
HELEXA_VALUE float value(const block_q1_0& b, int g, int i) {
  return float_from_half(b.d) * float(2 * (b.qs[4 * g + i / 8] >> (i % 8) & 1) - 1);
}
HELEXA_VALUE float value(const block_iq4_nl& b, int, int i) {
  return float_from_half(b.d) * float(kIq4Values[nibble(b.qs, i)]);
}
// Half of two to the power of e - 127: the values are doubled.
HELEXA_VALUE float mxfp4_scale(int e) { return float_from_bits(e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23); }
HELEXA_VALUE float value(const block_mxfp4& b, int, int i) {
  return mxfp4_scale(b.e) * float(kE2m1Doubled[nibble(b.qs, i)]);
}
// An unsigned float of four exponent and three mantissa bits, halved because the values are doubled.
HELEXA_VALUE float nvfp4_scale(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float scale = exponent == 0 ? float(mantissa) * 0x1p-9f
                                    : float(8 + mantissa) * float_from_bits(uint32_t(exponent - 10 + 127) << 23);
  return code == 0 || code == 0x7f ? 0.0f : scale * 0.5f;
}
HELEXA_VALUE float value(const block_nvfp4& b, int g, int i) {
  const int s = 2 * g + i / 16;
  return nvfp4_scale(b.d[s]) * float(kE2m1Doubled[b.qs[s][i % 8] >> (i / 8 % 2 * 4) & 15]);
}

HELEXA_VALUE int two_bits(const uint8_t (*qs)[32], int g, int i) { return qs[g / 4][i] >> (g % 4 * 2) & 3; }

HELEXA_VALUE float value(const block_q2_K& b, int g, int i) {
  const int s = b.scales[2 * g + i / 16];
  const float scale = float_from_half(b.d) * float(s & 15), minimum = float_from_half(b.dmin) * float(s >> 4);
  return scale * float(two_bits(b.qs, g, i)) - minimum;
}
HELEXA_VALUE float value(const block_q3_K& b, int g, int i) {
  const int s = 2 * g + i / 16;
  const int low = s < 8 ? b.scales[s] & 15 : b.scales[s - 8] >> 4;
  const int high = b.scales[8 + s % 4] >> (2 * (s / 4)) & 3;
  const float scale = float_from_half(b.d) * float((low | high << 4) - 32);
  return scale * float(two_bits(b.qs, g, i) + 4 * (b.hmask[i] >> g & 1) - 4);
}

// Scale (first) and minimum (second) of group g: 12 bytes hold eight of each, six bits wide.
HELEXA_VALUE void six_bit_scales(const uint8_t* packed, int g, int* scale, int* minimum) {
  if (g < 4) {
    *scale = packed[g] & 63, *minimum = packed[g + 4] & 63;
  } else {
    *scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
    *minimum = packed[g + 4] >> 4 | (packed[g] >> 6) << 4;
  }
}
template <class Block>
HELEXA_VALUE float scaled_with_minimum(const Block& b, int g, int code) {
  int s, m;
  six_bit_scales(b.scales, g, &s, &m);
  return float_from_half(b.d) * float(s) * float(code) - float_from_half(b.dmin) * float(m);
}
HELEXA_VALUE float value(const block_q4_K& b, int g, int i) {
  return scaled_with_minimum(b, g, b.qs[g / 2][i] >> (g % 2 * 4) & 15);
}
HELEXA_VALUE float value(const block_q5_K& b, int g, int i) {
  return scaled_with_minimum(b, g, (b.qs[g / 2][i] >> (g % 2 * 4) & 15) | (b.qh[i] >> g & 1) << 4);
}
HELEXA_VALUE float value(const block_q6_K& b, int g, int i) {
  const int h = g / 4, q = g % 4;
  const int low = b.ql[h][q % 2 * 32 + i] >> (q / 2 * 4) & 15, high = b.qh[h][i] >> (q * 2) & 3;
  return float_from_half(b.d) * float(b.scales[2 * g + i / 16]) * float((low | high << 4) - 32);
}

// Five digits to the base of three in a byte, as a fraction: times 3^digit, its top digit is times 3 over 256.
HELEXA_VALUE int power_of_three(int digit) {
  return digit == 0 ? 1 : digit == 1 ? 3 : digit == 2 ? 9 : digit == 3 ? 27 : 81;
}
HELEXA_VALUE int ternary(uint8_t byte, int digit) { return (uint8_t(byte * power_of_three(digit)) * 3 >> 8) - 1; }
HELEXA_VALUE float value(const block_tq1_0& b, int g, int i) {
  const float d = float_from_half(b.d);
  if (g < 5) return d * float(ternary(b.qs[i], g));
  if (g < 7 || i < 16) return d * float(ternary(b.qs[32 + i % 16], 2 * (g - 5) + i / 16));
  return d * float(ternary(b.qh[i % 4], (i - 16) / 4));
}
HELEXA_VALUE float value(const block_tq2_0& b, int g, int i) {
  return float_from_half(b.d) * float(two_bits(b.qs, g, i) - 1);
}

// Several values at once, of the types that store them as numbers of vectors in a grid: scale * (component + shift),
// negated where the component's bit of the signs is set. A component is a byte, the first one the lowest.
struct GridVector {
  float scale;
  uint64_t components;
  int signs;
  float shift;
};
HELEXA_VALUE float component(const GridVector& vector, int i) {
  const float sum = float(int8_t(vector.components >> 8 * i & 0xff)) + vector.shift;
  return vector.scale * sum * (vector.signs >> i & 1 ? -1.0f : 1.0f);
}
HELEXA_VALUE uint32_t word_at(const uint8_t* p) {
  return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

// Vector v of a block: 8 values, 4 of the IQ3 types. `Block` has the members of the type's block, as arrays or as
// pointers to where they lie.
template <class Block>
HELEXA_VALUE GridVector iq2_xxs_vector(const Block& b, int v) {
  const uint16_t* group = b.qs + v / 4 * 4;
  const int index = group[v % 4 / 2] >> (v % 2 * 8) & 255;
  const uint32_t word = group[2] | uint32_t(group[3]) << 16;
  const float scale = float_from_half(b.d) * (0.5f + float(word >> 28)) * 0.25f;
  return {scale, kIq2XxsGrid[index], kEvenSigns[word >> 7 * (v % 4) & 127], 0.0f};
}
template <class Block>
HELEXA_VALUE GridVector iq2_xs_vector(const Block& b, int v) {
  const float scale = float_from_half(b.d) * (0.5f + float(b.scales[v / 4] >> (v / 2 % 2 * 4) & 15)) * 0.25f;
  return {scale, kIq2XsGrid[b.qs[v] & 511], kEvenSigns[b.qs[v] >> 9], 0.0f};
}
template <class Block>
HELEXA_VALUE GridVector iq2_s_vector(const Block& b, int v) {
  const float scale = float_from_half(b.d) * (0.5f + float(b.scales[v / 4] >> (v / 2 % 2 * 4) & 15)) * 0.25f;
  return {scale, kIq2SGrid[b.qs[v] | (b.qh[v / 4] >> (v % 4 * 2) & 3) << 8], b.signs[v], 0.0f};
}
template <class Block>
HELEXA_VALUE GridVector iq3_xxs_vector(const Block& b, int v) {
  const uint32_t word = word_at(b.signs_scale + v / 8 * 4);
  const float scale = float_from_half(b.d) * (0.5f + float(word >> 28)) * 0.5f;
  return {scale, kIq3XxsGrid[b.qs[v]], kEvenSigns[word >> 7 * (v / 2 % 4) & 127] >> (v % 2 * 4), 0.0f};
}
template <class Block>
HELEXA_VALUE GridVector iq3_s_vector(const Block& b, int v) {
  const float scale = float_from_half(b.d) * (1 + 2 * float(b.scales[v / 16] >> (v / 8 % 2 * 4) & 15));
  return {scale, kIq3SGrid[b.qs[v] | (b.qh[v / 8] >> (v % 8) & 1) << 8], b.signs[v / 2] >> (v % 2 * 4), 0.0f};
}
template <class Block>
HELEXA_VALUE GridVector iq1_s_vector(const Block& b, int v) {
  const int qh = b.qh[v / 4];
  const float scale = float_from_half(b.d) * (2 * float(qh >> 12 & 7) + 1);
  return {scale, kIq1SGrid[b.qs[v] | (qh >> (v % 4 * 3) & 7) << 8], 0, qh & 0x8000 ? -0.125f : 0.125f};
}
template <class Block>
HELEXA_VALUE GridVector iq1_m_vector(const Block& b, int v) {
  const uint16_t* s = b.scales;
  const float d = float_from_half(half_bits(s[0] >> 12 | (s[1] >> 12) << 4 | (s[2] >> 12) << 8 | (s[3] >> 12) << 12));
  const float scale = d * (2 * float(s[v / 8] >> (v / 2 % 4 * 3) & 7) + 1);
  const int high = b.qh[v / 2] >> (v % 2 * 4) & 15;
  return {scale, kIq1SGrid[b.qs[v] | (high & 7) << 8], 0, high & 8 ? -0.125f : 0.125f};
}
HELEXA_VALUE GridVector grid_vector(const block_iq2_xxs& b, int v) { return iq2_xxs_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq2_xs& b, int v) { return iq2_xs_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq2_s& b, int v) { return iq2_s_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq3_xxs& b, int v) { return iq3_xxs_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq3_s& b, int v) { return iq3_s_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq1_s& b, int v) { return iq1_s_vector(b, v); }
HELEXA_VALUE GridVector grid_vector(const block_iq1_m& b, int v) { return iq1_m_vector(b, v); }
HELEXA_VALUE float value(const block_iq2_xxs& b, int g, int i) {
  return component(grid_vector(b, 4 * g + i / 8), i % 8);
}
HELEXA_VALUE float value(const block_iq2_xs& b, int g, int i) {
  return component(grid_vector(b, 4 * g + i / 8), i % 8);
}
HELEXA_VALUE float value(const block_iq2_s& b, int g, int i) { return component(grid_vector(b, 4 * g + i / 8), i % 8); }
HELEXA_VALUE float value(const block_iq3_xxs& b, int g, int i) {
  return component(grid_vector(b, 8 * g + i / 4), i % 4);
}
HELEXA_VALUE float value(const block_iq3_s& b, int g, int i) { return component(grid_vector(b, 8 * g + i / 4), i % 4); }
HELEXA_VALUE float value(const block_iq1_s& b, int g, int i) { return component(grid_vector(b, 4 * g + i / 8), i % 8); }
HELEXA_VALUE float value(const block_iq1_m& b, int g, int i) { return component(grid_vector(b, 4 * g + i / 8), i % 8); }

HELEXA_VALUE float value(const block_iq4_xs& b, int g, int i) {
  const int s = (b.scales_l[g / 2] >> (g % 2 * 4) & 15) | (b.scales_h >> 2 * g & 3) << 4;
  return float_from_half(b.d) * float(s - 32) * float(kIq4Values[nibble(b.qs[g], i)]);
}

}  // namespace helexa
