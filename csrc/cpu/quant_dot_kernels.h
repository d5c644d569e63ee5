// The kernels of quant_dot.h written once over `Lanes` (16 rows side by side). Every level's .cpp file includes its
// lanes_*.h and then this, both inside an unnamed namespace: code built with different -m flags must never be shared.

inline constexpr int div_up(int64_t a, int b) { return int((a + b - 1) / b); }

// --- Codes: how a type's planes become eight vectors of codes, and its header scales and minimums -------------------

using B = Lanes::B;
using F = Lanes::F;
using I = Lanes::I;

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

// --- The dot product of 32 columns ----------------------------------------------------------------------------------

template <class Code>
inline I start_sum(const ActivationChunk& x, int g, int sub) {
  if constexpr (Code::kOffset < 0 || (Code::kWide && Lanes::kWideDotRemovesOffset)) {
    return Lanes::izero();
  } else {
    return Lanes::splat_shifted(Code::kSubs == 1 ? x.negative_sum_32[g] : x.negative_sum_16[2 * g + sub],
                                Code::kOffset);
  }
}

template <class Code>
inline I dot(I sum, B codes, Lanes::X x) {
  return Code::kWide ? Lanes::dot_wide(sum, codes, x) : Lanes::dot(sum, codes, x);
}

// Whether a level that adds pairs of products in 16 bits first may sum all quads of a scale so before it widens them.
template <class Code, class L>
constexpr bool kSumsNarrow = L::kNarrowSums && 8 / Code::kSubs * 2 * 127 * Code::kMaxCode <= 32767;

// sum + the dot products of kQuads consecutive quads.
template <class Code, class L = Lanes>
inline I dots(I sum, const B* codes, const int8_t* q) {
  constexpr int kQuads = 8 / Code::kSubs;
  if constexpr (kSumsNarrow<Code, L>) {
    B narrow = L::products(codes[0], L::quad(q));
#pragma GCC unroll Lanes::kUnroll
    for (int j = 1; j < kQuads; ++j) narrow = L::add_narrow(narrow, L::products(codes[j], L::quad(q + 4 * j)));
    return L::add_widened(sum, narrow);
  } else {
#pragma GCC unroll Lanes::kUnroll
    for (int j = 0; j < kQuads; ++j) sum = dot<Code>(sum, codes[j], Lanes::quad(q + 4 * j));
    return sum;
  }
}

// The float order of every path: scaled integers first to last, each followed by its minimum.
template <class Code>
inline F accumulate(F total, I sum, F scale, F minimum, const ActivationChunk& x, int g, int sub) {
  total = Lanes::fma(Lanes::mul(Lanes::to_float(sum), scale), Lanes::splat(x.scale[g]), total);
  if constexpr (Code::kMinimum) {
    const float t = Code::kSubs == 1 ? x.negative_total_32[g] : x.negative_total_16[2 * g + sub];
    total = Lanes::fma(minimum, Lanes::splat(t), total);
  }
  return total;
}

template <class Code>
inline const uint8_t* header_of(const uint8_t* group, int64_t index) {
  return group + index / (Code::kBlock / 32) * Code::kHeader;
}

// Weights stream from memory once a token, so the distance between a prefetch and its use is what fills the bus. It
// runs straight through headers and codes into the next group, which follows in memory and is computed next.
constexpr int kPrefetchBytes = 8192;
inline void prefetch(const uint8_t* p, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + kPrefetchBytes + line, 0, 3);
}

