// What quant_matmul and moe_matmul share: scratch memory, row groups of weights, and the dot products of a pass of
// activation rows with one or two of them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "packed_matrix.h"
#include "quant_dot.h"

namespace helexa {

constexpr int kMatvecRows = 8;                    // up to here weights are unpacked in registers as they stream by
constexpr int64_t kActivationBudget = 512 << 10;  // bytes of activations kept in a core's L2 cache while weights pass
constexpr int kMaxPassRows = 252, kPassStep = 6;  // rows a pass, a multiple of a register block

// Grow-only 64-byte aligned memory.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

struct ThreadScratch {
  Scratch sums, tile_a, tile_b;
};

// 16 rows of a matrix (`lanes` of them real); `data` is laid out as its PackedMatrix says. Null data: no group. The dot
// products are multiplied with `scale`.
struct RowGroup {
  const PackedMatrix* matrix = nullptr;
  const uint8_t* data = nullptr;
  int lanes = 0;
  float scale = 1.0f;
  explicit operator bool() const { return data != nullptr; }
};

// Rows [0, rows) of activations, chunk by chunk as int8, as floats or rounded, whichever the weights need: chunk c of
// row r is number c * stride + r. bfloat16 weights meet the rounded ones, or floats where there are none.
struct Pass {
  const ActivationChunk* int8;
  const FloatChunk* floats;
  const RoundedChunk* rounded;
  int64_t cols, rows, stride;
  bool matvec() const { return rows <= kMatvecRows; }
};

// The most rows of `cols` activations to compute in one pass, so that a pass stays in the cache. chunk_bytes: of the
// largest form they are needed in.
int64_t pass_rows(int64_t rows, int64_t cols, size_t chunk_bytes);

// sums[32 * row + lane] = dot products with the rows of `a`, 16 further with those of `b`, if there is one.
void sums_of(const Pass& pass, const RowGroup& a, const RowGroup& b, ThreadScratch& scratch, float* sums);

}  // namespace helexa
