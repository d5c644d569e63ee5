// Rows of activations as the integer products take them: int8 times one scale for 32 values, as on the CPU and in
// quantized_activations of helexa_engine/ops/quant_matmul/reference.py. What a weight's minimum is multiplied with, the
// sum of the values, lies beside the scale for each 16 of them, a segment of quant_planes.cuh.
#pragma once

#include "common.cuh"

namespace helexa::cuda {

// Eight neighbouring lanes have four of 32 values each. What one of them stores.
struct QuantisedFour {
  uint32_t codes;
  float scale, total;  // the total of its 16 values
};
__device__ __forceinline__ QuantisedFour quantised(const Vector<float, 4>& four) {
  uint32_t largest = 0;  // magnitudes have the order of their bits; those of infinities and NaNs come last
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = bit_cast<uint32_t>(four[j]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int mask = 1; mask < 8; mask *= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  const bool finite = largest < 0x7f800000u;
  const float magnitude = bit_cast<float>(largest);
  const float inverse = finite && magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
  QuantisedFour out = {0, finite ? magnitude / 127.0f : bit_cast<float>(0x7fc00000u), 0.0f};  // NaN must not vanish
  int sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int code = finite ? round_to_int(four[j] * inverse) : 0;
    out.codes |= uint32_t(code & 255) << 8 * j;
    sum += code;
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  out.total = out.scale * float(sum);
  return out;
}

// The same into memory, this lane's at `at` of the arrays, a multiple of four. codes [n] of int8, scales [n / 16] of
// pairs (scale, total). All lanes of the warp call it, those that hold nothing with `holds` false.
__device__ __forceinline__ void store_quantised(const Vector<float, 4>& values, bool holds, uint8_t* codes,
                                                float* scales, int64_t at) {
  const QuantisedFour four = quantised(values);
  if (!holds) return;
  store_global(codes + at, four.codes);
  if (lane_index() % 4 == 0) store_global(scales + at / 8, Vector<float, 2>{four.scale, four.total});
}

}  // namespace helexa::cuda
