// Reading planes (quant_planes.h) in a kernel: 16 bytes of codes at a time, and what belongs to them. The values are
// those of quant_values.h: `scale * code - minimum` in float32, each operation rounded, is the stored value bit for
// bit.
//
// The smallest piece is a Segment, 16 consecutive values of a row under one scale; segment j of a row begins at value
// 16 j. A Unit is what a thread loads at once: 16 bytes of codes wherever they lie well, which hold one to four
// segments (of K quants they are not neighbours). Units of a row are numbered from 0; neighbouring ones lie side by
// side in memory, so that a warp's loads are whole lines.
//
// All quantised types have int8 codes, those with grids too: an IQ1 value is an eighth of a whole number.
#pragma once

#include "common.cuh"
#include "quant_planes.h"
// Behind common.cuh.
#include "../quant_values.h"

namespace helexa::cuda {

// visit_type for a kernel whose matrices are of several types.
template <class Visit>
__device__ __forceinline__ bool visit_type_here(QuantType type, const Visit& visit) {
  switch (type) {
    HELEXA_PLANE_TYPES(HELEXA_VISIT)
    default:
      return false;
  }
}

using Words = Vector<uint32_t, 4>;

struct Segment {
  Words codes;           // int8: code i is byte i % 4, from the lowest, of word i / 4
  float scale, minimum;  // value i = scale * code i - minimum
};

// A field of a plane: `offset` bytes into the row.
template <class V>
__device__ __forceinline__ V load_field(const WeightPlanes& w, int plane, int64_t row, int64_t offset) {
  return load_global<V>(w.plane[plane] + row * w.pitch[plane] + offset);
}
// The same of codes: read once.
__device__ __forceinline__ Words load_codes(const WeightPlanes& w, int plane, int64_t row, int64_t offset) {
  return load_streaming<Words>(w.plane[plane] + row * w.pitch[plane] + offset);
}

// -- Four codes in a word

// Code - kBy of four unsigned codes below kBy + 128.
template <int kBy>
__device__ __forceinline__ uint32_t lowered(uint32_t codes) {
  return (codes + uint32_t(0x80 - kBy) * 0x01010101u) ^ 0x80808080u;
}
// Bit i of the lowest four as byte i.
__device__ __forceinline__ uint32_t spread_bits(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// Sixteen int8 levels as four words, and where nibbles of one word lead to in them: the low nibbles, then the high
// ones.
struct Levels {
  uint32_t first, second, third, fourth;
};
__device__ __forceinline__ Levels iq4_levels() {  // kIq4Values
  return {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
}
__device__ __forceinline__ Levels e2m1_levels() {  // kE2m1Doubled
  return {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
}

__device__ __forceinline__ uint32_t four_levels(const Levels& levels, uint32_t nibbles) {
  const uint32_t below = byte_permute(levels.first, levels.second, nibbles & 0x7777);
  const uint32_t above = byte_permute(levels.third, levels.fourth, nibbles & 0x7777);
  return byte_permute(below, above, 0x3210 | (nibbles & 0x8888) >> 1);
}
__device__ __forceinline__ uint32_t levels_of(const Levels& levels, uint32_t nibbles, bool high) {
  const uint32_t front = four_levels(levels, nibbles), back = four_levels(levels, nibbles >> 16);
  return byte_permute(front, back, high ? 0x7531 : 0x6420);
}

// Nibbles of four words, low or high ones, through `code`.
template <class Code>
__device__ __forceinline__ Words nibbles_of(const Words& words, int high, Code code) {
  Words codes;
#pragma unroll
  for (int j = 0; j < 4; ++j) codes[j] = code(words[j] >> 4 * high & 0x0f0f0f0fu, j);
  return codes;
}
__device__ __forceinline__ Words levels_of(const Levels& levels, const Words& words, int high) {
  Words codes;
#pragma unroll
  for (int j = 0; j < 4; ++j) codes[j] = levels_of(levels, words[j], high != 0);
  return codes;
}

// -- Units. kSegments: how many segments. kGroup: they are the two halves of 32 values whose scale and minimum are one,
// so that integer sums over them may be added. kMinimum: minimums are not 0. segment(): the number in its row.

template <QuantType kType>
struct Unit;

struct GroupUnit {
  static constexpr int kSegments = 2;
  static constexpr bool kGroup = true, kMinimum = false;
  __device__ static int segment(int unit, int s) { return 2 * unit + s; }
  // Which unit and which segment of it.
  __device__ static void find(int segment, int* unit, int* s) { *unit = segment / 2, *s = segment % 2; }
};

template <>
struct Unit<QuantType::Q8_0> {
  static constexpr int kSegments = 1;
  static constexpr bool kGroup = false, kMinimum = false;
  __device__ static int segment(int unit, int) { return unit; }
  __device__ static void find(int segment, int* unit, int* s) { *unit = segment, *s = 0; }
  struct Raw {
    Words codes;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<uint16_t>(w, 0, row, unit / 2 * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int) {
    return {raw.codes, float_from_half(raw.d), 0.0f};
  }
};

struct NibbleUnit : GroupUnit {  // a block of 32: d, qs
  struct Raw {
    Words codes;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<uint16_t>(w, 0, row, unit * 2)};
  }
};
template <>
struct Unit<QuantType::Q4_0> : NibbleUnit {
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    return {nibbles_of(raw.codes, s, [](uint32_t q, int) { return lowered<8>(q); }), float_from_half(raw.d), 0.0f};
  }
};
template <>
struct Unit<QuantType::IQ4_NL> : NibbleUnit {
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    return {levels_of(iq4_levels(), raw.codes, s), float_from_half(raw.d), 0.0f};
  }
};

template <>
struct Unit<QuantType::Q4_1> : GroupUnit {
  static constexpr bool kMinimum = true;
  struct Raw {
    Words codes;
    uint32_t d_m;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<uint32_t>(w, 0, row, unit * 4)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    return {nibbles_of(raw.codes, s, [](uint32_t q, int) { return q; }), float_from_half(uint16_t(raw.d_m)),
            -float_from_half(uint16_t(raw.d_m >> 16))};
  }
};

// Nibbles with a fifth bit each: bit 16 s + i of qh is value i's of half s.
__device__ __forceinline__ Words five_bits_of(const Words& words, uint32_t qh, int s) {
  return nibbles_of(words, s, [=](uint32_t q, int j) { return q | spread_bits(qh >> (16 * s + 4 * j)) << 4; });
}
template <>
struct Unit<QuantType::Q5_0> : GroupUnit {
  struct Raw {
    Words codes;
    uint32_t qh;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 2, row, unit * 16), load_field<uint32_t>(w, 1, row, unit * 4),
            load_field<uint16_t>(w, 0, row, unit * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    Words codes = five_bits_of(raw.codes, raw.qh, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) codes[j] = lowered<16>(codes[j]);
    return {codes, float_from_half(raw.d), 0.0f};
  }
};
template <>
struct Unit<QuantType::Q5_1> : GroupUnit {
  static constexpr bool kMinimum = true;
  struct Raw {
    Words codes;
    uint32_t qh, d_m;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 2, row, unit * 16), load_field<uint32_t>(w, 1, row, unit * 4),
            load_field<uint32_t>(w, 0, row, unit * 4)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    return {five_bits_of(raw.codes, raw.qh, s), float_from_half(uint16_t(raw.d_m)),
            -float_from_half(uint16_t(raw.d_m >> 16))};
  }
};

template <>
struct Unit<QuantType::MXFP4> : GroupUnit {
  struct Raw {
    Words codes;
    uint8_t e;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<uint8_t>(w, 0, row, unit)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    return {levels_of(e2m1_levels(), raw.codes, s), mxfp4_scale(raw.e), 0.0f};
  }
};
template <>
struct Unit<QuantType::NVFP4> : GroupUnit {
  static constexpr bool kGroup = false;  // a scale for 16 values
  struct Raw {
    Words codes;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<uint16_t>(w, 0, row, unit * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    const uint32_t front = s ? raw.codes[2] : raw.codes[0], back = s ? raw.codes[3] : raw.codes[1];
    const Words codes = {levels_of(e2m1_levels(), front, false), levels_of(e2m1_levels(), back, false),
                         levels_of(e2m1_levels(), front, true), levels_of(e2m1_levels(), back, true)};
    return {codes, nvfp4_scale(raw.d >> 8 * s & 255), 0.0f};
  }
};

template <>
struct Unit<QuantType::IQ4_XS> : GroupUnit {
  struct Raw {
    Words codes;
    Vector<uint32_t, 2> header;  // d, scales_h; scales_l
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<Vector<uint32_t, 2>>(w, 0, row, unit / 8 * 8)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    const int g = unit % 8;
    const int scale = (raw.header[1] >> 4 * g & 15) | (raw.header[0] >> (16 + 2 * g) & 3) << 4;
    return {levels_of(iq4_levels(), raw.codes, s), float_from_half(uint16_t(raw.header[0])) * float(scale - 32), 0.0f};
  }
};

// K quants with four bits and minimums: 16 bytes hold half h of groups 2c (low nibbles) and 2c + 1.
struct FourBitUnit {
  static constexpr int kSegments = 2;
  static constexpr bool kGroup = false, kMinimum = true;
  __device__ static int segment(int unit, int s) { return unit / 2 * 4 + 2 * s + unit % 2; }
  __device__ static void find(int segment, int* unit, int* s) {
    *unit = segment / 4 * 2 + segment % 2, *s = segment / 2 % 2;
  }
  // Scale and minimum of group g from d, dmin and six_bit_scales' twelve bytes.
  __device__ __forceinline__ static void scales(const Words& header, int g, Segment* out) {
    const int at = g % 4 * 8;
    const uint32_t first = header[1] >> at, second = header[2] >> at, third = header[3] >> at;
    const uint32_t scale = g < 4 ? first & 63 : (third & 15) | (first >> 2 & 0x30);
    const uint32_t minimum = g < 4 ? second & 63 : (third >> 4 & 15) | (second >> 2 & 0x30);
    out->scale = float_from_half(uint16_t(header[0])) * float(int(scale));
    out->minimum = float_from_half(uint16_t(header[0] >> 16)) * float(int(minimum));
  }
};
template <>
struct Unit<QuantType::Q4_K> : FourBitUnit {
  struct Raw {
    Words codes, header;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<Words>(w, 0, row, unit / 8 * 16)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    Segment out;
    out.codes = nibbles_of(raw.codes, s, [](uint32_t q, int) { return q; });
    scales(raw.header, unit % 8 / 2 * 2 + s, &out);
    return out;
  }
};
template <>
struct Unit<QuantType::Q5_K> : FourBitUnit {
  struct Raw {
    Words codes, high, header;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 2, row, unit * 16), load_field<Words>(w, 1, row, unit / 8 * 32 + unit % 2 * 16),
            load_field<Words>(w, 0, row, unit / 8 * 16)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    const int g = unit % 8 / 2 * 2 + s;
    Segment out;
    out.codes = nibbles_of(raw.codes, s, [&](uint32_t q, int j) { return q | (raw.high[j] >> g & 0x01010101u) << 4; });
    scales(raw.header, g, &out);
    return out;
  }
};

// 16 bytes of ql hold half h of groups 4H + p (low nibbles) and 4H + p + 2; unit 8 block + 4H + 2p + h.
template <>
struct Unit<QuantType::Q6_K> {
  static constexpr int kSegments = 2;
  static constexpr bool kGroup = false, kMinimum = false;
  __device__ static int segment(int unit, int s) { return unit / 4 * 8 + unit % 4 + 4 * s; }
  __device__ static void find(int segment, int* unit, int* s) {
    *unit = segment / 8 * 4 + segment % 4, *s = segment / 4 % 2;
  }
  struct Raw {
    Words low, high;
    int8_t scales[2];
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, half = unit / 4 % 2, scale = segment(unit, 0);
    return {load_codes(w, 0, row, unit * 16),
            load_field<Words>(w, 1, row, block * 64 + half * 32 + unit % 2 * 16),
            {load_field<int8_t>(w, 2, row, scale), load_field<int8_t>(w, 2, row, scale + 4)},
            load_field<uint16_t>(w, 3, row, block * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    const int shift = unit / 2 % 2 * 2 + 4 * s;
    const Words codes = nibbles_of(
        raw.low, s, [&](uint32_t q, int j) { return lowered<32>(q | (raw.high[j] >> shift & 0x03030303u) << 4); });
    return {codes, float_from_half(raw.d) * float(s ? raw.scales[1] : raw.scales[0]), 0.0f};
  }
};

// Types of two bits: 16 bytes of qs hold half h of groups 4H to 4H + 3; unit 4 block + 2H + h.
struct TwoBitUnit {
  static constexpr int kSegments = 4;
  static constexpr bool kGroup = false, kMinimum = false;
  __device__ static int segment(int unit, int s) { return unit / 2 * 8 + unit % 2 + 2 * s; }
  __device__ static void find(int segment, int* unit, int* s) {
    *unit = segment / 8 * 2 + segment % 2, *s = segment / 2 % 4;
  }
  // Byte 2s + h of eight.
  __device__ static int byte_of(const Vector<uint32_t, 2>& bytes, int unit, int s) {
    return int((s / 2 ? bytes[1] : bytes[0]) >> (s % 2 * 16 + unit % 2 * 8) & 255);
  }
};
template <>
struct Unit<QuantType::Q2_K> : TwoBitUnit {
  static constexpr bool kMinimum = true;
  struct Raw {
    Words codes;
    Vector<uint32_t, 2> scales;
    uint32_t d_dmin;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 1, row, unit * 16), load_field<Vector<uint32_t, 2>>(w, 0, row, unit / 2 * 8),
            load_field<uint32_t>(w, 2, row, unit / 4 * 4)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    const int scale = byte_of(raw.scales, unit, s);
    Segment out;
#pragma unroll
    for (int j = 0; j < 4; ++j) out.codes[j] = raw.codes[j] >> 2 * s & 0x03030303u;
    out.scale = float_from_half(uint16_t(raw.d_dmin)) * float(scale & 15);
    out.minimum = float_from_half(uint16_t(raw.d_dmin >> 16)) * float(scale >> 4);
    return out;
  }
};
template <>
struct Unit<QuantType::Q3_K> : TwoBitUnit {
  struct Raw {
    Words codes, mask;
    Vector<uint32_t, 2> low;  // eight of the scales' bytes, then the four with the high bits
    uint32_t high;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 4;
    const auto scales = [&](int i) { return load_field<uint32_t>(w, 2, row, block * 12 + 4 * i); };
    return {load_codes(w, 1, row, unit * 16),
            load_field<Words>(w, 0, row, block * 32 + unit % 2 * 16),
            {scales(0), scales(1)},
            scales(2),
            load_field<uint16_t>(w, 3, row, block * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int unit, int s) {
    const int half = unit / 2 % 2;
    const int low = byte_of(raw.low, unit, s) >> 4 * half & 15;
    const int high = int(raw.high >> ((s % 2 * 2 + unit % 2) * 8 + 2 * (2 * half + s / 2)) & 3);
    Segment out;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out.codes[j] =
          lowered<4>((raw.codes[j] >> 2 * s & 0x03030303u) | (raw.mask[j] >> (4 * half + s) & 0x01010101u) << 2);
    out.scale = float_from_half(raw.d) * float((low | high << 4) - 32), out.minimum = 0.0f;
    return out;
  }
};
template <>
struct Unit<QuantType::TQ2_0> : TwoBitUnit {
  struct Raw {
    Words codes;
    uint16_t d;
  };
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return {load_codes(w, 0, row, unit * 16), load_field<uint16_t>(w, 1, row, unit / 4 * 2)};
  }
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) {
    Segment out;
#pragma unroll
    for (int j = 0; j < 4; ++j) out.codes[j] = lowered<1>(raw.codes[j] >> 2 * s & 0x03030303u);
    out.scale = float_from_half(raw.d), out.minimum = 0.0f;
    return out;
  }
};

// The rest decode 32 values as they load them.
struct DecodedUnit : GroupUnit {
  static constexpr bool kGroup = false;
  struct Raw {
    Segment first, second;
  };
  __device__ __forceinline__ static Segment decode(const Raw& raw, int, int s) { return s ? raw.second : raw.first; }
};
template <>
struct Unit<QuantType::Q1_0> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const uint32_t bits = load_field<uint32_t>(w, 1, row, unit * 4);
    const float scale = float_from_half(load_field<uint16_t>(w, 0, row, unit / 4 * 2));
    Raw raw = {{{}, scale, 0.0f}, {{}, scale, 0.0f}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw.first.codes[j] = lowered<1>(spread_bits(bits >> 4 * j) << 1);
      raw.second.codes[j] = lowered<1>(spread_bits(bits >> (16 + 4 * j)) << 1);
    }
    return raw;
  }
};

