// How a device keeps a matrix of a stored type: in planes. A block of the type is cut into fields (codes, high bits,
// scales, ...), and a plane holds one field of every block of the matrix: row after row, a row's fields one behind the
// other, rows at a pitch of whole 16 bytes. So threads that read neighbouring blocks read neighbouring memory, in words
// of the field's own alignment, where the file's blocks of 17, 34 or 210 bytes are aligned to nothing. No bit is
// changed, and the blocks can be put together again.
//
// A plane begins at a multiple of 256 bytes. What pads a row to its pitch is 0; what lies between planes is never read.
// A stack of E matrices [R, K] is a matrix of E * R rows. F32, F16, BF16 and I8 are one plane of numbers.
// helexa_engine/ops/quant_matmul/planes.py counts the same bytes without a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../check.h"
#include "../quant_blocks.h"

namespace helexa::cuda {

constexpr int kMaxPlanes = 5;

// A run of bytes of a block.
struct Field {
  int offset, bytes;
};

struct BlockFields {
  int block_size = 0, block_bytes = 0, count = 0;  // 0 values: no type that is kept in planes
  Field fields[kMaxPlanes] = {};
};

namespace detail {

// A field begins where the one before it ends.
template <class... Bytes>
constexpr BlockFields cut(int block_size, size_t block_bytes, Bytes... bytes) {
  BlockFields result;
  result.block_size = block_size, result.block_bytes = int(block_bytes);
  const int lengths[] = {int(bytes)...};
  int offset = 0;
  for (const int length : lengths) {
    result.fields[result.count++] = {offset, length};
    offset += length;
  }
  return result;
}

}  // namespace detail

// The fields of a block of `type`, in the order of quant_blocks.h. What is always needed together is one field: a Q4_K
// or Q5_K block's d, dmin and scales are 16 bytes, an IQ4_XS block's d and scales 8.
constexpr BlockFields block_fields(QuantType type) {
  using detail::cut;
  switch (type) {
    case QuantType::F32:
      return cut(1, 4, 4);
    case QuantType::F16:
    case QuantType::BF16:
      return cut(1, 2, 2);
    case QuantType::I8:
      return cut(1, 1, 1);
    case QuantType::Q4_0:
    case QuantType::IQ4_NL:  // d, qs
      return cut(32, sizeof(block_q4_0), 2, sizeof(block_q4_0::qs));
    case QuantType::Q4_1:  // d and m, qs
      return cut(32, sizeof(block_q4_1), 4, sizeof(block_q4_1::qs));
    case QuantType::Q5_0:  // d, qh, qs
      return cut(32, sizeof(block_q5_0), 2, sizeof(block_q5_0::qh), sizeof(block_q5_0::qs));
    case QuantType::Q5_1:  // d and m, qh, qs
      return cut(32, sizeof(block_q5_1), 4, sizeof(block_q5_1::qh), sizeof(block_q5_1::qs));
    case QuantType::Q8_0:  // d, qs
      return cut(32, sizeof(block_q8_0), 2, sizeof(block_q8_0::qs));
    case QuantType::Q1_0:  // d, qs
      return cut(128, sizeof(block_q1_0), 2, sizeof(block_q1_0::qs));
    case QuantType::MXFP4:  // e, qs
      return cut(32, sizeof(block_mxfp4), 1, sizeof(block_mxfp4::qs));
    case QuantType::NVFP4:  // d, qs
      return cut(64, sizeof(block_nvfp4), sizeof(block_nvfp4::d), sizeof(block_nvfp4::qs));
    case QuantType::Q2_K:  // scales, qs, d and dmin
      return cut(256, sizeof(block_q2_K), sizeof(block_q2_K::scales), sizeof(block_q2_K::qs), 4);
    case QuantType::Q3_K:  // hmask, qs, scales, d
      return cut(256, sizeof(block_q3_K), sizeof(block_q3_K::hmask), sizeof(block_q3_K::qs), sizeof(block_q3_K::scales),
                 2);
    case QuantType::Q4_K:  // d, dmin and scales; qs
      return cut(256, sizeof(block_q4_K), 4 + sizeof(block_q4_K::scales), sizeof(block_q4_K::qs));
    case QuantType::Q5_K:  // d, dmin and scales; qh, qs
      return cut(256, sizeof(block_q5_K), 4 + sizeof(block_q5_K::scales), sizeof(block_q5_K::qh),
                 sizeof(block_q5_K::qs));
    case QuantType::Q6_K:  // ql, qh, scales, d
      return cut(256, sizeof(block_q6_K), sizeof(block_q6_K::ql), sizeof(block_q6_K::qh), sizeof(block_q6_K::scales),
                 2);
    case QuantType::TQ1_0:  // qs, qh, d
      return cut(256, sizeof(block_tq1_0), sizeof(block_tq1_0::qs), sizeof(block_tq1_0::qh), 2);
    case QuantType::TQ2_0:  // qs, d
      return cut(256, sizeof(block_tq2_0), sizeof(block_tq2_0::qs), 2);
    case QuantType::IQ4_XS:  // d, scales_h and scales_l; qs
      return cut(256, sizeof(block_iq4_xs), 4 + sizeof(block_iq4_xs::scales_l), sizeof(block_iq4_xs::qs));
    case QuantType::IQ3_S:  // d, qs, qh, signs, scales
      return cut(256, sizeof(block_iq3_s), 2, sizeof(block_iq3_s::qs), sizeof(block_iq3_s::qh),
                 sizeof(block_iq3_s::signs), sizeof(block_iq3_s::scales));
    case QuantType::IQ3_XXS:  // d, qs, signs_scale
      return cut(256, sizeof(block_iq3_xxs), 2, sizeof(block_iq3_xxs::qs), sizeof(block_iq3_xxs::signs_scale));
    case QuantType::IQ2_S:  // d, qs, signs, qh, scales
      return cut(256, sizeof(block_iq2_s), 2, sizeof(block_iq2_s::qs), sizeof(block_iq2_s::signs),
                 sizeof(block_iq2_s::qh), sizeof(block_iq2_s::scales));
    case QuantType::IQ2_XS:  // d, qs, scales
      return cut(256, sizeof(block_iq2_xs), 2, sizeof(block_iq2_xs::qs), sizeof(block_iq2_xs::scales));
    case QuantType::IQ2_XXS:  // d, qs
      return cut(256, sizeof(block_iq2_xxs), 2, sizeof(block_iq2_xxs::qs));
    case QuantType::IQ1_S:  // d, qs, qh
      return cut(256, sizeof(block_iq1_s), 2, sizeof(block_iq1_s::qs), sizeof(block_iq1_s::qh));
    case QuantType::IQ1_M:  // qs, qh, scales
      return cut(256, sizeof(block_iq1_m), sizeof(block_iq1_m::qs), sizeof(block_iq1_m::qh),
                 sizeof(block_iq1_m::scales));
    default:
      return {};
  }
}

namespace detail {

constexpr bool covers(QuantType type) {
  const BlockFields block = block_fields(type);
  int end = 0;
  for (int i = 0; i < block.count; ++i) {
    if (block.fields[i].offset != end) return false;
    end += block.fields[i].bytes;
  }
  return block.count > 0 && end == block.block_bytes;
}
constexpr bool covers_every_type() {
  for (int number = 0; number <= int(QuantType::Q1_0); ++number)
    if (block_fields(QuantType(number)).count > 0 && !covers(QuantType(number))) return false;
  return true;
}
static_assert(covers_every_type(), "a block's fields must be all of its bytes");

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace detail

// Where the planes of a matrix [rows, cols] lie. `cols` is whole blocks.
struct PlanesLayout {
  int64_t offset[kMaxPlanes] = {};  // of each plane, in bytes from the first
  int64_t pitch[kMaxPlanes] = {};   // bytes from one row to the next
  int64_t bytes = 0;                // of all planes
};

constexpr PlanesLayout planes_layout(QuantType type, int64_t rows, int64_t cols) {
  const BlockFields block = block_fields(type);
  PlanesLayout layout;
  for (int i = 0; i < block.count; ++i) {
    layout.offset[i] = detail::round_up(layout.bytes, 256);
    layout.pitch[i] = detail::round_up(cols / block.block_size * block.fields[i].bytes, 16);
    layout.bytes = layout.offset[i] + rows * layout.pitch[i];
  }
  return layout;
}

// The planes as kernels take them: an argument of a launch.
struct WeightPlanes {
  const uint8_t* plane[kMaxPlanes];
  int32_t pitch[kMaxPlanes];
};

// Throws std::invalid_argument unless `quant_type` is the number of a type that is kept in planes and `cols` whole
// blocks.
inline BlockFields check_planes(const char* function, int quant_type, int64_t rows, int64_t cols) {
  const BlockFields block = block_fields(static_cast<QuantType>(quant_type));
  if (block.count == 0)
    fail(function, "quant_type", "the ggml number of a type that models are stored in", std::to_string(quant_type));
  check(rows >= 0, function, "rows", "at least 0", rows);
  if (cols <= 0 || cols % block.block_size)
    fail(function, "cols", "a positive multiple of the block size " + std::to_string(block.block_size),
         std::to_string(cols));
  return block;
}

inline WeightPlanes weight_planes(QuantType type, const void* planes, int64_t rows, int64_t cols) {
  const PlanesLayout layout = planes_layout(type, rows, cols);
  WeightPlanes result = {};
  for (int i = 0; i < kMaxPlanes; ++i) {
    result.plane[i] = static_cast<const uint8_t*>(planes) + layout.offset[i];
    result.pitch[i] = int32_t(layout.pitch[i]);
  }
  return result;
}

// Every type that is kept in planes.
// clang-format off
#define HELEXA_PLANE_TYPES(X)                                                                                 \
  X(F32) X(F16) X(BF16) X(I8) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q1_0)                                 \
  X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(TQ1_0) X(TQ2_0) X(IQ4_NL) X(IQ4_XS)                               \
  X(IQ3_S) X(IQ3_XXS) X(IQ2_S) X(IQ2_XS) X(IQ2_XXS) X(IQ1_S) X(IQ1_M) X(MXFP4) X(NVFP4)
// clang-format on

// Calls `visit` with std::integral_constant<QuantType, type>, so that code can be compiled for each type that is kept
// in planes. False: `type` is none of them. quant_planes.cuh has the same for kernels.
#define HELEXA_VISIT(name)                                       \
  case QuantType::name:                                          \
    visit(std::integral_constant<QuantType, QuantType::name>()); \
    return true;
template <class Visit>
bool visit_type(QuantType type, const Visit& visit) {
  switch (type) {
    HELEXA_PLANE_TYPES(HELEXA_VISIT)
    default:
      return false;
  }
}

}  // namespace helexa::cuda
