// What the kernels are written in. nvcc compiles them for cards; g++ compiles the same files over csrc/simt, where a
// block's threads are fibers and shared memory is checked. So a kernel uses these words instead of CUDA's own for
// shared memory, warps, copies and matrix instructions, and is otherwise plain CUDA C++.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "cuda_error.h"

#ifdef HELEXA_SIMT
#include "../simt/simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace helexa::cuda {

constexpr int kWarpSize = 32;

// A CUDA stream as Python hands it over; the emulation has none.
using Stream = uintptr_t;

// -- Vectors: several values moved at once. Addresses must be multiples of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#ifdef HELEXA_SIMT

template <class T>
using Shared = simt::SharedArray<T>;

template <class V, class T>
inline V load_shared(const Shared<T>& array, int64_t index) {
  return array.template load<V>(index);
}
template <class V, class T>
inline void store_shared(const Shared<T>& array, int64_t index, const V& value) {
  array.template store<V>(index, value);
}
template <class T>
inline T add_atomic(const Shared<T>& array, int64_t index, T value) {
  return array.add_atomic(index, value);
}
template <class T>
inline T add_atomic(T* array, int64_t index, T value) {
  const T before = array[index];
  array[index] = before + value;
  return before;
}

// The block's dynamic shared memory, handed out from the front; every thread takes the same.
class SharedArena {
 public:
  template <class T>
  Shared<T> take(int64_t count) {
    const size_t offset = (used_ + 15) / 16 * 16;
    used_ = offset + size_t(count) * sizeof(T);
    if (used_ > simt::shared_size())
      simt::fault("takes " + std::to_string(used_) + " bytes of shared memory of " +
                  std::to_string(simt::shared_size()));
    return Shared<T>(offset, count);
  }

 private:
  size_t used_ = 0;
};

inline void sync_threads(int line = __builtin_LINE()) { simt::block_barrier(line); }
inline void sync_warp(int line = __builtin_LINE()) { simt::warp_barrier(line); }

// T of the lane `from`; all lanes of the warp call it.
template <class T>
inline T shuffle(T value, int from, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 64);
  T result;
  memcpy(&result, simt::warp_exchange(&value, sizeof value, line) + (from & 31) * 64, sizeof result);
  return result;
}
template <class T>
inline T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  return shuffle(value, simt::thread().linear % kWarpSize ^ mask, line);
}
inline uint32_t warp_max(uint32_t value, int line = __builtin_LINE()) {
  const unsigned char* all = simt::warp_exchange(&value, sizeof value, line);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t other;
    memcpy(&other, all + lane * 64, sizeof other);
    value = other > value ? other : value;
  }
  return value;
}
inline uint32_t ballot(bool holds, int line = __builtin_LINE()) {
  const unsigned char* all = simt::warp_exchange(&holds, sizeof holds, line);
  uint32_t mask = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) mask |= uint32_t(all[lane * 64] != 0) << lane;
  return mask;
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

template <class V>
inline V load_global(const void* address) {
  simt::check_aligned<V>(address);
  V value;
  memcpy(&value, address, sizeof value);
  return value;
}
template <class V>
inline void store_global(void* address, const V& value) {
  simt::check_aligned<V>(address);
  memcpy(address, &value, sizeof value);
}
// The same for data that is read once: it should not displace what is used again.
template <class V>
inline V load_streaming(const void* address) {
  return load_global<V>(address);
}
// Brings the line at an address to the second cache; it must be readable.
inline void prefetch_global(const void* address) {
  volatile unsigned char byte = *static_cast<const unsigned char*>(address);
  (void)byte;
}
// Reads what another block of this launch wrote, before its fence.
template <class T>
inline T load_fresh(const T* address) {
  return *address;
}
// What this thread wrote to global memory before is seen by every block that sees what it writes afterwards.
inline void fence_device() {}
// Counts an arrival of `most` at a counter in global memory: how many came before. The last one sets it back to 0.
// Whoever comes later, and then passes a fence, finds done what this thread did before, and what others of its block
// did before a barrier. Nothing waits until the result is used.
inline int arrive(int32_t* counter, int most) {
  const int before = *counter;
  *counter = before >= most - 1 ? 0 : before + 1;
  return before;
}