// ternary() of four bytes.
__device__ __forceinline__ uint32_t four_ternary(uint32_t bytes, int digit) {
  const uint32_t power = uint32_t(power_of_three(digit));
  const uint32_t even = ((bytes & 0x00ff00ffu) * power & 0x00ff00ffu) * 3 >> 8 & 0x00030003u;
  const uint32_t odd = ((bytes >> 8 & 0x00ff00ffu) * power & 0x00ff00ffu) * 3 >> 8 & 0x00030003u;
  return lowered<1>(even | odd << 8);
}
template <>
struct Unit<QuantType::TQ1_0> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const float scale = float_from_half(load_field<uint16_t>(w, 2, row, block * 2));
    const int64_t qs = int64_t(block) * 48;
    const Words front = load_field<Words>(w, 0, row, qs + (g < 5 ? 0 : 32));
    const Words back = load_field<Words>(w, 0, row, qs + (g < 5 ? 16 : 32));
    const uint32_t qh = load_field<uint32_t>(w, 1, row, block * 4);
    Raw raw = {{{}, scale, 0.0f}, {{}, scale, 0.0f}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw.first.codes[j] = four_ternary(front[j], g < 5 ? g : 2 * (g - 5));
      raw.second.codes[j] = four_ternary(g < 7 ? back[j] : qh, g < 5 ? g : g < 7 ? 2 * (g - 5) + 1 : j);
    }
    return raw;
  }
};

