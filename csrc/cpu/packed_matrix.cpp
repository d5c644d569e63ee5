#include "packed_matrix.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "thread_pool.h"
#include "weight_memory.h"

namespace helexa {
namespace {

// A block taken apart: unsigned codes in column order, the header's fields as they are packed.
struct Fields {
  uint8_t codes[256];
  half_bits d, dmin;
  uint8_t small[16];  // integer scales (or pairs of scale and minimum: Q2_K a byte, Q4_K and Q5_K two bytes)
};

void split_nibbles(const uint8_t* qs, int half, uint8_t* codes) {
  for (int i = 0; i < half; ++i) codes[i] = qs[i] & 15, codes[half + i] = qs[i] >> 4;
}
void join_nibbles(const uint8_t* codes, int half, uint8_t* qs) {
  for (int i = 0; i < half; ++i) qs[i] = uint8_t((codes[i] & 15) | (codes[half + i] & 15) << 4);
}
void split_fifth(const uint8_t* qh, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= uint8_t((qh[i / 8] >> (i % 8) & 1) << 4);
}
void join_fifth(const uint8_t* codes, uint8_t* qh) {
  std::memset(qh, 0, 4);
  for (int i = 0; i < 32; ++i) qh[i / 8] |= uint8_t((codes[i] >> 4 & 1) << (i % 8));
}
void split_pairs(const uint8_t (*qs)[32], uint8_t* codes) {
  for (int h = 0; h < 2; ++h)
    for (int p = 0; p < 4; ++p)
      for (int i = 0; i < 32; ++i) codes[128 * h + 32 * p + i] = qs[h][i] >> (2 * p) & 3;
}
void join_pairs(const uint8_t* codes, uint8_t (*qs)[32]) {
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 32; ++i) {
      int byte = 0;
      for (int p = 0; p < 4; ++p) byte |= (codes[128 * h + 32 * p + i] & 3) << (2 * p);
      qs[h][i] = uint8_t(byte);
    }
}
// Plane g of `bits` gives one bit (from, to shifted) of each code of group g.
void split_plane(const uint8_t* bits, int to, uint8_t* codes) {
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 32; ++i) codes[32 * g + i] |= uint8_t((bits[i] >> g & 1) << to);
}
void join_plane(const uint8_t* codes, int from, uint8_t* bits) {
  for (int i = 0; i < 32; ++i) {
    int byte = 0;
    for (int g = 0; g < 8; ++g) byte |= (codes[32 * g + i] >> from & 1) << g;
    bits[i] = uint8_t(byte);
  }
}

// 12 bytes with eight scales and eight minimums of six bits <-> small[2g], small[2g + 1].
void split_six_bits(const uint8_t* packed, uint8_t* small) {
  for (int g = 0; g < 4; ++g) {
    small[2 * g] = packed[g] & 63, small[2 * g + 1] = packed[g + 4] & 63;
    small[2 * g + 8] = uint8_t((packed[g + 8] & 15) | (packed[g] >> 6) << 4);
    small[2 * g + 9] = uint8_t(packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4);
  }
}
void join_six_bits(const uint8_t* small, uint8_t* packed) {
  for (int g = 0; g < 4; ++g) {
    packed[g] = uint8_t(small[2 * g] | (small[2 * g + 8] >> 4) << 6);
    packed[g + 4] = uint8_t(small[2 * g + 1] | (small[2 * g + 9] >> 4) << 6);
    packed[g + 8] = uint8_t((small[2 * g + 8] & 15) | (small[2 * g + 9] & 15) << 4);
  }
}

