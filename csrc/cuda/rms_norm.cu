// RMSNorm and rounding to bfloat16 in front of a product with many rows. A block takes a row; the second reading of it
// comes from the cache.
#include "common.cuh"
#include "rms_norm.h"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256;
using Four = Vector<float, 4>;

__global__ void __launch_bounds__(kThreads) normalize(const RmsNorm call) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kThreads / kWarpSize);
  const int64_t row = int64_t(blockIdx.x) * call.cols;
  float factor = 1.0f;
  if (call.weight) {
    float sum = 0.0f;
    for (int64_t i = int64_t(threadIdx.x) * 4; i < call.cols; i += kThreads * 4) {
      const Four x = load_global<Four>(call.x + row + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += x[j] * x[j];
    }
    factor = 1.0f / sqrtf(block_sum<kThreads / kWarpSize>(sum, scratch) / float(call.cols) + call.eps);
  }
  for (int64_t i = int64_t(threadIdx.x) * 4; i < call.cols; i += kThreads * 4) {
    Four x = load_global<Four>(call.x + row + i);
    if (call.weight) {
      const Four w = load_global<Four>(call.weight + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = w[j] * (x[j] * factor);
    }
    const Vector<uint32_t, 2> rounded = {bfloat16_pair(x[0], x[1]), bfloat16_pair(x[2], x[3])};
    store_global(call.out + row + i, rounded);
    if (!call.remainder) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] -= bit_cast<float>(j % 2 ? rounded[j / 2] & 0xffff0000u : rounded[j / 2] << 16);
    store_global(call.remainder + row + i, Vector<uint32_t, 2>{bfloat16_pair(x[0], x[1]), bfloat16_pair(x[2], x[3])});
  }
}

}  // namespace

void rms_norm(const RmsNorm& call, Stream stream) {
  constexpr const char* f = "rms_norm";
  check(call.rows >= 0, f, "rows", "at least 0", call.rows);
  check(call.cols > 0 && call.cols % 4 == 0, f, "cols", "a positive multiple of 4", call.cols);
  if (call.rows == 0) return;
  launch<normalize>(f, dim3(unsigned(call.rows)), kThreads, kThreads / kWarpSize * sizeof(float), stream, call);
}

}  // namespace helexa::cuda
