// float16 and bfloat16 bits from and to float32 in plain C++. Static: files built with different -m flags must not
// share a copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace helexa {

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifting the exponent by a product is exact and handles subnormals.
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return float_from_bits(sign | bits);
}

static inline float float_from_bfloat16(uint16_t value) { return float_from_bits(uint32_t(value) << 16); }

// To the nearest, halves to even; what float16 cannot hold becomes infinite, NaN stays NaN.
static inline uint16_t half_from_float(float value) {
  const uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // Below 2^-14 halves are multiples of 2^-24, the unit in the last place of floats in 0.5..1.
  if (size < 0x38800000) return uint16_t(sign | (bits_from_float(float_from_bits(size) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
}

static inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace helexa