template <class Code, int kRows>
void matvec_rows(const uint8_t* group, int64_t header_area, int64_t cols, const ActivationChunk* x,
                 int64_t chunk_stride, float* sums) {
  constexpr int kQuads = 8 / Code::kSubs;
  constexpr int kBytes = Code::kCodeBytes + Code::kHeader / (Code::kBlock / 32);  // of 32 columns
  const uint8_t* p = group + header_area;
  const uint8_t* ahead = group;
  F total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = Lanes::zero();
  const int64_t groups = cols / 32;
  for (int64_t i = 0; i < groups; ++i, p += Code::kCodeBytes, ahead += kBytes) {
    prefetch(ahead, kBytes);
    const int g = int(i % kChunkGroups);
    const ActivationChunk* chunk = x + i / kChunkGroups * chunk_stride;
    B w[8];
    F scale[2], minimum[2] = {Lanes::zero(), Lanes::zero()};
    Code::codes(p, w);
    Code::scales(header_of<Code>(group, i), g, scale, minimum);
#pragma GCC unroll Lanes::kUnroll
    for (int r = 0; r < kRows; ++r) {
      const ActivationChunk& xr = chunk[r];
#pragma GCC unroll Lanes::kUnroll
      for (int sub = 0; sub < Code::kSubs; ++sub) {
        const int first = sub * kQuads;
        const I sum = dots<Code>(start_sum<Code>(xr, g, sub), w + first, xr.q + 32 * g + 4 * first);
        total[r] = accumulate<Code>(total[r], sum, scale[sub], minimum[sub], xr, g, sub);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) Lanes::store(sums + r * kSumStride, total[r]);
}

template <class Code>
void matvec(const uint8_t* group, int64_t header_area, int64_t cols, const ActivationChunk* x, int64_t chunk_stride,
            int rows, float* sums) {
  int r = 0;
  if constexpr (Lanes::kTileRows == 1) {
    for (; r < rows; ++r) matvec_rows<Code, 1>(group, header_area, cols, x + r, chunk_stride, sums + r * kSumStride);
    return;
  }
  for (; r + 4 <= rows; r += 4)
    matvec_rows<Code, 4>(group, header_area, cols, x + r, chunk_stride, sums + r * kSumStride);
  if (r + 2 <= rows) {
    matvec_rows<Code, 2>(group, header_area, cols, x + r, chunk_stride, sums + r * kSumStride);
    r += 2;
  }
  if (r < rows) matvec_rows<Code, 1>(group, header_area, cols, x + r, chunk_stride, sums + r * kSumStride);
}

template <class Code>
void unpack(const uint8_t* group, int64_t header_area, int64_t chunk, int groups, UnpackedGroup* out) {
  for (int g = 0; g < groups; ++g, ++out) {
    const int64_t index = chunk * kChunkGroups + g;
    B w[8];
    F scale[2], minimum[2];
    Code::codes(group + header_area + index * Code::kCodeBytes, w);
    Code::scales(header_of<Code>(group, index), g, scale, minimum);
    for (int j = 0; j < 8; ++j) Lanes::store_bytes(out->codes + 64 * j, w[j]);
    for (int sub = 0; sub < Code::kSubs; ++sub) {
      Lanes::store(out->scale[sub], scale[sub]);
      if constexpr (Code::kMinimum) Lanes::store(out->minimum[sub], minimum[sub]);
    }
  }
}

template <class Code, int kGroups, int kRows, class L = Lanes>
inline void register_tile(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x,
                          float* sums) {
  constexpr int kQuads = 8 / Code::kSubs;
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::load(sums + r * kSumStride + n * kLanes);
  for (int g = 0; g < groups; ++g) {
    const UnpackedGroup* w[2] = {a + g, b + g};
#pragma GCC unroll Lanes::kUnroll
    for (int sub = 0; sub < Code::kSubs; ++sub) {
      I sum[kRows][kGroups];
      if constexpr (kSumsNarrow<Code, L>) {
        B narrow[kRows][kGroups];
#pragma GCC unroll Lanes::kUnroll
        for (int j = sub * kQuads; j < (sub + 1) * kQuads; ++j) {
          for (int n = 0; n < kGroups; ++n) {
            const B codes = L::load_bytes(w[n]->codes + 64 * j);
#pragma GCC unroll Lanes::kUnroll
            for (int r = 0; r < kRows; ++r) {
              const B four = L::products(codes, L::quad(x[r].q + 32 * g + 4 * j));
              narrow[r][n] = j == sub * kQuads ? four : L::add_narrow(narrow[r][n], four);
            }
          }
        }
#pragma GCC unroll Lanes::kUnroll
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kGroups; ++n) sum[r][n] = L::add_widened(start_sum<Code>(x[r], g, sub), narrow[r][n]);
      } else {
#pragma GCC unroll Lanes::kUnroll
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kGroups; ++n) sum[r][n] = start_sum<Code>(x[r], g, sub);
#pragma GCC unroll Lanes::kUnroll
        for (int j = sub * kQuads; j < (sub + 1) * kQuads; ++j) {
          B codes[kGroups];
          for (int n = 0; n < kGroups; ++n) codes[n] = Lanes::load_bytes(w[n]->codes + 64 * j);
#pragma GCC unroll Lanes::kUnroll
          for (int r = 0; r < kRows; ++r) {
            const Lanes::X quad = Lanes::quad(x[r].q + 32 * g + 4 * j);
            for (int n = 0; n < kGroups; ++n) sum[r][n] = dot<Code>(sum[r][n], codes[n], quad);
          }
        }
      }
#pragma GCC unroll Lanes::kUnroll
      for (int n = 0; n < kGroups; ++n) {
        const F scale = Lanes::load(w[n]->scale[sub]);
        const F minimum = Code::kMinimum ? Lanes::load(w[n]->minimum[sub]) : Lanes::zero();
#pragma GCC unroll Lanes::kUnroll
        for (int r = 0; r < kRows; ++r)
          total[r][n] = accumulate<Code>(total[r][n], sum[r][n], scale, minimum, x[r], g, sub);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) Lanes::store(sums + r * kSumStride + n * kLanes, total[r][n]);
}

template <class Code, int kGroups>
void tile_rows(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows,
               float* sums) {
  constexpr int kStep = Lanes::kTileRows;
  int r = 0;
  for (; r + kStep <= rows; r += kStep) register_tile<Code, kGroups, kStep>(a, b, groups, x + r, sums + r * kSumStride);
  if constexpr (kStep > 2) {
    for (; r + 2 <= rows; r += 2) register_tile<Code, kGroups, 2>(a, b, groups, x + r, sums + r * kSumStride);
  }
  for (; r < rows; ++r) register_tile<Code, kGroups, 1>(a, b, groups, x + r, sums + r * kSumStride);
}

template <class Code>
void tile(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows, float* sums) {
  if (b) {
    tile_rows<Code, 2>(a, b, groups, x, rows, sums);
  } else {
    tile_rows<Code, 1>(a, a, groups, x, rows, sums);
  }
}

// A tile sees only what an unpacked group holds, so types that agree in these share its code.
template <int kSubs_, bool kMinimum_, int kOffset_, bool kWide_, int kMaxCode_>
struct TileCode {
  static constexpr int kSubs = kSubs_, kOffset = kOffset_, kMaxCode = kMaxCode_;
  static constexpr bool kMinimum = kMinimum_, kWide = kWide_;
};

template <class Code>
const CodeKernels* kernels_of() {
  // Where sums are wide from the start, the size of the codes makes no difference.
  constexpr int kMaxCode = Lanes::kNarrowSums ? Code::kMaxCode : 0;
  using Tile = TileCode<Code::kSubs, Code::kMinimum, Code::kOffset, Code::kWide, kMaxCode>;
  static constexpr CodeKernels kernels = {matvec<Code>, unpack<Code>, tile<Tile>};
  return &kernels;
}

const CodeKernels* codes(QuantType type) {
  switch (type) {
    case QuantType::Q8_0:
      return kernels_of<CodesQ8_0>();
    case QuantType::Q4_0:
      return kernels_of<CodesQ4_0>();
    case QuantType::Q4_1:
      return kernels_of<CodesQ4_1>();
    case QuantType::Q5_0:
      return kernels_of<CodesQ5_0>();
    case QuantType::Q5_1:
      return kernels_of<CodesQ5_1>();
    case QuantType::Q2_K:
      return kernels_of<CodesQ2_K>();
    case QuantType::Q3_K:
      return kernels_of<CodesQ3_K>();
    case QuantType::Q4_K:
      return kernels_of<CodesQ4_K>();
    case QuantType::Q5_K:
      return kernels_of<CodesQ5_K>();
    case QuantType::Q6_K:
      return kernels_of<CodesQ6_K>();
    case QuantType::IQ4_NL:
      return kernels_of<CodesIQ4_NL>();
    case QuantType::IQ4_XS:
      return kernels_of<CodesIQ4_XS>();
    default:
      return nullptr;
  }
}

// --- Float weights --------------------------------------------------------------------------------------------------

// A step multiplies what stands side by side in a packed group: a column of F32 or F16, a pair of columns of BF16.
template <QuantType kType>
struct FloatStep {
  static constexpr int kColumns = kType == QuantType::BF16 ? 2 : 1;
  static constexpr int kBytes = kType == QuantType::F16 ? 32 : 64;  // of 16 rows
  static F load(const uint8_t* w) {
    if constexpr (kType == QuantType::F16) return Lanes::load_half(w);
    return Lanes::load(reinterpret_cast<const float*>(w));
  }
  static F multiply_add(F weight, const FloatChunk& x, int step, F total) {
    return Lanes::fma(weight, Lanes::splat(x.x[step]), total);
  }
};
template <>
struct FloatStep<QuantType::BF16> {
  static constexpr int kColumns = 2, kBytes = 64;
  static B load(const uint8_t* w) { return Lanes::load_bytes(w); }
  static F multiply_add(const B& weights, const FloatChunk& x, int step, F total) {
    return Lanes::dot_bfloat16(total, weights, Lanes::quad(reinterpret_cast<const int8_t*>(x.rounded + 2 * step)));
  }
};

// kSwapped: of each two steps the second first.
template <QuantType kType, int kGroups, int kRows, bool kSwapped = false>
inline void float_register_tile(const uint8_t* a, const uint8_t* b, int depth, const FloatChunk* x, float* sums) {
  using Step = FloatStep<kType>;
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::load(sums + r * kSumStride + n * kLanes);
  const uint8_t* w[2] = {a, b};
  const int steps = div_up(depth, Step::kColumns);
  for (int i = 0; i < steps; ++i) {
    const int k = kSwapped ? i ^ 1 : i;
    decltype(Step::load(a)) weight[kGroups];
    for (int n = 0; n < kGroups; ++n) weight[n] = Step::load(w[n] + k * Step::kBytes);
#pragma GCC unroll Lanes::kUnroll
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kGroups; ++n) total[r][n] = Step::multiply_add(weight[n], x[r], k, total[r][n]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) Lanes::store(sums + r * kSumStride + n * kLanes, total[r][n]);
}

template <QuantType kType, int kGroups>
void float_tile_rows(const uint8_t* a, const uint8_t* b, int depth, const FloatChunk* x, int rows, float* sums) {
  constexpr int kStep = Lanes::kFloatTileRows;
  int r = 0;
  for (; r + kStep <= rows; r += kStep)
    float_register_tile<kType, kGroups, kStep>(a, b, depth, x + r, sums + r * kSumStride);
  for (; r < rows; ++r) float_register_tile<kType, kGroups, 1>(a, b, depth, x + r, sums + r * kSumStride);
}

template <QuantType kType>
void float_tile_of(const uint8_t* a, const uint8_t* b, int depth, const FloatChunk* x, int rows, float* sums) {
  if (b) {
    float_tile_rows<kType, 2>(a, b, depth, x, rows, sums);
  } else {
    float_tile_rows<kType, 1>(a, a, depth, x, rows, sums);
  }
}

void float_tile(const float* a, const float* b, int depth, const FloatChunk* x, int rows, float* sums) {
  float_tile_of<QuantType::F32>(reinterpret_cast<const uint8_t*>(a), reinterpret_cast<const uint8_t*>(b), depth, x,
                                rows, sums);
}

void widen(QuantType type, const uint8_t* source, int depth, float* out) {
  if (type == QuantType::F16) {
    for (int k = 0; k < depth; ++k) Lanes::store(out + k * kLanes, Lanes::load_half(source + k * 32));
    return;
  }
  for (int k = 0; k < depth; k += 2) {
    const B pairs = Lanes::load_bytes(source + k * 32);
    Lanes::store(out + k * kLanes, Lanes::even(pairs)), Lanes::store(out + (k + 1) * kLanes, Lanes::odd(pairs));
  }
}

// Without the instruction taking pairs apart costs as much as multiplying: it is done once here. Odd columns are added
// first, which is the instruction's order.
template <int kGroups>
void bfloat16_tile_as_floats(const uint8_t* a, const uint8_t* b, int depth, const FloatChunk* x, int rows,
                             float* sums) {
  constexpr int kStep = Lanes::kFloatTileRows;
  alignas(64) float weights[2][kChunk * kLanes];
  FloatChunk rounded[kStep];
  const int columns = 2 * div_up(depth, 2);
  const uint8_t* packed[2] = {a, b};
  for (int n = 0; n < kGroups; ++n) widen(QuantType::BF16, packed[n], columns, weights[n]);
  const auto* w0 = reinterpret_cast<const uint8_t*>(weights[0]);
  const auto* w1 = reinterpret_cast<const uint8_t*>(weights[1]);
  for (int r = 0; r < rows; r += kStep) {
    const int count = rows - r < kStep ? rows - r : kStep;
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < columns; ++k) rounded[i].x[k] = float_from_bfloat16(x[r + i].rounded[k]);
    float* out = sums + r * kSumStride;
    if (count == kStep) {
      float_register_tile<QuantType::F32, kGroups, kStep, true>(w0, w1, columns, rounded, out);
    } else {
      for (int i = 0; i < count; ++i)
        float_register_tile<QuantType::F32, kGroups, 1, true>(w0, w1, columns, rounded + i, out + i * kSumStride);
    }
  }
}

void bfloat16_tile(const uint8_t* a, const uint8_t* b, int depth, const FloatChunk* x, int rows, float* sums) {
  if constexpr (Lanes::kMultipliesBfloat16) {
    float_tile_of<QuantType::BF16>(a, b, depth, x, rows, sums);
  } else {
    b ? bfloat16_tile_as_floats<2>(a, b, depth, x, rows, sums) : bfloat16_tile_as_floats<1>(a, a, depth, x, rows, sums);
  }
}

template <QuantType kType, int kGroups, int kRows>
void float_matvec_rows(const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x, int64_t chunk_stride,
                       float* sums) {
  using Step = FloatStep<kType>;
  // Each of two groups reads on where its next one is: neighbours are followed by two others, a gate and its up by
  // theirs.
  const int64_t group_bytes = (cols + Step::kColumns - 1) / Step::kColumns * Step::kBytes;
  const int64_t padded = (group_bytes + 63) / 64 * 64, skipped = kGroups == 2 && b - a == padded ? padded : 0;
  const uint8_t* w[2] = {a, b};
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::zero();
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk, x += chunk_stride) {
    const int steps = div_up(cols - k0 < kChunk ? cols - k0 : kChunk, Step::kColumns);
    const int64_t at = k0 / Step::kColumns * Step::kBytes;
    const int64_t ahead = k0 + kChunk < cols ? at + kChunk / Step::kColumns * Step::kBytes : padded + skipped;
#pragma GCC unroll Lanes::kUnroll
    for (int k = 0; k < steps; ++k) {
      for (int n = 0; n < kGroups; ++n) {
        if (Step::kBytes == 64 || k % 2 == 0) __builtin_prefetch(w[n] + ahead + k * Step::kBytes, 0, 3);
        const auto weight = Step::load(w[n] + at + k * Step::kBytes);
        for (int r = 0; r < kRows; ++r) total[r][n] = Step::multiply_add(weight, x[r], k, total[r][n]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) Lanes::store(sums + r * kSumStride + n * kLanes, total[r][n]);
}

template <QuantType kType, int kGroups>
void float_matvec_of(const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x, int64_t chunk_stride,
                     int rows, float* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    float_matvec_rows<kType, kGroups, 4>(a, b, cols, x + r, chunk_stride, sums + r * kSumStride);
  for (; r < rows; ++r) float_matvec_rows<kType, kGroups, 1>(a, b, cols, x + r, chunk_stride, sums + r * kSumStride);
}

template <QuantType kType>
void float_matvec_type(const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x, int64_t chunk_stride,
                       int rows, float* sums) {
  if (b) {
    float_matvec_of<kType, 2>(a, b, cols, x, chunk_stride, rows, sums);
  } else {
    float_matvec_of<kType, 1>(a, a, cols, x, chunk_stride, rows, sums);
  }
}

void float_matvec(QuantType type, const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x,
                  int64_t chunk_stride, int rows, float* sums) {
  if (type == QuantType::F16) return float_matvec_type<QuantType::F16>(a, b, cols, x, chunk_stride, rows, sums);
  if (type == QuantType::BF16) return float_matvec_type<QuantType::BF16>(a, b, cols, x, chunk_stride, rows, sums);
  float_matvec_type<QuantType::F32>(a, b, cols, x, chunk_stride, rows, sums);
}

// --- Activations ----------------------------------------------------------------------------------------------------

// Sums in 16 lanes, then halves: one order at every level.
inline float inverse_rms(const float* x, int64_t cols, float eps) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
  for (; i < cols; ++i) lanes[i % kLanes] += x[i] * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return 1.0f / __builtin_sqrtf(lanes[0] / float(cols) + eps);
}

inline uint16_t round_to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);  // a NaN stays one
}

