// How a type's planes become eight vectors of codes, and its header scales and minimums, over `Lanes`.
// Included by quant_dot_kernels.h, inside its unnamed namespace.

inline void load_8_bits(const uint8_t* p, B* w) {
  for (int j = 0; j < 8; ++j) w[j] = Lanes::load_bytes(p + 64 * j);
}
inline void load_4_bits(const uint8_t* p, B* w) {
#pragma GCC unroll Lanes::kUnroll
  for (int j = 0; j < 4; ++j) {
    const B v = Lanes::load_bytes(p + 64 * j);
    w[j] = Lanes::bits<0>(v, 15), w[j + 4] = Lanes::bits<-4>(v, 15);
  }
}
template <int kTo>  // bit where the plane's lowest bit lands
inline void load_2_bits(const uint8_t* p, B* w) {
#pragma GCC unroll Lanes::kUnroll
  for (int v = 0; v < 2; ++v) {
    const B x = Lanes::load_bytes(p + 64 * v);
    w[4 * v] = Lanes::bits<kTo>(x, 3 << kTo), w[4 * v + 1] = Lanes::bits<kTo - 2>(x, 3 << kTo);
    w[4 * v + 2] = Lanes::bits<kTo - 4>(x, 3 << kTo), w[4 * v + 3] = Lanes::bits<kTo - 6>(x, 3 << kTo);
  }
}
template <int kTo>
inline void add_1_bit(const uint8_t* p, B* w) {
  const B x = Lanes::load_bytes(p);
  w[0] = Lanes::either(w[0], Lanes::bits<kTo>(x, 1 << kTo));
  w[1] = Lanes::either(w[1], Lanes::bits<kTo - 1>(x, 1 << kTo));
  w[2] = Lanes::either(w[2], Lanes::bits<kTo - 2>(x, 1 << kTo));
  w[3] = Lanes::either(w[3], Lanes::bits<kTo - 3>(x, 1 << kTo));
  w[4] = Lanes::either(w[4], Lanes::bits<kTo - 4>(x, 1 << kTo));
  w[5] = Lanes::either(w[5], Lanes::bits<kTo - 5>(x, 1 << kTo));
  w[6] = Lanes::either(w[6], Lanes::bits<kTo - 6>(x, 1 << kTo));
  w[7] = Lanes::either(w[7], Lanes::bits<kTo - 7>(x, 1 << kTo));
}

// kSubs: scales for 32 columns. kOffset: log2 of what the codes are too large by, -1 for none. kWide: 8-bit codes.
template <QuantType kType, int kBlockSize, int kSubs_, bool kMinimum_, int kOffset_, bool kWide_ = false>
struct CodeBase {
  static constexpr int kBlock = kBlockSize, kSubs = kSubs_, kOffset = kOffset_;
  static constexpr bool kMinimum = kMinimum_, kWide = kWide_;
  static constexpr int kHeader = packed_layout(kType).header_bytes, kCodeBytes = packed_layout(kType).code_bytes();
  static constexpr int kMaxCode =
      kWide ? 255 : (1 << (packed_layout(kType).base_bits + packed_layout(kType).high_bits)) - 1;
};

template <class Base>
struct ScaleOnly : Base {  // 32 columns, float16 scale
  static void scales(const uint8_t* header, int, F* s, F*) { s[0] = Lanes::load_half(header); }
};
template <class Base>
struct ScaleAndOffset : Base {  // 32 columns, value = scale * code + m: a minimum of -m
  static void scales(const uint8_t* header, int, F* s, F* m) {
    s[0] = Lanes::load_half(header);
    m[0] = Lanes::mul(Lanes::load_half(header + 32), Lanes::splat(-1.0f));
  }
};