// Types with grids: the members of their blocks as pointers into the planes, for quant_values.h.
template <class Qs>
struct GridBlock {
  half_bits d;
  const Qs* qs;
  const uint8_t *qh, *signs, *scales;
};
template <class T>
__device__ __forceinline__ const T* field_of(const WeightPlanes& w, int plane, int64_t row, int64_t offset) {
  return reinterpret_cast<const T*>(w.plane[plane] + row * w.pitch[plane] + offset);
}

// Four components of a vector, negated where their bits of the signs are set; no component is 0, so nothing carries.
__device__ __forceinline__ uint32_t signed_components(uint32_t components, int signs) {
  const uint32_t negative = spread_bits(uint32_t(signs));
  return (components ^ negative * 255u) + negative;
}
// 8 * (component + shift) for components -1, 0 and 1 and a shift of an eighth up or down.
__device__ __forceinline__ uint32_t shifted_components(uint32_t components, float shift) {
  const uint32_t eightfold = components << 3 & 0xf8f8f8f8u;
  if (shift > 0.0f) return eightfold | 0x01010101u;
  return ((eightfold | 0x80808080u) - 0x01010101u) ^ (~eightfold & 0x80808080u);
}

template <class Vectors>  // (half of the group, 0 or 1, and the vector of eight within it, 0 or 1) -> GridVector
__device__ __forceinline__ DecodedUnit::Raw eights(Vectors vectors, bool shifted) {
  Segment halves[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const GridVector vector = vectors(s, v);
      const uint32_t low = uint32_t(vector.components), high = uint32_t(vector.components >> 32);
      halves[s].codes[2 * v] = shifted ? shifted_components(low, vector.shift) : signed_components(low, vector.signs);
      halves[s].codes[2 * v + 1] =
          shifted ? shifted_components(high, vector.shift) : signed_components(high, vector.signs >> 4);
      halves[s].scale = shifted ? vector.scale * 0.125f : vector.scale;
    }
    halves[s].minimum = 0.0f;
  }
  return {halves[0], halves[1]};
}
template <class Vectors>  // (half, vector of four within it, 0 to 3) -> GridVector
__device__ __forceinline__ DecodedUnit::Raw fours(Vectors vectors) {
  Segment halves[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const GridVector vector = vectors(s, v);
      halves[s].codes[v] = signed_components(uint32_t(vector.components), vector.signs);
      halves[s].scale = vector.scale;
    }
    halves[s].minimum = 0.0f;
  }
  return {halves[0], halves[1]};
}