void normalize_row(const float* x, int64_t cols, const float* norm_weight, float eps, FloatChunk* chunks,
                   int64_t chunk_stride) {
  const float factor = norm_weight ? inverse_rms(x, cols, eps) : 1.0f;
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk, chunks += chunk_stride) {
    const int depth = int(cols - k0 < kChunk ? cols - k0 : kChunk);
    float* out = chunks->x;
    if (norm_weight) {
      for (int k = 0; k < depth; ++k) out[k] = norm_weight[k0 + k] * (x[k0 + k] * factor);
    } else {
      for (int k = 0; k < depth; ++k) out[k] = x[k0 + k];
    }
    for (int k = 0; k < depth; ++k) chunks->rounded[k] = round_to_bfloat16(out[k]);
    if (depth % 2) chunks->rounded[depth] = 0;
  }
}

// 32 activations, the first and the second half.
inline void quantize_group(F first, F second, ActivationChunk& out, int g) {
  // Magnitudes have the order of their bits, and the bits of infinities and NaNs come last.
  const int32_t bits = Lanes::largest_magnitude(first, second);
  float scale = __builtin_nanf("");  // an infinite or NaN input must not vanish
  int32_t sums[2] = {0, 0};
  int8_t* q = out.q + 32 * g;
  if (bits < 0x7f800000) {
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    scale = largest / 127.0f;
    const F inverse = Lanes::splat(largest > 1e-30f ? 127.0f / largest : 0.0f);
    sums[0] = -Lanes::store_rounded(q, Lanes::mul(first, inverse));
    sums[1] = -Lanes::store_rounded(q + kLanes, Lanes::mul(second, inverse));
  } else {
    __builtin_memset(q, 0, 32);
  }
  out.scale[g] = scale;
  out.negative_sum_16[2 * g] = sums[0], out.negative_sum_16[2 * g + 1] = sums[1];
  out.negative_sum_32[g] = sums[0] + sums[1];
  out.negative_total_16[2 * g] = scale * float(sums[0]);
  out.negative_total_16[2 * g + 1] = scale * float(sums[1]);
  out.negative_total_32[g] = scale * float(sums[0] + sums[1]);
}

