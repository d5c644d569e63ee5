// Depthwise causal convolution with a state, then SiLU: interface, and what every instruction-set level implements.
#pragma once

#include <cstdint>

#include "packed_sequences.h"

namespace helexa {

constexpr int kMaxConvTaps = 8;
constexpr int kConvChannels = 256;  // channels of one piece of work

// Names, shapes and meaning as in ops/causal_conv1d.
struct CausalConv1d {
  const float* x;       // [T, channels], rows x_stride apart
  const float* weight;  // [channels, taps]
  float* conv_state;    // [num_slots, taps - 1, channels]
  float* out;           // [T, channels]
  PackedSequences sequences;
  int64_t x_stride, channels;
  int taps;
};

// Throws std::invalid_argument naming the first argument that is out of range; nothing is written then.
void causal_conv1d(const CausalConv1d& args);

// What one instruction-set level provides.
struct ConvKernels {
  // All tokens of a sequence for channels [first, first + count), count <= kConvChannels; outputs and the new state.
  void (*convolve)(const CausalConv1d& args, int64_t sequence, int64_t first, int count);
};

extern const ConvKernels kConvGeneric;
#if defined(__x86_64__)
extern const ConvKernels kConvAvx2;
extern const ConvKernels kConvAvx512;
#endif

}  // namespace helexa
