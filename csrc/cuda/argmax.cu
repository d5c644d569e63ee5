// The place of each row's largest value. A row is as wide as a vocabulary and there are few of them, so each is cut
// into parts for a block each, small enough that one row alone keeps most of a card busy; a second kernel takes the
// best of the parts. Nothing is left in memory between two calls, so there is nothing to clear.
#include "argmax.h"
#include "order.cuh"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kPart = 2048;

__device__ __forceinline__ Ranked better(Ranked a, Ranked b) { return a > b ? a : b; }

// best [rows, parts]: of each part of each row.
__global__ void __launch_bounds__(kThreads)
    argmax_parts(const float* values, int64_t cols, int parts, bool aligned, Ranked* best) {
  SharedArena arena;
  const auto scratch = arena.take<Ranked>(kWarps);
  const float* row = values + blockIdx.y * cols;
  Vector<float, 4> fours[kPart / 4 / kThreads];
  int64_t first = int64_t(blockIdx.x) * kPart + threadIdx.x * 4;
#pragma unroll
  for (int i = 0; i < kPart / 4 / kThreads; ++i) fours[i] = load_four(row, first + i * kThreads * 4, cols, aligned);
  Ranked mine = 0;
#pragma unroll
  for (int i = 0; i < kPart / 4 / kThreads; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) mine = better(mine, ranked(order_of(fours[i][j]), first + i * kThreads * 4 + j));
  mine = block_largest<kWarps>(mine, scratch);
  if (threadIdx.x == 0) best[int64_t(blockIdx.y) * parts + blockIdx.x] = mine;
}

__global__ void __launch_bounds__(kWarpSize) argmax_rows(const Ranked* best, int parts, int64_t* out) {
  Ranked mine = 0;
  for (int part = lane_index(); part < parts; part += kWarpSize)
    mine = better(mine, best[int64_t(blockIdx.x) * parts + part]);
  mine = warp_largest(mine);
  if (lane_index() == 0) out[blockIdx.x] = place_of(mine);
}

int64_t parts_of(int64_t cols) { return (cols + kPart - 1) / kPart; }

}  // namespace

int64_t argmax_scratch_words(int64_t rows, int64_t cols) { return rows * parts_of(cols); }

void argmax(const float* values, int64_t rows, int64_t cols, uint64_t* scratch, int64_t* out, Stream stream) {
  check(rows >= 0 && rows <= 65535, "argmax", "rows", "0 to 65535", rows);
  check(cols >= 1 && cols < int64_t(1) << 31, "argmax", "cols", "at least 1 and below 2**31", cols);
  if (rows == 0) return;
  const int parts = int(parts_of(cols));
  const bool aligned = cols % 4 == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  launch<argmax_parts>("argmax", dim3(unsigned(parts), unsigned(rows)), kThreads, kWarps * sizeof(Ranked), stream,
                       values, cols, parts, aligned, scratch);
  launch<argmax_rows>("argmax", dim3(unsigned(rows)), kWarpSize, 0, stream, static_cast<const Ranked*>(scratch), parts,
                      out);
}

}  // namespace helexa::cuda
