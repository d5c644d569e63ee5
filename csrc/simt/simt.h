// CUDA's execution model on a CPU, for tests: a block's threads are fibers of one CPU thread, and blocks run one after
// the other. It is included by csrc/cuda/common.cuh instead of CUDA's own headers, so g++ compiles the very kernels
// that nvcc does.
//
// What it finds, each with the kernel, the block and the thread: an index outside a shared array, a shared byte read
// before it was written or while an asynchronous copy to it is under way, two threads that touch a shared byte without
// a barrier between them, a barrier or a warp operation that not all threads reach, a misaligned vector access, and,
// where the arguments lie in `Guarded` memory, a global access outside its buffer. The order in which fibers run can be
// changed: a result that depends on it is a race too.
//
// What it does not model: time, caches, memory ordering between blocks, and warps that run ahead inside a warp
// operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define __global__
#define __grid_constant__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace helexa::simt {

constexpr int kWarpSize = 32;

// The thread that runs: what CUDA calls threadIdx and so on.
struct Thread {
  dim3 index, block, block_size, grid_size;
  int linear;  // within the block
};
const Thread& thread();

// Runs `body` for every thread of the grid. `shared_bytes` of shared memory are poisoned before each block. Throws
// std::runtime_error at the first fault found.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Order in which a block's threads take their turns: 0 ascending, 1 descending, else shuffled with this seed.
void set_thread_order(unsigned order);

// Lets a launch fail as one on a card does, with this number of cudaError_t, `after` launches that do not; where
// `sticks`, every later one fails too, as after a fault that ends the context. 0 mends it.
void fail_launches(int code, int after, bool sticks);

// Ends the launch with a fault at the running thread. May only be called by a kernel.
[[noreturn]] void fault(const std::string& what);

void block_barrier(int line);
void warp_barrier(int line);
// Hands `size` bytes (at most 64) of each lane to its whole warp: the address of lane 0's, lane l's lie l * 64 bytes
// behind.
const unsigned char* warp_exchange(const void* mine, size_t size, int line);

// -- Shared memory. Offsets are within the block's shared memory.

size_t shared_size();
unsigned char* shared_bytes(size_t offset);
void check_shared_read(size_t offset, size_t size);
void check_shared_write(size_t offset, size_t size, bool atomic = false);
// A copy that arrives when its group is waited for.
void copy_async(size_t offset, const void* source, size_t size);
void copy_async_commit();
void copy_async_wait(int groups_left);

// An array in shared memory; `size` elements from `offset` on. Indices are checked against the array, not the block.
template <class T>
class SharedArray {
 public:
  class Element {
   public:
    Element(const SharedArray& array, int64_t index) : array_(array), index_(index) {}
    operator T() const { return array_.template load<T>(index_); }
    const Element& operator=(T value) const {
      array_.template store<T>(index_, value);
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = T(other); }
    const Element& operator+=(T value) const { return *this = T(*this) + value; }
    const Element& operator*=(T value) const { return *this = T(*this) * value; }

   private:
    const SharedArray& array_;
    int64_t index_;
  };

  SharedArray() = default;
  SharedArray(size_t offset, int64_t size) : offset_(offset), size_(size) {}

  Element operator[](int64_t index) const { return Element(*this, index); }
  SharedArray operator+(int64_t by) const {
    SharedArray rest = *this;
    rest.first_ += by;
    return rest;
  }

  // V at element `index`: one element, or a vector of several whose address must be a multiple of V's size.
  template <class V>
  V load(int64_t index) const {
    const size_t at = place<V>(index, "read");
    check_shared_read(at, sizeof(V));
    V value;
    std::memcpy(&value, shared_bytes(at), sizeof(V));
    return value;
  }
  template <class V>
  void store(int64_t index, const V& value) const {
    const size_t at = place<V>(index, "write");
    check_shared_write(at, sizeof(V));
    std::memcpy(shared_bytes(at), &value, sizeof(V));
  }
  T add_atomic(int64_t index, T value) const {
    const size_t at = place<T>(index, "atomic");
    check_shared_write(at, sizeof(T), true);
    T before;
    std::memcpy(&before, shared_bytes(at), sizeof(T));
    const T after = before + value;
    std::memcpy(shared_bytes(at), &after, sizeof(T));
    return before;
  }
  template <class V>
  size_t place(int64_t index, const char* what) const {
    const int64_t at = first_ + index, count = int64_t(sizeof(V) / sizeof(T));
    static_assert(sizeof(V) % sizeof(T) == 0);
    if (at < 0 || at + count > size_)
      fault(std::string("shared ") + what + " of element " + std::to_string(at) +
            (count > 1 ? " to " + std::to_string(at + count - 1) : "") + " of an array of " + std::to_string(size_));
    const size_t place = offset_ + size_t(at) * sizeof(T);
    if (place % sizeof(V))
      fault(std::string("misaligned shared ") + what + " of " + std::to_string(sizeof(V)) + " bytes");
    return place;
  }

 private:
  size_t offset_ = 0;
  int64_t size_ = 0, first_ = 0;
};

// -- Global memory

// Memory between two pages that nothing may touch. It begins at the end of the first one, or else ends at the second
// one but for less than 16 bytes that alignment costs; what does not belong to it is filled with 0xff, which is NaN.
class Guarded {
 public:
  Guarded(size_t size, bool at_front);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  unsigned char *mapping_ = nullptr, *data_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

template <class V>
void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V))
    fault("misaligned global access of " + std::to_string(sizeof(V)) + " bytes");
}

}  // namespace helexa::simt

#define threadIdx (::helexa::simt::thread().index)
#define blockIdx (::helexa::simt::thread().block)
#define blockDim (::helexa::simt::thread().block_size)
#define gridDim (::helexa::simt::thread().grid_size)