void split(const block_q4_0& b, Fields& f) { f.d = b.d, split_nibbles(b.qs, 16, f.codes); }
void join(const Fields& f, block_q4_0& b) { b.d = f.d, join_nibbles(f.codes, 16, b.qs); }
void split(const block_q4_1& b, Fields& f) { f.d = b.d, f.dmin = b.m, split_nibbles(b.qs, 16, f.codes); }
void join(const Fields& f, block_q4_1& b) { b.d = f.d, b.m = f.dmin, join_nibbles(f.codes, 16, b.qs); }
void split(const block_q5_0& b, Fields& f) { f.d = b.d, split_nibbles(b.qs, 16, f.codes), split_fifth(b.qh, f.codes); }
void join(const Fields& f, block_q5_0& b) { b.d = f.d, join_nibbles(f.codes, 16, b.qs), join_fifth(f.codes, b.qh); }
void split(const block_q5_1& b, Fields& f) {
  f.d = b.d, f.dmin = b.m, split_nibbles(b.qs, 16, f.codes), split_fifth(b.qh, f.codes);
}
void join(const Fields& f, block_q5_1& b) {
  b.d = f.d, b.m = f.dmin, join_nibbles(f.codes, 16, b.qs), join_fifth(f.codes, b.qh);
}
void split(const block_q8_0& b, Fields& f) {
  f.d = b.d;
  for (int i = 0; i < 32; ++i) f.codes[i] = uint8_t(b.qs[i]) ^ 0x80;
}
void join(const Fields& f, block_q8_0& b) {
  b.d = f.d;
  for (int i = 0; i < 32; ++i) b.qs[i] = int8_t(f.codes[i] ^ 0x80);
}
void split(const block_q2_K& b, Fields& f) {
  f.d = b.d, f.dmin = b.dmin, std::memcpy(f.small, b.scales, 16), split_pairs(b.qs, f.codes);
}
void join(const Fields& f, block_q2_K& b) {
  b.d = f.d, b.dmin = f.dmin, std::memcpy(b.scales, f.small, 16), join_pairs(f.codes, b.qs);
}
void split(const block_q3_K& b, Fields& f) {
  f.d = b.d, split_pairs(b.qs, f.codes), split_plane(b.hmask, 2, f.codes);
  for (int s = 0; s < 16; ++s) {
    const int low = s < 8 ? b.scales[s] & 15 : b.scales[s - 8] >> 4, high = b.scales[8 + s % 4] >> (2 * (s / 4)) & 3;
    f.small[s] = uint8_t((low | high << 4) - 32);
  }
}
void join(const Fields& f, block_q3_K& b) {
  b.d = f.d, join_pairs(f.codes, b.qs), join_plane(f.codes, 2, b.hmask);
  std::memset(b.scales, 0, 12);
  for (int s = 0; s < 16; ++s) {
    const int six = (f.small[s] + 32) & 63;
    b.scales[s % 8] |= uint8_t((six & 15) << (s / 8 * 4));
    b.scales[8 + s % 4] |= uint8_t((six >> 4) << (2 * (s / 4)));
  }
}
void split(const block_q4_K& b, Fields& f) {
  f.d = b.d, f.dmin = b.dmin, split_six_bits(b.scales, f.small);
  for (int j = 0; j < 4; ++j) split_nibbles(b.qs[j], 32, f.codes + 64 * j);
}
void join(const Fields& f, block_q4_K& b) {
  b.d = f.d, b.dmin = f.dmin, join_six_bits(f.small, b.scales);
  for (int j = 0; j < 4; ++j) join_nibbles(f.codes + 64 * j, 32, b.qs[j]);
}
void split(const block_q5_K& b, Fields& f) {
  f.d = b.d, f.dmin = b.dmin, split_six_bits(b.scales, f.small);
  for (int j = 0; j < 4; ++j) split_nibbles(b.qs[j], 32, f.codes + 64 * j);
  split_plane(b.qh, 4, f.codes);
}
void join(const Fields& f, block_q5_K& b) {
  b.d = f.d, b.dmin = f.dmin, join_six_bits(f.small, b.scales);
  for (int j = 0; j < 4; ++j) join_nibbles(f.codes + 64 * j, 32, b.qs[j]);
  join_plane(f.codes, 4, b.qh);
}
void split(const block_q6_K& b, Fields& f) {
  f.d = b.d, std::memcpy(f.small, b.scales, 16);
  for (int h = 0; h < 2; ++h) {
    split_nibbles(b.ql[h], 64, f.codes + 128 * h);
    for (int p = 0; p < 4; ++p)
      for (int i = 0; i < 32; ++i) f.codes[128 * h + 32 * p + i] |= uint8_t((b.qh[h][i] >> (2 * p) & 3) << 4);
  }
}
void join(const Fields& f, block_q6_K& b) {
  b.d = f.d, std::memcpy(b.scales, f.small, 16);
  for (int h = 0; h < 2; ++h) {
    join_nibbles(f.codes + 128 * h, 64, b.ql[h]);
    for (int i = 0; i < 32; ++i) {
      int byte = 0;
      for (int p = 0; p < 4; ++p) byte |= (f.codes[128 * h + 32 * p + i] >> 4) << (2 * p);
      b.qh[h][i] = uint8_t(byte);
    }
  }
}
void split(const block_iq4_xs& b, Fields& f) {
  f.d = b.d;
  for (int g = 0; g < 8; ++g) {
    split_nibbles(b.qs[g], 16, f.codes + 32 * g);
    f.small[g] = uint8_t(((b.scales_l[g / 2] >> (g % 2 * 4) & 15) | (b.scales_h >> 2 * g & 3) << 4) - 32);
  }
}
void join(const Fields& f, block_iq4_xs& b) {
  b.d = f.d, b.scales_h = 0, std::memset(b.scales_l, 0, 4);
  for (int g = 0; g < 8; ++g) {
    join_nibbles(f.codes + 32 * g, 16, b.qs[g]);
    const int six = (f.small[g] + 32) & 63;
    b.scales_l[g / 2] |= uint8_t((six & 15) << (g % 2 * 4));
    b.scales_h |= uint16_t((six >> 4) << (2 * g));
  }
}

