// Rows of activations as the integer products take them: int8 times one scale for 32 values, as on the CPU and in
// quantized_activations of helexa_engine/ops/quant_matmul/reference.py. What a weight's minimum is multiplied with, the
// sum of the values, lies beside the scale for each 16 of them, a segment of quant_planes.cuh.
#pragma once

#include "common.cuh"

namespace helexa::cuda {

// Eight neighbouring lanes hold 32 neighbouring values, four each; this lane's begin at `at` of the arrays, a multiple
// of four. codes [n] of int8, scales [n / 16] of pairs (scale, sum). All lanes of the warp call it, those that hold
// nothing with `holds` false.
__device__ __forceinline__ void store_quantised(const Vector<float, 4>& values, bool holds, uint8_t* codes,
                                                float* scales, int64_t at) {
  uint32_t largest = 0;  // magnitudes have the order of their bits; those of infinities and NaNs come last
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
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
  const float scale = finite ? magnitude / 127.0f : bit_cast<float>(0x7fc00000u);  // NaN must not vanish
  uint32_t packed = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = finite ? int(rintf(values[i] * inverse)) : 0;
    packed |= uint32_t(code & 255) << 8 * i;
    sum += code;
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (!holds) return;
  store_global(codes + at, packed);
  if (lane_index() % 4 == 0) store_global(scales + at / 8, Vector<float, 2>{scale, scale * float(sum)});
}

}  // namespace helexa::cuda
