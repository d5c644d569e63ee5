// A gated delta net's step in one launch: [convolution and SiLU,] L2 norms, gates, the delta rule token by token, and
// the gated RMSNorm of what it gives, which needs a whole value head. So a block owns one value head of one sequence,
// and holds its state in registers: 64 KiB, read at once before anything else, and written once.
//
// A warp owns 16 columns of the state, which no other needs: what a key reads of them, what they learn and what a query
// reads stays in the warp, without a barrier from token to token. In a column's products all of a key's rows meet,
// which eight lanes hold: lane l has rows 32 i + 4 (l / 4) + j and columns 4 (l % 4) + c, for i, j, c below 4. It reads
// k and q from shared memory as four vectors each, without a bank conflict, and the state in pieces of 64 bytes of a
// row.
//
// The channels of a key head are read by all its value heads, each of which computes the convolution for itself. The
// convolution's state may change when all of them have read it, and blocks can't wait for each other: so they count,
// and whoever comes last writes.
#include "causal_conv1d.cuh"
#include "causal_conv1d.h"
#include "gated_delta_rule.h"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kDim = kMaxDeltaHeadDim;  // rows and columns; those that a smaller head does not have are 0
constexpr int kTokens = kWarps;         // whose q, k and v are in shared memory at once; a warp for each token's norms
constexpr int kColumns = 3 * kDim;      // of shared memory: a channel of q, k or v each
constexpr int kParts = kDim / 32;       // of a lane's rows, and columns of a lane where a warp has a whole row

using Float4 = Vector<float, 4>;