template <class Function>
void with_block_type(QuantType type, Function function) {
  switch (type) {
    case QuantType::Q4_0:
    case QuantType::IQ4_NL:
      return function(block_q4_0{});
    case QuantType::Q4_1:
      return function(block_q4_1{});
    case QuantType::Q5_0:
      return function(block_q5_0{});
    case QuantType::Q5_1:
      return function(block_q5_1{});
    case QuantType::Q8_0:
      return function(block_q8_0{});
    case QuantType::Q2_K:
      return function(block_q2_K{});
    case QuantType::Q3_K:
      return function(block_q3_K{});
    case QuantType::Q4_K:
      return function(block_q4_K{});
    case QuantType::Q5_K:
      return function(block_q5_K{});
    case QuantType::Q6_K:
      return function(block_q6_K{});
    case QuantType::IQ4_XS:
      return function(block_iq4_xs{});
    default:
      break;
  }
}

// Integer scales of 16 rows that follow the float16 ones, in bytes a row.
int small_bytes(const PackedLayout& layout, bool has_minimum) {
  return (layout.header_bytes - (has_minimum ? 64 : 32)) / kLanes;
}
bool has_minimum(QuantType type) {
  return type == QuantType::Q4_1 || type == QuantType::Q5_1 || type == QuantType::Q2_K || type == QuantType::Q4_K ||
         type == QuantType::Q5_K;
}

// out[j][r] = the j-th of the eight 4-byte words that begin at rows + r * stride.
void transpose(const uint8_t* rows, size_t stride, uint32_t (*out)[kLanes]) {
#if defined(__SSE2__)
  for (int r = 0; r < kLanes; r += 4)
    for (int j = 0; j < 8; j += 4) {
      const auto row = [&](int k) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + size_t(r + k) * stride + 4 * j));
      };
      const __m128i low01 = _mm_unpacklo_epi32(row(0), row(1)), high01 = _mm_unpackhi_epi32(row(0), row(1));
      const __m128i low23 = _mm_unpacklo_epi32(row(2), row(3)), high23 = _mm_unpackhi_epi32(row(2), row(3));
      const auto store = [&](int k, __m128i words) {
        _mm_store_si128(reinterpret_cast<__m128i*>(&out[j + k][r]), words);
      };
      store(0, _mm_unpacklo_epi64(low01, low23)), store(1, _mm_unpackhi_epi64(low01, low23));
      store(2, _mm_unpacklo_epi64(high01, high23)), store(3, _mm_unpackhi_epi64(high01, high23));
    }
