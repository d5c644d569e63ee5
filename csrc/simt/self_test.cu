// Kernels with one fault each, which tests/native/test_simt.py expects the emulation to find, and one without.
#include "../cuda/common.cuh"
#include "self_test.h"

namespace helexa::simt_test {
namespace {

using namespace helexa::cuda;

constexpr int kThreads = 64;

// out[i] = sum of x over its block, through every word of common.cuh that moves data between threads.
__global__ void sums(const float* x, float* out, int) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads), scratch = arena.take<float>(kThreads / kWarpSize);
  const int i = int(threadIdx.x);
  copy_async<float>(tile, i, x + blockIdx.x * kThreads + i);
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  out[blockIdx.x * kThreads + i] = block_sum<kThreads / kWarpSize>(tile[kThreads - 1 - i], scratch);
}

__global__ void faulty(const float* x, float* out, int which) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int i = int(threadIdx.x);
  switch (which) {
    case 0:  // no barrier between a write and another thread's read
      tile[i] = x[i];
      out[i] = tile[i ^ 1];
      break;
    case 1:  // nor between a read and another thread's write
      tile[i] = x[i];
      sync_threads();
      out[i] = tile[i ^ 1];
      tile[i] = 0.0f;
      break;
    case 2:  // a warp's barrier does not order two warps
      tile[i] = x[i];
      sync_warp();
      out[i] = tile[(i + kWarpSize) % kThreads];
      break;
    case 3:
      out[i] = tile[i];  // never written
      break;
    case 4:
      tile[i + 1] = x[i];  // one behind the end
      break;
    case 5:
      if (i < kWarpSize) sync_threads();
      break;
    case 6:
      if (i == 3) return;
      out[i] = warp_sum(x[i]);
      break;
    case 7:
      copy_async<float>(tile, i, x + i);
      copy_async_commit();
      out[i] = tile[i];  // not waited for
      break;
    case 8:
      out[kThreads + i] = x[i];  // behind the buffer
      break;
    case 9:
      out[i] = x[i - 1];  // before it
      break;
    case 10: {
      const Vector<float, 4> four = load_global<Vector<float, 4>>(x + 1);
      out[i] = four[0];
      break;
    }
    case 11:
      arena.take<float>(kThreads);
      break;
    case 12:
      if (i < kWarpSize)
        out[i] = warp_sum(x[i]);
      else
        out[i] = i % 2 ? shuffle(x[i], 0) : warp_max(x[i]);
      break;
    default:
      out[i] = x[i];
  }
}

// c [16, 8] = a [16, k] b [8, k] with one warp; k 16 of bfloat16 bits, or 32 of int8 for c of int32.
__global__ void multiply(const void* a, const void* b, void* c, int is_int8) {
  const int lane = lane_index(), group = lane / 4, pair = lane % 4;
  const auto* words_a = static_cast<const uint32_t*>(a);
  const auto* words_b = static_cast<const uint32_t*>(b);
  // Rows of 8 words in both cases; a lane holds word `pair` and `pair + 4` of its rows.
  const uint32_t left[4] = {words_a[group * 8 + pair], words_a[(group + 8) * 8 + pair], words_a[group * 8 + pair + 4],
                            words_a[(group + 8) * 8 + pair + 4]};
  const uint32_t right[2] = {words_b[group * 8 + pair], words_b[group * 8 + pair + 4]};
  const int at[4] = {group * 8 + pair * 2, group * 8 + pair * 2 + 1, (group + 8) * 8 + pair * 2,
                     (group + 8) * 8 + pair * 2 + 1};
  if (is_int8) {
    int sums[4] = {};
    mma_int8(sums, left, right);
    for (int i = 0; i < 4; ++i) static_cast<int*>(c)[at[i]] = sums[i];
  } else {
    float sums[4] = {};
    mma_bf16(sums, left, right);
    for (int i = 0; i < 4; ++i) static_cast<float*>(c)[at[i]] = sums[i];
  }
}

}  // namespace

void run_sums(const float* x, float* out, int blocks) {
  launch<sums>("sums", dim3(unsigned(blocks)), kThreads, (kThreads + 16) * sizeof(float), 0, x, out, 0);
}
void run_faulty(const float* x, float* out, int which) {
  launch<faulty>("faulty", dim3(1), kThreads, kThreads * sizeof(float), 0, x, out, which);
}
void run_multiply(const void* a, const void* b, void* c, bool is_int8) {
  launch<multiply>("multiply", dim3(1), kWarpSize, 0, 0, a, b, c, int(is_int8));
}

}  // namespace helexa::simt_test