// log(1 + e^x), neither overflowing for large x nor losing small ones.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// kTaps 1 is for no convolution in front and 4 for one of four taps, both for heads of 128 dimensions, as every
// released model has; 0 is for the rest.
template <int kTaps>
__global__ void __launch_bounds__(kThreads, 2) advance(const GatedDeltaRule args) {
  const int head = int(blockIdx.x), sequence = int(blockIdx.y), lane = lane_index(), warp = warp_index();
  const int64_t begin = args.cu_seqlens[sequence], end = args.cu_seqlens[sequence + 1];
  const int64_t slot = args.state_slots[sequence];
  int64_t first = begin;
  if (args.chunk > 0) {
    const int64_t rest = (end - begin) % args.chunk;
    first = end - (rest < args.chunk_from ? rest : 0);
  }
  if (first >= end) return;
  const int head_k_dim = kTaps ? kDim : args.head_k_dim, head_v_dim = kTaps ? kDim : args.head_v_dim;
  const bool convolves = kTaps ? kTaps > 1 : args.conv_weight != nullptr;
  const int taps = kTaps ? kTaps : convolves ? args.taps : 1;

  const int row_lane = lane / 4, column = 16 * warp + 4 * (lane % 4);
  float* const state =
      args.state + ((slot * args.num_v_heads + head) * head_k_dim + 4 * row_lane) * head_v_dim + column;
  Float4 s[kParts][4];
#pragma unroll
  for (int i = 0; i < kParts; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      s[i][j] = 32 * i + 4 * row_lane + j < head_k_dim && column < head_v_dim
                    ? load_global<Float4>(state + int64_t(32 * i + j) * head_v_dim)
                    : Float4{};

  // Column `at` of shared memory: one of q (part 0), k (1) or v (2).
  const int key_head = args.tiled ? head % args.num_k_heads : head / (args.num_v_heads / args.num_k_heads);
  const int64_t channels = 2 * int64_t(args.num_k_heads) * head_k_dim + int64_t(args.num_v_heads) * head_v_dim;
  const auto is_channel = [&](int at) { return at % kDim < (at < 2 * kDim ? head_k_dim : head_v_dim); };
  const auto channel_at = [&](int at) {
    const int part = at / kDim, d = at % kDim;
    const int64_t c = part < 2 ? int64_t(part * args.num_k_heads + key_head) * head_k_dim + d
                               : int64_t(2 * args.num_k_heads) * head_k_dim + int64_t(head) * head_v_dim + d;
    return ConvChannel{args.qkv + begin * args.qkv_stride + c,
                       args.qkv_stride,
                       args.conv_state + slot * (taps - 1) * channels + c,
                       channels,
                       args.conv_weight + c * taps,
                       taps};
  };

  SharedArena arena;
  // Inputs from taps - 1 tokens before the first one on; then, in place, row t is q | k | v of token t.
  const Shared<float> vectors = arena.take<float>((taps - 1 + kTokens) * kColumns);
  const Shared<float> q = vectors, k = vectors + kDim, v = vectors + 2 * kDim;
  const Shared<float> weights = arena.take<float>(taps * kColumns);
  const Shared<float> gates = arena.take<float>(kTokens * kDim);  // z of each token, from and for its warp
  const Shared<float> norm_weight = arena.take<float>(kDim);
  const Shared<float> factors = arena.take<float>(kTokens * 4);  // decay, beta, q . k
  const Shared<int> arrived = arena.take<int>(1);                // heads of this key head that came before
  const int sharers = args.num_v_heads / args.num_k_heads;
  int32_t* const arrivals =
      convolves && sharers > 1 ? args.arrivals + int64_t(sequence) * args.num_k_heads + key_head : nullptr;
  const bool counts = arrivals && threadIdx.x == kThreads - 1;

  for (int64_t group = first; group < end; group += kTokens) {
    const int count = int(end - group < kTokens ? end - group : kTokens);
    if (group > first) sync_threads();  // the last group's outputs have been read

    // What this warp's token needs later is on the way early, here and below.
    const bool has_token = warp < count;
    const int64_t token = group + warp;
    float decay = 0.0f, beta = 0.0f, coefficient = 0.0f;
    if (has_token) {
      beta = args.b[token * args.b_stride + head];
      decay = args.a[token * args.a_stride + head] + args.dt_bias[head];
      coefficient = args.a_coefficient[head];
    }

    // A thread's own columns: nobody else touches them before the barrier.
#pragma unroll 1
    for (int at = int(threadIdx.x); at < kColumns; at += kThreads) {
      if (!is_channel(at)) continue;
      const ConvChannel channel = channel_at(at);
#pragma unroll
      for (int i = 0; i < taps - 1; ++i)
        copy_async<float>(vectors, i * kColumns + at, channel.input_before(group - begin, i));
#pragma unroll 1
      for (int t = 0; t < count; ++t)
        copy_async<float>(vectors, (taps - 1 + t) * kColumns + at, channel.x + (group - begin + t) * channel.x_stride);
      if (convolves) {
#pragma unroll
        for (int j = 0; j < taps; ++j) copy_async<float>(weights, j * kColumns + at, channel.weight + j);
      }
    }
    copy_async_commit();
    if (has_token) {
      const float* const z = args.z + token * args.z_stride + int64_t(head) * head_v_dim;
      for (int d = lane; d < head_v_dim; d += kWarpSize) copy_async<float>(gates, warp * kDim + d, z + d);
    }
    if (group == first && int(threadIdx.x) < head_v_dim)
      copy_async<float>(norm_weight, threadIdx.x, args.norm_weight + threadIdx.x);
    copy_async_commit();
    copy_async_wait<1>();
#pragma unroll 1
    for (int at = int(threadIdx.x); at < kColumns; at += kThreads) {
      const bool exists = is_channel(at);
      if (exists && !convolves) continue;
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        float value = 0.0f;
        if (exists && convolves) {
#pragma unroll
          for (int j = 0; j < taps; ++j)
            value = fmaf(weights[j * kColumns + at], vectors[(t + j) * kColumns + at], value);
          value = silu(value);
        }
        vectors[t * kColumns + at] = value;
      }
    }
    sync_threads();

    // Every thread of this block has used its part of the convolution's old state. The last warp has the least to do.
    int before = 0;
    if (counts && group == first) before = arrive(arrivals, sharers);

    if (has_token) {
      Float4 query = load_shared<Float4>(q, warp * kColumns + 4 * lane),
             key = load_shared<Float4>(k, warp * kColumns + 4 * lane);
      float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        qq += query[j] * query[j];
        kk += key[j] * key[j];
        qk += query[j] * key[j];
      }
      decay = expf(coefficient * softplus(decay));
      beta = 1.0f / (1.0f + expf(-beta));
      qq = warp_sum(qq), kk = warp_sum(kk), qk = warp_sum(qk);
      const float q_factor = 1.0f / (sqrtf(qq + 1e-6f) * sqrtf(float(head_k_dim))), k_factor = 1.0f / sqrtf(kk + 1e-6f);
#pragma unroll
      for (int j = 0; j < 4; ++j) query[j] *= q_factor, key[j] *= k_factor;
      store_shared(q, warp * kColumns + 4 * lane, query);
      store_shared(k, warp * kColumns + 4 * lane, key);
      if (lane == 0) store_shared(factors, 4 * warp, Float4{{decay, beta, qk * q_factor * k_factor, 0.0f}});
    }
    sync_threads();

    for (int t = 0; t < count; ++t) {
      const Float4 factor = load_shared<Float4>(factors, 4 * t);
      Float4 keys[kParts];
      float read[4] = {}, seen[4] = {};  // of the state by the key and by the query: what this lane's rows add
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        keys[i] = load_shared<Float4>(k, t * kColumns + 32 * i + 4 * row_lane);
        const Float4 queries = load_shared<Float4>(q, t * kColumns + 32 * i + 4 * row_lane);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            read[c] += keys[i][j] * s[i][j][c];
            seen[c] += queries[j] * s[i][j][c];
          }
      }
      // Eight sums over eight lanes, one of which each lane is left with: of column row_lane % 4, read in the lower
      // half of the warp and seen in the upper one.
      const bool upper = lane & 16, right = lane & 8, odd = lane & 4;
      float four[4], two[2];