void quantize_row(const float* x, int64_t cols, const float* norm_weight, float eps, ActivationChunk* out,
                  int64_t chunk_stride) {
  const F factor = Lanes::splat(norm_weight ? inverse_rms(x, cols, eps) : 1.0f);
  for (int64_t k = 0; k < cols; k += 32) {
    F half[2] = {Lanes::load(x + k), Lanes::load(x + k + kLanes)};
    if (norm_weight)
      for (int h = 0; h < 2; ++h)
        half[h] = Lanes::mul(Lanes::load(norm_weight + k + kLanes * h), Lanes::mul(half[h], factor));
    quantize_group(half[0], half[1], out[k / kChunk * chunk_stride], int(k / 32 % kChunkGroups));
  }
}

// exp(x) for |x| <= 87 by 2^n * e^r, |r| <= ln(2)/2, with a degree-6 Taylor polynomial: about 2 units in the last
// place.
inline F exponential(F x) {
  x = Lanes::clamp(x, -87.0f, 87.0f);
  const F n = Lanes::round(Lanes::mul(x, Lanes::splat(1.44269504f)));
  F r = Lanes::fma(n, Lanes::splat(-0.693359375f), x);
  r = Lanes::fma(n, Lanes::splat(2.12194440e-4f), r);
  F p = Lanes::splat(1.0f / 5040);
  p = Lanes::fma(p, r, Lanes::splat(1.0f / 720));
  p = Lanes::fma(p, r, Lanes::splat(1.0f / 120));
  p = Lanes::fma(p, r, Lanes::splat(1.0f / 24));
  p = Lanes::fma(p, r, Lanes::splat(1.0f / 6));
  p = Lanes::fma(p, r, Lanes::splat(0.5f));
  p = Lanes::fma(p, r, Lanes::splat(1.0f));
  p = Lanes::fma(p, r, Lanes::splat(1.0f));
  return Lanes::times_power_of_two(p, n);
}