#else
  for (int r = 0; r < kLanes; ++r)
    for (int j = 0; j < 8; ++j) std::memcpy(&out[j][r], rows + size_t(r) * stride + 4 * j, 4);
#endif
}

// Writes the code vectors of 32 columns, of which row r's codes begin at rows + r * stride. Word w of a vector is row
// w's and holds four columns.
void place_codes(const uint8_t* rows, size_t stride, const PackedLayout& layout, uint8_t* vectors) {
  alignas(64) uint32_t quads[8][kLanes];
  transpose(rows, stride, quads);
  auto* words = reinterpret_cast<uint32_t*>(vectors);
  if (layout.base_bits == 8) {
    std::memcpy(words, quads, sizeof quads);
  } else if (layout.base_bits == 4) {
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < kLanes; ++r)
        words[16 * j + r] = (quads[j][r] & 0x0f0f0f0f) | (quads[j + 4][r] & 0x0f0f0f0f) << 4;
  } else {
    for (int j = 0; j < 8; j += 4)
      for (int r = 0; r < kLanes; ++r)
        words[4 * j + r] = (quads[j][r] & 0x03030303) | (quads[j + 1][r] & 0x03030303) << 2 |
                           (quads[j + 2][r] & 0x03030303) << 4 | (quads[j + 3][r] & 0x03030303) << 6;
  }
  auto* high = words + 16 * layout.base_bits;
  const int shift = layout.base_bits;
  if (layout.high_bits == 1) {
    uint32_t bits[kLanes] = {};
    for (int j = 0; j < 8; ++j)
      for (int r = 0; r < kLanes; ++r) bits[r] |= (quads[j][r] >> shift & 0x01010101) << j;
    std::memcpy(high, bits, sizeof bits);
  } else if (layout.high_bits == 2) {
    for (int j = 0; j < 8; j += 4)
      for (int r = 0; r < kLanes; ++r)
        high[4 * j + r] = (quads[j][r] >> shift & 0x03030303) | (quads[j + 1][r] >> shift & 0x03030303) << 2 |
                          (quads[j + 2][r] >> shift & 0x03030303) << 4 | (quads[j + 3][r] >> shift & 0x03030303) << 6;
  }
}
void take_codes(const uint8_t* vectors, const PackedLayout& layout, int row, uint8_t* codes) {
  uint32_t quads[8];
  const auto* words = reinterpret_cast<const uint32_t*>(vectors) + row;
  for (int j = 0; j < 8; ++j) {
    if (layout.base_bits == 8) quads[j] = words[16 * j];
    if (layout.base_bits == 4) quads[j] = words[16 * (j % 4)] >> (j / 4 * 4) & 0x0f0f0f0f;
    if (layout.base_bits == 2) quads[j] = words[16 * (j / 4)] >> (j % 4 * 2) & 0x03030303;
  }
  const auto* high = words + 16 * layout.base_bits;
  for (int j = 0; j < 8; ++j) {
    if (layout.high_bits == 1) quads[j] |= (high[0] >> j & 0x01010101) << layout.base_bits;
    if (layout.high_bits == 2) quads[j] |= (high[16 * (j / 4)] >> (j % 4 * 2) & 0x03030303) << layout.base_bits;
  }
  std::memcpy(codes, quads, 32);
}

void put_half(uint8_t* header, int row, half_bits value) { std::memcpy(header + 2 * row, &value, 2); }
half_bits get_half(const uint8_t* header, int row) {
  half_bits value;
  std::memcpy(&value, header + 2 * row, 2);
  return value;
}

// Where element (row, column) of a float type stands in its group.
int64_t float_place(QuantType type, int64_t row, int64_t column) {
  if (type == QuantType::BF16) return (column / 2 * kLanes + row) * 2 + column % 2;
  return column * kLanes + row;
}

