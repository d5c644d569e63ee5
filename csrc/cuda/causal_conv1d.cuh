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

  // Input of the sequence's token `place`; before the first one, -1 to -(taps - 1), from the state.
  __device__ __forceinline__ const float* input(int64_t place) const {
    return place >= 0 ? x + place * x_stride : state + (taps - 1 + place) * channels;
  }
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// The state after `length` tokens. Nothing else may read this channel's state any more.
template <int kTaps>
__device__ __forceinline__ void update_state(const ConvChannel& channel, int64_t length) {
  float last[kTaps - 1];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i)
    last[i] = i < channel.taps - 1 ? *channel.input(length - (channel.taps - 1) + i) : 0.0f;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i)
    if (i < channel.taps - 1) channel.state[i * channel.channels] = last[i];
}

}  // namespace helexa::cuda