#pragma unroll
      for (int c = 0; c < 4; ++c) four[c] = (upper ? seen[c] : read[c]) + shuffle_xor(upper ? read[c] : seen[c], 16);
#pragma unroll
      for (int c = 0; c < 2; ++c)
        two[c] = (right ? four[2 + c] : four[c]) + shuffle_xor(right ? four[c] : four[2 + c], 8);
      const float one = (odd ? two[1] : two[0]) + shuffle_xor(odd ? two[0] : two[1], 4);
      const float other = shuffle_xor(one, 16);
      float delta = 0.0f;
      if (!upper) {
        const int64_t place = t * kColumns + column + row_lane;
        delta = factor[1] * (v[place] - factor[0] * one);
        // What the query reads of the new state, from the old one.
        v[place] = factor[0] * other + factor[2] * delta;
      }
      float deltas[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) deltas[c] = shuffle(delta, 4 * c + lane % 4);
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) s[i][j][c] = factor[0] * s[i][j][c] + keys[i][j] * deltas[c];
    }
    if (counts && group == first) {
      fence_device();  // before the state's stores, which it would wait for
      arrived[0] = before;
    }
    if (group + kTokens >= end) {
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (32 * i + 4 * row_lane + j < head_k_dim && column < head_v_dim)
            store_global(state + int64_t(32 * i + j) * head_v_dim, s[i][j]);
    }
    copy_async_wait<0>();
    sync_threads();

    if (has_token) {
      float values[kParts], squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        values[i] = lane + 32 * i < head_v_dim ? float(v[warp * kColumns + lane + 32 * i]) : 0.0f;
        squares += values[i] * values[i];
      }
      const float factor = 1.0f / sqrtf(warp_sum(squares) / float(head_v_dim) + args.eps);
      float* const out = args.out + (token * args.num_v_heads + head) * head_v_dim;
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        if (lane + 32 * i < head_v_dim)
          out[lane + 32 * i] =
              values[i] * factor * norm_weight[lane + 32 * i] * silu(gates[warp * kDim + lane + 32 * i]);
    }

    if (!convolves || group + kTokens < end) continue;
    // Behind the tokens' rows are the last inputs as they were: the convolution's new state.
    const bool is_last = !arrivals || arrived[0] == sharers - 1;
#pragma unroll 1
    for (int at = int(threadIdx.x); at < kColumns; at += kThreads) {
      if (!is_channel(at) || (at < 2 * kDim && !is_last)) continue;
      float* const conv_state = channel_at(at).state;
#pragma unroll
      for (int i = 0; i < taps - 1; ++i) conv_state[i * channels] = vectors[(count + i) * kColumns + at];
    }
  }
}

}  // namespace

void gated_delta_rule(const GatedDeltaRule& args, Stream stream) {
  constexpr const char* f = "gated_delta_rule";
  const auto check_dim = [](const char* name, int dim) {
    check(dim >= 16 && dim <= kMaxDeltaHeadDim && dim % 16 == 0, f, name, "a multiple of 16 up to 128", dim);
  };
  check_dim("head_k_dim", args.head_k_dim);
  check_dim("head_v_dim", args.head_v_dim);
  check(args.num_k_heads >= 1, f, "num_k_heads", "at least 1", args.num_k_heads);
  check(args.num_v_heads >= 1 && args.num_v_heads % args.num_k_heads == 0, f, "num_v_heads",
        "a multiple of the key heads", args.num_v_heads);
  check(args.num_sequences >= 0 && args.num_sequences <= 65535, f, "num_sequences", "0 to 65535", args.num_sequences);
  check(args.chunk >= 0, f, "chunk", "at least 0", args.chunk);
  if (args.conv_weight) {
    check(args.taps >= 2 && args.taps <= kMaxConvTaps, f, "taps", "2 to 8", args.taps);
    check(args.chunk == 0, f, "chunk", "0 with a convolution", args.chunk);
  }
  if (args.num_sequences == 0) return;
  const dim3 grid(unsigned(args.num_v_heads), unsigned(args.num_sequences));
  const int taps = args.conv_weight ? args.taps : 1;
  const size_t floats = size_t(2 * taps - 1 + kTokens) * kColumns + (kTokens + 1) * kDim + 4 * kTokens;
  const size_t shared_bytes = floats * sizeof(float) + sizeof(int);
  const bool released = args.head_k_dim == kDim && args.head_v_dim == kDim;
  if (released && !args.conv_weight)
    launch<advance<1>>(f, grid, kThreads, shared_bytes, stream, args);
  else if (released && taps == 4)
    launch<advance<4>>(f, grid, kThreads, shared_bytes, stream, args);
  else
    launch<advance<0>>(f, grid, kThreads, shared_bytes, stream, args);
}

}  // namespace helexa::cuda
