// A channel's convolution, for its own kernel and for the delta rule's step, which has it built in. Both add up
// products from the oldest tap on, each fused into the sum (fmaf, not left to the compiler), and so get the same bits:
// a sequence may go through either from call to call.
#pragma once

#include <cmath>

#include "common.cuh"

namespace helexa::cuda {

// One channel of one sequence, which a thread works on. kTaps below is `taps` or more.
struct ConvChannel {
  const float* x;  // of the sequence's first token of this call; the next one's lies x_stride behind
  int64_t x_stride;
  float* state;  // the oldest of taps - 1 inputs; the next one lies `channels` behind
  int64_t channels;
  const float* weight;  // [taps]
  int taps;

  // The i-th of the taps - 1 inputs before token `first`, which is 0 or at least taps - 1: all from one place.
  __device__ __forceinline__ const float* input_before(int64_t first, int i) const {
    return first == 0 ? state + i * channels : x + (first - (taps - 1) + i) * x_stride;
  }
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace helexa::cuda