void silu_mul(const float* gate, const float* up, float* out) {
  const F x = Lanes::load(gate);
  const F minus_x = Lanes::mul(x, Lanes::splat(-1.0f));
  const F sigmoid_inverse = Lanes::add(Lanes::splat(1.0f), exponential(minus_x));
  Lanes::store(out, Lanes::mul(Lanes::div(x, sigmoid_inverse), Lanes::load(up)));
}

// --- Probes ---------------------------------------------------------------------------------------------------------

double int8_rate_loop(int64_t turns) {
  constexpr int kChains = 8;
  alignas(64) uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i);
  const B codes = Lanes::load_bytes(bytes);
  const int8_t four[4] = {1, -2, 3, -4};
  const Lanes::X x = Lanes::quad(four);
  I sum[kChains];
  for (auto& s : sum) s = Lanes::izero();
  for (int64_t t = 0; t < turns; ++t) {
#pragma GCC unroll Lanes::kUnroll
    for (int c = 0; c < kChains; ++c) sum[c] = Lanes::dot(sum[c], codes, x);
  }
  float out[kLanes];
  volatile float sink;
  for (const auto& s : sum) Lanes::store(out, Lanes::to_float(s)), sink = out[0];
  (void)sink;
  return double(turns) * kChains * 64;
}