// out[k][row] = element k of each of the `lanes` rows, 16 side by side.
template <class T>
void interleave(const uint8_t* rows, int64_t row_bytes, int64_t count, int lanes, uint8_t* out) {
  constexpr int kSteps =
      16;  // of each row at a time: whole cache lines, though rows may share their places in the cache
  T block[kSteps][kLanes] = {};
  for (int64_t k = 0; k < count; k += kSteps) {
    const int steps = int(std::min<int64_t>(kSteps, count - k));
    for (int r = 0; r < lanes; ++r) {
      const uint8_t* row = rows + r * row_bytes + k * int64_t(sizeof(T));
      for (int i = 0; i < steps; ++i) std::memcpy(&block[i][r], row + i * sizeof(T), sizeof(T));
    }
    std::memcpy(out + k * int64_t(sizeof block[0]), block, size_t(steps) * sizeof block[0]);
  }
}

int64_t align64(int64_t n) { return (n + 63) / 64 * 64; }

}  // namespace

PackedMatrix::PackedMatrix(int quant_type, const void* source, int64_t rows, int64_t cols, int64_t stack,
                           int64_t stack_stride, bool mapped, std::vector<float> scales)
    : traits_(type_traits(quant_type, "pack")),
      layout_(packed_layout(traits_.type)),
      rows_(rows),
      cols_(cols),
      stack_(stack),
      stack_stride_(stack_stride),
      scales_(std::move(scales)) {
  check(rows >= 1, "pack", "rows", "at least 1", rows);
  check(stack >= 1, "pack", "stack", "at least 1", stack);
  check(scales_.empty() || int64_t(scales_.size()) == stack, "pack", "scales", "one a matrix or none",
        int64_t(scales_.size()));
  if (cols < 1 || cols % traits_.block_size)
    fail(
        "pack", "cols",
        std::string("a positive multiple of the ") + traits_.name + " block size " + std::to_string(traits_.block_size),
        std::to_string(cols));
  row_bytes_ = cols / traits_.block_size * traits_.block_bytes;
  if (stack_stride_ == 0) stack_stride_ = rows * row_bytes_;
  check(stack_stride_ >= rows * row_bytes_, "pack", "stack_stride", "a matrix or more", stack_stride_);
  if (layout_.storage == Storage::kCodes) {
    header_area_ = align64(cols / traits_.block_size * layout_.header_bytes);
    group_bytes_ = header_area_ + cols / 32 * layout_.code_bytes();
  } else {
    group_bytes_ = align64(kLanes * row_bytes_);  // an odd number of BF16 columns leaves room for another
  }
  const auto* bytes = static_cast<const uint8_t*>(source);
  if (mapped) {
    mapped_ = bytes;
    return;
  }
  data_ = allocate_weights(size_t(packed_bytes()));
  parallel_for(stack_ * groups(), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* matrix = bytes + i / groups() * stack_stride_;
      const int64_t g = i % groups();
      // A file's pages come into the map one run at a time here, not fault by fault below.
      if (i == begin || g == 0)
        populate_pages(matrix + g * kLanes * row_bytes_,
                       size_t((std::min(g + end - i, groups()) - g) * kLanes * row_bytes_));
      pack_group(g, matrix, data_.get() + i * group_bytes_);
    }
  });
}