template <>
struct Unit<QuantType::IQ2_XXS> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const GridBlock<uint16_t> b = {load_field<uint16_t>(w, 0, row, block * 2),
                                   field_of<uint16_t>(w, 1, row, int64_t(block) * 64), nullptr, nullptr, nullptr};
    return eights([&](int s, int v) { return iq2_xxs_vector(b, 4 * g + 2 * s + v); }, false);
  }
};
template <>
struct Unit<QuantType::IQ2_XS> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const GridBlock<uint16_t> b = {load_field<uint16_t>(w, 0, row, block * 2),
                                   field_of<uint16_t>(w, 1, row, int64_t(block) * 64), nullptr, nullptr,
                                   field_of<uint8_t>(w, 2, row, block * 8)};
    return eights([&](int s, int v) { return iq2_xs_vector(b, 4 * g + 2 * s + v); }, false);
  }
};
template <>
struct Unit<QuantType::IQ2_S> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const GridBlock<uint8_t> b = {load_field<uint16_t>(w, 0, row, block * 2), field_of<uint8_t>(w, 1, row, block * 32),
                                  field_of<uint8_t>(w, 3, row, block * 8), field_of<uint8_t>(w, 2, row, block * 32),
                                  field_of<uint8_t>(w, 4, row, block * 8)};
    return eights([&](int s, int v) { return iq2_s_vector(b, 4 * g + 2 * s + v); }, false);
  }
};
struct Iq3XxsBlock {
  half_bits d;
  const uint8_t *qs, *signs_scale;
};
template <>
struct Unit<QuantType::IQ3_XXS> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const Iq3XxsBlock b = {load_field<uint16_t>(w, 0, row, block * 2),
                           field_of<uint8_t>(w, 1, row, int64_t(block) * 64), field_of<uint8_t>(w, 2, row, block * 32)};
    return fours([&](int s, int v) { return iq3_xxs_vector(b, 8 * g + 4 * s + v); });
  }
};
template <>
struct Unit<QuantType::IQ3_S> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const GridBlock<uint8_t> b = {load_field<uint16_t>(w, 0, row, block * 2),
                                  field_of<uint8_t>(w, 1, row, int64_t(block) * 64),
                                  field_of<uint8_t>(w, 2, row, block * 8), field_of<uint8_t>(w, 3, row, block * 32),
                                  field_of<uint8_t>(w, 4, row, block * 4)};
    return fours([&](int s, int v) { return iq3_s_vector(b, 8 * g + 4 * s + v); });
  }
};
struct Iq1Block {
  half_bits d;
  const uint8_t* qs;
  const uint16_t* qh;
};
template <>
struct Unit<QuantType::IQ1_S> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const Iq1Block b = {load_field<uint16_t>(w, 0, row, block * 2), field_of<uint8_t>(w, 1, row, block * 32),
                        field_of<uint16_t>(w, 2, row, block * 16)};
    return eights([&](int s, int v) { return iq1_s_vector(b, 4 * g + 2 * s + v); }, true);
  }
};
struct Iq1MBlock {
  const uint8_t *qs, *qh;
  const uint16_t* scales;
};
template <>
struct Unit<QuantType::IQ1_M> : DecodedUnit {
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    const int block = unit / 8, g = unit % 8;
    const Iq1MBlock b = {field_of<uint8_t>(w, 0, row, block * 32), field_of<uint8_t>(w, 1, row, block * 16),
                         field_of<uint16_t>(w, 2, row, block * 8)};
    return eights([&](int s, int v) { return iq1_m_vector(b, 4 * g + 2 * s + v); }, true);
  }
};

