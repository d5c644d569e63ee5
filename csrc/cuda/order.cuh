// Floats in the order that choosing a token puts them in: as unsigned numbers that compare the same way.
#pragma once

#include "common.cuh"

namespace helexa::cuda {

// A larger float has a larger order. Both zeros are equal, and every NaN is the largest of all.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0xffffffff;
  if ((bits & 0x7fffffff) == 0) return 0x80000000;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
__device__ __forceinline__ float value_of(uint32_t order) {
  return bit_cast<float>(order & 0x80000000 ? order & 0x7fffffff : ~order);
}
constexpr uint32_t kOrderOfMinusInfinity = 0x007fffff;

// A place in a row with the order of its value: larger is a larger value, or among equals a lower place.
using Ranked = uint64_t;
__device__ __forceinline__ Ranked ranked(uint32_t order, int64_t place) {
  return uint64_t(order) << 32 | (0xffffffffu - uint32_t(place));
}
__device__ __forceinline__ uint32_t order_of(Ranked best) { return uint32_t(best >> 32); }
__device__ __forceinline__ int64_t place_of(Ranked best) { return int64_t(0xffffffffu - uint32_t(best)); }

template <class T>
__device__ __forceinline__ T warp_largest(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The largest of a block of kWarps warps, in every thread. `scratch` [kWarps] may be used again after the next barrier.
template <int kWarps, class T>
__device__ __forceinline__ T block_largest(T value, const Shared<T>& scratch) {
  value = warp_largest(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_threads();
  T largest = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    const T other = scratch[warp];
    largest = other > largest ? other : largest;
  }
  return largest;
}

// Four neighbouring values of a row of `size`, from a multiple of four on; -inf behind its end. `aligned`: every row
// begins at a multiple of 16 bytes.
__device__ __forceinline__ Vector<float, 4> load_four(const float* row, int64_t first, int64_t size, bool aligned) {
  if (aligned && first + 4 <= size) return load_global<Vector<float, 4>>(row + first);
  Vector<float, 4> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = first + i < size ? row[first + i] : value_of(kOrderOfMinusInfinity);
  return four;
}

}  // namespace helexa::cuda
