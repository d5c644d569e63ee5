// Weights in the order in which the kernels read them: 16 rows side by side, so that one 64-byte vector holds four
// consecutive values (or fields of values) of each of 16 rows. One layout serves every instruction-set level.
//
// A row group (16 rows) is a header area and a code area, each 64-byte aligned:
//   header   a record per block (32 or 256 columns): float16 scales of the 16 rows [, float16 minimums], then for K
//            quants the small integer scales, 16 bytes (one a row) for each group of 16 or 32 columns
//   codes    for each 32 columns a few 64-byte vectors of bit planes. "Quad" j (0..7) is columns 4j..4j+3; byte 4r+b of
//            a vector belongs to row r, column 4j+b.
//              8-bit plane: 8 vectors, one a quad            4-bit plane: 4 vectors, quad j low, quad j+4 high nibble
//              2-bit plane: 2 vectors, quad 4v+i at bits 2i  1-bit plane: 1 vector, quad j at bit j
// Codes are unsigned; a signed type is stored with an offset. F32 and F16 are stored as [columns][16] elements, BF16 as
// [pairs of columns][16][2], an odd last column beside zeros.
// All other types keep their rows as in the file.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dequantize.h"
#include "quant_blocks.h"

namespace helexa {

constexpr int kLanes = 16;  // rows in a group

enum class Storage { kCodes, kFloats, kBlocks };

struct PackedLayout {
  Storage storage;
  int header_bytes = 0;                                                      // a block of 16 rows
  int base_bits = 0;                                                         // plane of the low bits: 8, 4 or 2
  int high_bits = 0;                                                         // second plane: 0, 1 or 2
  constexpr int code_bytes() const { return 64 * (base_bits + high_bits); }  // 32 columns of 16 rows
};

constexpr PackedLayout packed_layout(QuantType type) {
  switch (type) {
    case QuantType::Q4_0:
    case QuantType::IQ4_NL:
      return {Storage::kCodes, 32, 4, 0};
    case QuantType::Q4_1:
      return {Storage::kCodes, 64, 4, 0};
    case QuantType::Q5_0:
      return {Storage::kCodes, 32, 4, 1};
    case QuantType::Q5_1:
      return {Storage::kCodes, 64, 4, 1};
    case QuantType::Q8_0:
      return {Storage::kCodes, 32, 8, 0};
    case QuantType::Q2_K:
      return {Storage::kCodes, 64 + 256, 2, 0};
    case QuantType::Q3_K:
      return {Storage::kCodes, 32 + 256, 2, 1};
    case QuantType::Q4_K:
      return {Storage::kCodes, 64 + 256, 4, 0};
    case QuantType::Q5_K:
      return {Storage::kCodes, 64 + 256, 4, 1};
    case QuantType::Q6_K:
      return {Storage::kCodes, 32 + 256, 4, 2};
    case QuantType::IQ4_XS:
      return {Storage::kCodes, 32 + 128, 4, 0};
    case QuantType::F32:
    case QuantType::F16:
    case QuantType::BF16:
      return {Storage::kFloats};
    default:
      return {Storage::kBlocks};
  }
}

// A matrix, or a stack of equal ones (the experts of a layer): each begins at a row group of its own.
class PackedMatrix {
 public:
  // Packs `stack` matrices of `rows` x `cols` weights stored as in a GGUF file, the first byte of each `stack_stride`
  // bytes after the one before (0: they follow each other). `mapped` packs nothing: the source must outlive this, and
  // row groups are packed one by one as they are used. Throws std::invalid_argument for an unknown type or a shape that
  // is not a whole number of blocks, std::bad_alloc when memory is short. `scales`, one a matrix or none, multiply the
  // products: NVFP4 files have them beside the blocks.
  PackedMatrix(int quant_type, const void* source, int64_t rows, int64_t cols, int64_t stack = 1,
               int64_t stack_stride = 0, bool mapped = false, std::vector<float> scales = {});

  void unpack(void* destination) const;                // the bytes that were packed, matrix after matrix
  void dequantize_row(int64_t row, float* out) const;  // of the first matrix; exact, then times its scale

  const TypeTraits& traits() const { return traits_; }
  QuantType type() const { return traits_.type; }
  Storage storage() const { return layout_.storage; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t stack() const { return stack_; }
  bool mapped() const { return mapped_ != nullptr; }
  int64_t groups() const { return (rows_ + kLanes - 1) / kLanes; }  // of one matrix
  int64_t group_bytes() const { return group_bytes_; }
  int64_t packed_bytes() const { return stack_ * groups() * group_bytes_; }
  int64_t nbytes() const { return mapped() ? 0 : packed_bytes(); }
  int64_t header_area() const { return header_area_; }
  float scale(int64_t member = 0) const { return scales_.empty() ? 1.0f : scales_[size_t(member)]; }
  int lanes(int64_t g) const { return int(rows_ - g * kLanes < kLanes ? rows_ - g * kLanes : kLanes); }
  // Row group g of matrix `member`; not of a mapped matrix.
  const uint8_t* group(int64_t g, int64_t member = 0) const {
    return data_.get() + (member * groups() + g) * group_bytes_;
  }
  // The same of a mapped one, packed into `out` [group_bytes()], 64-byte aligned.
  void pack_mapped_group(int64_t g, int64_t member, uint8_t* out) const {
    pack_group(g, mapped_ + member * stack_stride_, out);
  }

 private:
  void pack_group(int64_t g, const uint8_t* matrix, uint8_t* out) const;
  void unpack_row(int64_t row, int64_t member, uint8_t* out) const;

  const TypeTraits& traits_;
  PackedLayout layout_;
  int64_t rows_, cols_, stack_, stack_stride_, row_bytes_, header_area_ = 0, group_bytes_ = 0;
  const uint8_t* mapped_ = nullptr;
  std::vector<float> scales_;
  std::shared_ptr<uint8_t> data_;
};

}  // namespace helexa