// -- Single segments, and groups of 32 values, for who does not walk over whole rows.

template <QuantType kType>
__device__ __forceinline__ Segment load_segment(const WeightPlanes& w, int64_t row, int segment) {
  int unit, s;
  Unit<kType>::find(segment, &unit, &s);
  return Unit<kType>::decode(Unit<kType>::load(w, row, unit), unit, s);
}

struct Group {
  Segment half[2];
};
template <QuantType kType>
__device__ __forceinline__ Group load_group(const WeightPlanes& w, int64_t row, int group) {
  using U = Unit<kType>;
  Group out;
  if constexpr (std::is_base_of_v<GroupUnit, U>) {
    const auto raw = U::load(w, row, group);
    out.half[0] = U::decode(raw, group, 0), out.half[1] = U::decode(raw, group, 1);
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) out.half[h] = load_segment<kType>(w, row, 2 * group + h);
  }
  return out;
}

// Value i of a segment, bit for bit as stored.
__device__ __forceinline__ float value_of(const Segment& segment, int i) {
  const int code = int8_t(segment.codes[i / 4] >> i % 4 * 8);
  return subtract_rounded(multiply_rounded(segment.scale, float(code)), segment.minimum);
}

// -- Numbers. A unit is 16 bytes of them; beyond a row's end they are 0 up to the pitch.

template <QuantType kType>
constexpr bool kIsNumber =
    kType == QuantType::F32 || kType == QuantType::F16 || kType == QuantType::BF16 || kType == QuantType::I8;

template <QuantType kType>
struct NumberUnit {
  static constexpr int kValues = 16 / block_fields(kType).block_bytes;
  __device__ __forceinline__ static Words load(const WeightPlanes& w, int64_t row, int unit) {
    return load_codes(w, 0, row, int64_t(unit) * 16);
  }
  __device__ __forceinline__ static float value(const Words& words, int i) {
    if constexpr (kType == QuantType::F32) return bit_cast<float>(words[i]);
    if constexpr (kType == QuantType::F16) return float_from_half(uint16_t(words[i / 2] >> i % 2 * 16));
    if constexpr (kType == QuantType::BF16)
      return bit_cast<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    if constexpr (kType == QuantType::I8) return float(int8_t(words[i / 4] >> i % 4 * 8));
  }
};

}  // namespace helexa::cuda