void PackedMatrix::pack_group(int64_t g, const uint8_t* matrix, uint8_t* out) const {
  const int lanes = this->lanes(g);
  const uint8_t* source = matrix + g * kLanes * row_bytes_;
  if (layout_.storage == Storage::kBlocks) {
    std::memcpy(out, source, size_t(lanes * row_bytes_));
    std::memset(out + lanes * row_bytes_, 0, size_t(group_bytes_ - lanes * row_bytes_));
    return;
  }
  if (layout_.storage == Storage::kFloats) {
    std::memset(out, 0, size_t(group_bytes_));  // what stands beside a last odd column
    // Elements of 4 bytes are a column of F32 or a pair of BF16's; a last odd one of these is placed by itself.
    if (type() == QuantType::F16) {
      interleave<uint16_t>(source, row_bytes_, cols_, lanes, out);
    } else {
      interleave<uint32_t>(source, row_bytes_, row_bytes_ / 4, lanes, out);
    }
    if (row_bytes_ % 4 && type() == QuantType::BF16)
      for (int r = 0; r < lanes; ++r)
        std::memcpy(out + float_place(type(), r, cols_ - 1) * 2, source + r * row_bytes_ + (cols_ - 1) * 2, 2);
    return;
  }
  const bool minimum = has_minimum(type());
  const int small = small_bytes(layout_, minimum), groups_per_block = traits_.block_size / 32;
  const int64_t blocks = cols_ / traits_.block_size;
  std::memset(out + blocks * layout_.header_bytes, 0, size_t(header_area_ - blocks * layout_.header_bytes));
  with_block_type(type(), [&](auto block) {
    Fields fields[kLanes] = {};  // rows beyond the last are zero
    for (int64_t i = 0; i < blocks; ++i) {
      uint8_t* header = out + i * layout_.header_bytes;
      uint8_t* codes = out + header_area_ + i * groups_per_block * layout_.code_bytes();
      for (int r = 0; r < lanes; ++r) {
        std::memcpy(&block, source + r * row_bytes_ + i * sizeof block, sizeof block);
        split(block, fields[r]);
      }
      for (int r = 0; r < kLanes; ++r) {
        put_half(header, r, fields[r].d);
        if (minimum) put_half(header + 32, r, fields[r].dmin);
        for (int s = 0; s < small; ++s) header[(minimum ? 64 : 32) + kLanes * s + r] = fields[r].small[s];
      }
      for (int j = 0; j < groups_per_block; ++j)
        place_codes(fields[0].codes + 32 * j, sizeof(Fields), layout_, codes + j * layout_.code_bytes());
    }
  });
}

void PackedMatrix::unpack_row(int64_t row, int64_t member, uint8_t* out) const {
  if (mapped()) {
    std::memcpy(out, mapped_ + member * stack_stride_ + row * row_bytes_, size_t(row_bytes_));
    return;
  }
  const uint8_t* in = group(row / kLanes, member);
  const int r = static_cast<int>(row % kLanes);
  if (layout_.storage == Storage::kBlocks) {
    std::memcpy(out, in + r * row_bytes_, size_t(row_bytes_));
    return;
  }
  if (layout_.storage == Storage::kFloats) {
    const int size = traits_.block_bytes;
    for (int64_t k = 0; k < cols_; ++k)
      std::memcpy(out + k * size, in + float_place(type(), r, k) * size, size_t(size));
    return;
  }
  const bool minimum = has_minimum(type());
  const int small = small_bytes(layout_, minimum), groups_per_block = traits_.block_size / 32;
  with_block_type(type(), [&](auto block) {
    Fields fields;
    for (int64_t i = 0; i < cols_ / traits_.block_size; ++i) {
      const uint8_t* header = in + i * layout_.header_bytes;
      const uint8_t* codes = in + header_area_ + i * groups_per_block * layout_.code_bytes();
      fields.d = get_half(header, r);
      if (minimum) fields.dmin = get_half(header + 32, r);
      for (int s = 0; s < small; ++s) fields.small[s] = header[(minimum ? 64 : 32) + kLanes * s + r];
      for (int j = 0; j < groups_per_block; ++j)
        take_codes(codes + j * layout_.code_bytes(), layout_, r, fields.codes + 32 * j);
      join(fields, block);
      std::memcpy(out + i * sizeof block, &block, sizeof block);
    }
  });
}

void PackedMatrix::unpack(void* destination) const {
  auto* out = static_cast<uint8_t*>(destination);
  parallel_for(stack_ * rows_, kLanes, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) unpack_row(row % rows_, row / rows_, out + row * row_bytes_);
  });
}

void PackedMatrix::dequantize_row(int64_t row, float* out) const {
  thread_local std::vector<uint8_t> blocks;
  blocks.resize(size_t(row_bytes_));
  unpack_row(row, 0, blocks.data());
  helexa::dequantize_row(traits_, blocks.data(), cols_, out);
  if (scale() != 1.0f)
    for (int64_t i = 0; i < cols_; ++i) out[i] *= scale();
}

}  // namespace helexa