struct CodesQ8_0 : ScaleOnly<CodeBase<QuantType::Q8_0, 32, 1, false, 7, true>> {
  static void codes(const uint8_t* p, B* w) { load_8_bits(p, w); }
};
struct CodesQ4_0 : ScaleOnly<CodeBase<QuantType::Q4_0, 32, 1, false, 3>> {
  static void codes(const uint8_t* p, B* w) { load_4_bits(p, w); }
};
struct CodesQ4_1 : ScaleAndOffset<CodeBase<QuantType::Q4_1, 32, 1, true, -1>> {
  static void codes(const uint8_t* p, B* w) { load_4_bits(p, w); }
};
inline void load_5_bits(const uint8_t* p, B* w) { load_4_bits(p, w), add_1_bit<4>(p + 256, w); }
struct CodesQ5_0 : ScaleOnly<CodeBase<QuantType::Q5_0, 32, 1, false, 4>> {
  static void codes(const uint8_t* p, B* w) { load_5_bits(p, w); }
};
struct CodesQ5_1 : ScaleAndOffset<CodeBase<QuantType::Q5_1, 32, 1, true, -1>> {
  static void codes(const uint8_t* p, B* w) { load_5_bits(p, w); }
};

// 4-bit codes stand for 16 levels, raised by 128 to be unsigned.
struct LevelTable {
  uint8_t v[16];
  constexpr LevelTable() : v() {
    for (int i = 0; i < 16; ++i) v[i] = uint8_t(kIq4Values[i] + 128);
  }
};
constexpr LevelTable kLevels;
inline void load_levels(const uint8_t* p, B* w) {
  load_4_bits(p, w);
  for (int j = 0; j < 8; ++j) w[j] = Lanes::lookup(kLevels.v, w[j]);
}
struct CodesIQ4_NL : ScaleOnly<CodeBase<QuantType::IQ4_NL, 32, 1, false, 7, true>> {
  static void codes(const uint8_t* p, B* w) { load_levels(p, w); }
};
struct CodesIQ4_XS : CodeBase<QuantType::IQ4_XS, 256, 1, false, 7, true> {
  static void codes(const uint8_t* p, B* w) { load_levels(p, w); }
  static void scales(const uint8_t* header, int g, F* s, F*) {
    s[0] = Lanes::mul(Lanes::load_half(header), Lanes::load_i8(header + 32 + 16 * g));
  }
};

template <QuantType kType>
struct ScalesWithMinimums : CodeBase<kType, 256, 1, true, -1> {
  static void scales(const uint8_t* header, int g, F* s, F* m) {
    const uint8_t* small = header + 64 + 32 * g;
    s[0] = Lanes::mul(Lanes::load_half(header), Lanes::load_u8(small));
    m[0] = Lanes::mul(Lanes::load_half(header + 32), Lanes::load_u8(small + 16));
  }
};
struct CodesQ4_K : ScalesWithMinimums<QuantType::Q4_K> {
  static void codes(const uint8_t* p, B* w) { load_4_bits(p, w); }
};
struct CodesQ5_K : ScalesWithMinimums<QuantType::Q5_K> {
  static void codes(const uint8_t* p, B* w) { load_5_bits(p, w); }
};

template <QuantType kType, int kOffset>
struct SignedScales : CodeBase<kType, 256, 2, false, kOffset> {
  static void scales(const uint8_t* header, int g, F* s, F*) {
    const F d = Lanes::load_half(header);
    s[0] = Lanes::mul(d, Lanes::load_i8(header + 32 + 32 * g));
    s[1] = Lanes::mul(d, Lanes::load_i8(header + 48 + 32 * g));
  }
};
struct CodesQ6_K : SignedScales<QuantType::Q6_K, 5> {
  static void codes(const uint8_t* p, B* w) {
    B high[8];
    load_4_bits(p, w), load_2_bits<4>(p + 256, high);
    for (int j = 0; j < 8; ++j) w[j] = Lanes::either(w[j], high[j]);
  }
};
struct CodesQ3_K : SignedScales<QuantType::Q3_K, 2> {
  static void codes(const uint8_t* p, B* w) { load_2_bits<0>(p, w), add_1_bit<2>(p + 128, w); }
};
struct CodesQ2_K : CodeBase<QuantType::Q2_K, 256, 2, true, -1> {
  static void codes(const uint8_t* p, B* w) { load_2_bits<0>(p, w); }
  static void scales(const uint8_t* header, int g, F* s, F* m) {
    const F d = Lanes::load_half(header), dmin = Lanes::load_half(header + 32);
    for (int i = 0; i < 2; ++i) {
      const uint8_t* both = header + 64 + 32 * g + 16 * i;
      s[i] = Lanes::mul(d, Lanes::load_low_nibble(both));
      m[i] = Lanes::mul(dmin, Lanes::load_high_nibble(both));
    }
  }
};
