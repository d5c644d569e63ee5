// Depthwise causal convolution with a state, then SiLU, on a device.
#pragma once

#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

constexpr int kMaxConvTaps = 8;

// Names, shapes and meaning as in ops/causal_conv1d. Slots and borders lie on the device and are taken on trust; rows
// of `out` that belong to no sequence are left as they are.
struct CausalConv1d {
  const float* x;              // [T, channels], rows x_stride apart
  const float* weight;         // [channels, taps]
  float* conv_state;           // [num_slots, taps - 1, channels]
  const int32_t* state_slots;  // [num_sequences]
  const int32_t* cu_seqlens;   // [num_sequences + 1]
  float* out;                  // [T, channels]
  int64_t x_stride, num_tokens;
  int num_sequences, channels, taps;
};

// One launch, whatever the lengths. Throws std::invalid_argument for sizes that it can't take.
void causal_conv1d(const CausalConv1d& args, Stream stream);

}  // namespace helexa::cuda