// Copies sizeof(V) bytes (4, 8 or 16) into shared memory; they are there when their group is waited for.
template <class V, class T>
inline void copy_async(const Shared<T>& array, int64_t index, const void* source) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  simt::check_aligned<V>(source);
  simt::copy_async(array.template place<V>(index, "asynchronous write"), source, sizeof(V));
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int kGroupsLeft>
inline void copy_async_wait() {
  simt::copy_async_wait(kGroupsLeft);
}

inline int dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}

// Byte i of the result is the one of (a, b), eight bytes from a's lowest on, that nibble i of the selector names;
// nibbles are below 8.
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// Rounded on their own: no product fuses into a sum, whatever the compiler's flags.
inline float multiply_rounded(float a, float b) { return a * b; }
inline float subtract_rounded(float a, float b) { return a - b; }
// a b + c, rounded once.
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
// To the nearest, halves to even.
inline int round_to_int(float value) { return int(std::lrint(value)); }

inline float float_from_half(uint16_t half) {
  _Float16 value;
  memcpy(&value, &half, sizeof value);
  return float(value);
}
inline uint16_t half_from_float(float value) {
  const _Float16 half = _Float16(value);
  return bit_cast<uint16_t>(half);
}

// Two floats as bfloat16, rounded to the nearest: `low` in the lower half.
inline uint32_t bfloat16_pair(float low, float high) {
  const auto rounded = [](float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

// 2^x to about 2 units of the last place, denormal results 0; of -infinity 0.
inline float exp2_fast(float x) { return exp2f(x); }

// The value, of which the compiler knows nothing from here on: in a loop, what is computed from it is computed anew
// each time instead of lying in registers all along.
inline int opaque(int value) { return value; }

// Four matrices of 8 x 8 16-bit values from shared memory: lane l names where row l % 8 of matrix l / 8 begins (16
// bytes, aligned), and gets of matrix i, in words[i], columns l % 4 * 2 and the next of row l / 4. Transposed it gets
// rows l % 4 * 2 and the next of column l / 4. Both are fragments as mma takes them.
inline void load_matrices(uint32_t (&words)[4], const Shared<uint16_t>& array, int64_t index,
                          int line = __builtin_LINE()) {
  const auto row = load_shared<Vector<uint16_t, 8>>(array, index);
  const unsigned char* all = simt::warp_exchange(&row, sizeof row, line);
  const int lane = simt::thread().linear % kWarpSize;
  for (int i = 0; i < 4; ++i) memcpy(&words[i], all + (i * 8 + lane / 4) * 64 + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const Shared<uint16_t>& array, int64_t index,
                                     int line = __builtin_LINE()) {
  const auto row = load_shared<Vector<uint16_t, 8>>(array, index);
  const unsigned char* all = simt::warp_exchange(&row, sizeof row, line);
  const int lane = simt::thread().linear % kWarpSize;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) memcpy(&pair[j], all + (i * 8 + lane % 4 * 2 + j) * 64 + lane / 4 * 2, 2);
    words[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

// c += a b as PTX's mma.m16n8k16 and mma.m16n8k32 spread the matrices over a warp: rows of a and columns of b are eight
// words each, and word w of row r lies in lane r % 8 * 4 + w % 4. `add(left, right, sum)` multiplies two words.
template <class Sum, class Add>
inline void mma_words(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line, Add add) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const unsigned char* all = simt::warp_exchange(&mine, sizeof mine, line);
  const auto of = [&](int lane) {
    Fragments fragments;
    memcpy(&fragments, all + lane * 64, sizeof fragments);
    return fragments;
  };
  const int lane = simt::thread().linear % kWarpSize;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 8; ++word) {
      const uint32_t left = of(row % 8 * 4 + word % 4).a[row / 8 + word / 4 * 2];
      c[i] = add(left, of(column * 4 + word % 4).b[word / 4], c[i]);
    }
  }
}

// c += a b for a [16, 16] and b [16, 8] of bfloat16, c [16, 8] of float32.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  mma_words(c, a, b, line, [](uint32_t left, uint32_t right, float sum) {
    sum += bit_cast<float>(left << 16) * bit_cast<float>(right << 16);
    return sum + bit_cast<float>(left & 0xffff0000u) * bit_cast<float>(right & 0xffff0000u);
  });
}

