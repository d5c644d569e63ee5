// The short causal convolution of a gated delta net with its state, in one launch for any packing of sequences. A
// thread computes up to kTile outputs of one channel; all their inputs are on the way before the first is used. Only
// the block of a sequence's first tokens reads the old state, so that block writes the new one: nobody has to wait.
#include "causal_conv1d.cuh"
#include "causal_conv1d.h"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 128, kTile = 16;
static_assert(kTile >= kMaxConvTaps - 1);  // only a sequence's first tile reads its old state

// Tiles of sequence i begin at number begin_i / kTile + i: none too few for any lengths, so a grid of T / kTile + N
// blocks has them all, and a block finds its sequence without anybody's knowing the lengths beforehand.
__device__ __forceinline__ int sequence_of_tile(const int32_t* cu_seqlens, int num_sequences, int tile) {
  int low = 0, high = num_sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] / kTile + middle <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The inputs of tokens first - (kTaps - 1) to first + count - 1: all that `count` outputs need. Those before the first
// tap's, and those behind the last token's, are 0.
template <int kTaps, int kTokens>
__device__ __forceinline__ void load_inputs(const ConvChannel& channel, int64_t first, int count,
                                            float (&inputs)[kTaps - 1 + kTokens]) {
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i)
    inputs[i] = i >= kTaps - channel.taps ? *channel.input_before(first, i - (kTaps - channel.taps)) : 0.0f;
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    inputs[kTaps - 1 + t] = t < count ? channel.x[(first + t) * channel.x_stride] : 0.0f;
}

template <int kTaps>
__device__ __forceinline__ void load_weights(const ConvChannel& channel, float (&weights)[kTaps]) {
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const int tap = j - (kTaps - channel.taps);
    weights[j] = tap >= 0 ? channel.weight[tap] : 0.0f;
  }
}

// The output of token t of those whose inputs were loaded. An absent tap is not 0 times its input, which may be NaN.
template <int kTaps, int kInputs>
__device__ __forceinline__ float convolved(const float (&weights)[kTaps], const float (&inputs)[kInputs], int t,
                                           int taps) {
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < kTaps; ++j)
    if (j >= kTaps - taps) total = fmaf(weights[j], inputs[t + j], total);
  return silu(total);
}

// The state after `length` tokens. Nothing else may read this channel's state any more.
template <int kTaps>
__device__ __forceinline__ void update_state(const ConvChannel& channel, int64_t length) {
  float last[kTaps - 1] = {};
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i)
    if (i < channel.taps - 1) {
      const int64_t place = length - (channel.taps - 1) + i;  // below 0 it stays in the state, further to the front
      last[i] = place >= 0 ? channel.x[place * channel.x_stride] : channel.state[(i + length) * channel.channels];
    }
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i)
    if (i < channel.taps - 1) channel.state[i * channel.channels] = last[i];
}

template <int kTaps>
__global__ void __launch_bounds__(kThreads) convolve(const CausalConv1d args) {
  const int tile = int(blockIdx.x), c = int(blockIdx.y) * kThreads + int(threadIdx.x);
  const int sequence = sequence_of_tile(args.cu_seqlens, args.num_sequences, tile);
  const int64_t begin = args.cu_seqlens[sequence], length = args.cu_seqlens[sequence + 1] - begin;
  const int64_t slot = args.state_slots[sequence];
  const int64_t first = (tile - (begin / kTile + sequence)) * kTile;
  if (first >= length || c >= args.channels) return;
  const int count = int(length - first < kTile ? length - first : kTile);
  const int taps = args.taps;
  const ConvChannel channel{args.x + begin * args.x_stride + c,
                            args.x_stride,
                            args.conv_state + slot * (taps - 1) * args.channels + c,
                            args.channels,
                            args.weight + int64_t(c) * taps,
                            taps};
  float inputs[kTaps - 1 + kTile], weights[kTaps];
  load_inputs<kTaps, kTile>(channel, first, count, inputs);
  load_weights<kTaps>(channel, weights);
  float* out = args.out + (begin + first) * args.channels + c;
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    if (t < count) out[int64_t(t) * args.channels] = convolved<kTaps>(weights, inputs, t, taps);
  if (first == 0) update_state<kTaps>(channel, length);
}

}  // namespace

void causal_conv1d(const CausalConv1d& args, Stream stream) {
  constexpr const char* f = "causal_conv1d";
  check(args.taps >= 2 && args.taps <= kMaxConvTaps, f, "taps", "2 to 8", args.taps);
  check(args.channels >= 1, f, "channels", "at least 1", args.channels);
  check(args.num_sequences >= 0, f, "num_sequences", "at least 0", args.num_sequences);
  check(args.num_tokens >= 0 && args.num_tokens < int64_t{1} << 31, f, "num_tokens", "0 to 2^31 - 1", args.num_tokens);
  const int blocks = (args.channels + kThreads - 1) / kThreads;
  check(blocks <= 65535, f, "channels", "at most 8388480", args.channels);
  if (args.num_tokens == 0 || args.num_sequences == 0) return;
  const dim3 grid(unsigned(args.num_tokens / kTile + args.num_sequences), unsigned(blocks));
  if (args.taps == 4)
    launch<convolve<4>>(f, grid, kThreads, 0, stream, args);
  else
    launch<convolve<kMaxConvTaps>>(f, grid, kThreads, 0, stream, args);
}

}  // namespace helexa::cuda
