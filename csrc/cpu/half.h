// float16 and bfloat16 bits to float32 in plain C++. Static: files built with different -m flags must not share a copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace helexa {

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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

}  // namespace helexa