double float_rate_loop(int64_t turns) {
  constexpr int kChains = 8;
  volatile float one = 0.999f;
  const F w = Lanes::splat(one);
  F sum[kChains];
  for (auto& s : sum) s = w;
  for (int64_t t = 0; t < turns; ++t) {
#pragma GCC unroll Lanes::kUnroll
    for (int c = 0; c < kChains; ++c) sum[c] = Lanes::fma(sum[c], w, w);
  }
  float out[kLanes];
  volatile float sink;
  for (const auto& s : sum) Lanes::store(out, s), sink = out[0];
  (void)sink;
  return double(turns) * kChains * 16;
}

double bfloat16_rate_loop(int64_t turns) {
  constexpr int kChains = 12;
  alignas(64) uint16_t ones[32];
  for (auto& one : ones) one = 0x3f80;
  const B w = Lanes::load_bytes(reinterpret_cast<const uint8_t*>(ones));
  const Lanes::X x = Lanes::quad(reinterpret_cast<const int8_t*>(ones));
  F sum[kChains];
  for (auto& s : sum) s = Lanes::zero();
  for (int64_t t = 0; t < turns; ++t) {
#pragma GCC unroll Lanes::kUnroll
    for (int c = 0; c < kChains; ++c) sum[c] = Lanes::dot_bfloat16(sum[c], w, x);
  }
  float out[kLanes];
  volatile float sink;
  for (const auto& s : sum) Lanes::store(out, s), sink = out[0];
  (void)sink;
  return double(turns) * kChains * 32;
}

float read_loop(const float* data, int64_t n) {
  F sum[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
  for (int64_t i = 0; i + 64 <= n; i += 64) {
    prefetch(reinterpret_cast<const uint8_t*>(data + i), 256);  // as the kernels do, so that this is their limit
    for (int j = 0; j < 4; ++j) sum[j] = Lanes::add(sum[j], Lanes::load(data + i + 16 * j));
  }
  float out[kLanes];
  Lanes::store(out, Lanes::add(Lanes::add(sum[0], sum[1]), Lanes::add(sum[2], sum[3])));
  return out[0];
}

constexpr Kernels kTable = {quantize_row,       normalize_row, codes,    widen,          float_tile,
                            bfloat16_tile,      float_matvec,  silu_mul, int8_rate_loop, float_rate_loop,
                            bfloat16_rate_loop, read_loop};