// The same for a [16, 32] and b [32, 8] of int8 and c [16, 8] of int32.
inline void mma_int8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  mma_words(c, a, b, line, [](uint32_t left, uint32_t right, int sum) { return dp4a(int(left), int(right), sum); });
}

// Of the device that kernels are launched on.
inline int multiprocessor_count() { return 2; }

// Runs `kernel` with a grid of blocks of `threads`, each with `shared_bytes` of shared memory.
template <auto kernel, class... Arguments>
inline void launch(const char* name, dim3 grid, int threads, size_t shared_bytes, Stream, Arguments... arguments) {
  simt::run(name, grid, dim3(unsigned(threads)), shared_bytes, [&] { kernel(arguments...); });
}

#else

template <class T>
using Shared = T*;

template <class V, class T>
__device__ __forceinline__ V load_shared(const T* array, int64_t index) {
  return *reinterpret_cast<const V*>(array + index);
}
template <class V, class T>
__device__ __forceinline__ void store_shared(T* array, int64_t index, const V& value) {
  *reinterpret_cast<V*>(array + index) = value;
}
// To shared or to global memory; returns what was there before.
template <class T>
__device__ __forceinline__ T add_atomic(T* array, int64_t index, T value) {
  return atomicAdd(array + index, value);
}

extern __shared__ __align__(16) unsigned char shared_memory[];

class SharedArena {
 public:
  template <class T>
  __device__ __forceinline__ T* take(int64_t count) {
    const size_t offset = (used_ + 15) / 16 * 16;
    used_ = offset + size_t(count) * sizeof(T);
    return reinterpret_cast<T*>(shared_memory + offset);
  }

 private:
  size_t used_ = 0;
};

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ __forceinline__ uint32_t ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

template <class V>
__device__ __forceinline__ V load_global(const void* address) {
  return *static_cast<const V*>(address);
}
template <class V>
__device__ __forceinline__ void store_global(void* address, const V& value) {
  *static_cast<V*>(address) = value;
}
template <class V>
__device__ __forceinline__ V load_streaming(const void* address) {
  if constexpr (sizeof(V) == 16) {
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(address));
    return bit_cast<V>(bits);
  } else {
    return load_global<V>(address);
  }
}

__device__ __forceinline__ void prefetch_global(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

template <class T>
__device__ __forceinline__ T load_fresh(const T* address) {
  return __ldcg(address);
}
__device__ __forceinline__ void fence_device() { __threadfence(); }
__device__ __forceinline__ int arrive(int32_t* counter, int most) {
  uint32_t before;  // not by an addition: the compiler would add for a whole warp, and wait
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most - 1) : "memory");
  return int(before);
}

template <class V, class T>
__device__ __forceinline__ void copy_async(T* array, int64_t index, const void* source) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(array + index));
  if constexpr (sizeof(V) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(source), "n"(sizeof(V)) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

__device__ __forceinline__ int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float subtract_rounded(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ int round_to_int(float value) { return __float2int_rn(value); }

__device__ __forceinline__ float float_from_half(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ __forceinline__ uint16_t half_from_float(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const uint16_t* array, int64_t index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(unsigned(__cvta_generic_to_shared(array + index)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const uint16_t* array, int64_t index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(unsigned(__cvta_generic_to_shared(array + index)))
               : "memory");
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_int8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline void check_cuda(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else torch would take it for its own
  throw CudaError(status, std::string(name) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

inline int multiprocessor_count() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

template <auto kernel, class... Arguments>
inline void launch(const char* name, dim3 grid, int threads, size_t shared_bytes, Stream stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 << 10)  // more must be asked for; on every device, so each time
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes, config.stream = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

#endif

// -- Written over the words above

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarpSize; }

__device__ __forceinline__ float float_from_bfloat16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// To the nearest, halves to even; NaN stays NaN.
__device__ __forceinline__ uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// In every lane, added in the same order: the bits are equal.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over a block of kWarps warps, in every thread. `scratch` [kWarps] may be used again after the next barrier.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, const Shared<float>& scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_threads();
  float sum = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace helexa::cuda
