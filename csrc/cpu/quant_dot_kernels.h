// The kernels of quant_dot.h written once over `Lanes` (16 rows side by side). Every level's .cpp file includes its
// lanes_*.h and then this, both inside an unnamed namespace: code built with different -m flags must never be shared.

inline constexpr int div_up(int64_t a, int b) { return int((a + b - 1) / b); }

using B = Lanes::B;
using F = Lanes::F;
using I = Lanes::I;

#include "quant_dot_codes.h"

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

// How many quads' products a level that adds pairs of them in 16 bits first may sum so before it widens them; 0: none.
template <class Code, class L>
constexpr int narrow_quads() {
  if constexpr (!L::kNarrowSums || Code::kWide) {
    return 0;
  } else {
    int quads = 8 / Code::kSubs;
    while (quads * 2 * 127 * Code::kMaxCode > 32767) quads /= 2;
    return quads;
  }
}

// sum + the dot products of kQuads consecutive quads.
template <class Code, class L = Lanes>
inline I dots(I sum, const B* codes, const int8_t* q) {
  constexpr int kQuads = 8 / Code::kSubs, kNarrow = narrow_quads<Code, L>();
  if constexpr (kNarrow > 0) {
#pragma GCC unroll Lanes::kUnroll
    for (int first = 0; first < kQuads; first += kNarrow) {
      B narrow = L::products(codes[first], L::quad(q + 4 * first));
#pragma GCC unroll Lanes::kUnroll
      for (int j = first + 1; j < first + kNarrow; ++j)
        narrow = L::add_narrow(narrow, L::products(codes[j], L::quad(q + 4 * j)));
      sum = L::add_widened(sum, narrow);
    }
    return sum;
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
  constexpr int kHeaders = kChunk / Code::kBlock;                                 // of a chunk
  const uint8_t* p = group + header_area;
  const uint8_t* header = group;
  const uint8_t* ahead = group;
  F total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = Lanes::zero();
  for (int64_t left = cols / 32; left > 0;
       left -= kChunkGroups, x += chunk_stride, header += kHeaders * Code::kHeader) {
    const int groups = left < kChunkGroups ? int(left) : kChunkGroups;
    for (int g = 0; g < groups; ++g, p += Code::kCodeBytes, ahead += kBytes) {
      prefetch(ahead, kBytes);
      B w[8];
      F scale[2], minimum[2] = {Lanes::zero(), Lanes::zero()};
      Code::codes(p, w);
      Code::scales(kHeaders == 1 ? header : header + g * Code::kHeader, g, scale, minimum);
#pragma GCC unroll Lanes::kUnroll
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll Lanes::kUnroll
        for (int sub = 0; sub < Code::kSubs; ++sub) {
          const int first = sub * kQuads;
          const I sum = dots<Code>(start_sum<Code>(x[r], g, sub), w + first, x[r].q + 32 * g + 4 * first);
          total[r] = accumulate<Code>(total[r], sum, scale[sub], minimum[sub], x[r], g, sub);
        }
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
  constexpr int kQuads = 8 / Code::kSubs, kNarrow = narrow_quads<Code, L>();
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::load(sums + r * kSumStride + n * kLanes);
  for (int g = 0; g < groups; ++g) {
    const UnpackedGroup* w[2] = {a + g, b + g};
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kGroups; ++n) Lanes::put_away(total[r][n]);
#pragma GCC unroll Lanes::kUnroll
    for (int sub = 0; sub < Code::kSubs; ++sub) {
      I sum[kRows][kGroups];
      if constexpr (kNarrow > 0) {
#pragma GCC unroll Lanes::kUnroll
        for (int first = sub * kQuads; first < (sub + 1) * kQuads; first += kNarrow) {
          B narrow[kRows][kGroups];
#pragma GCC unroll Lanes::kUnroll
          for (int j = first; j < first + kNarrow; ++j) {
            for (int n = 0; n < kGroups; ++n) {
              const B codes = L::load_bytes(w[n]->codes + 64 * j);
#pragma GCC unroll Lanes::kUnroll
              for (int r = 0; r < kRows; ++r) {
                const B four = L::products(codes, L::quad(x[r].q + 32 * g + 4 * j));
                narrow[r][n] = j == first ? four : L::add_narrow(narrow[r][n], four);
              }
            }
          }
#pragma GCC unroll Lanes::kUnroll
          for (int r = 0; r < kRows; ++r) {
            for (int n = 0; n < kGroups; ++n) {
              const I before = first == sub * kQuads ? start_sum<Code>(x[r], g, sub) : sum[r][n];
              sum[r][n] = L::add_widened(before, narrow[r][n]);
            }
          }
        }
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

#include "quant_dot_words.h"

// Rows kRows at a time, then those that are left by fewer.
template <class Code, int kGroups, int kRows = Lanes::kTileRows>
void tile_rows(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows,
               float* sums) {
  for (; rows >= kRows; rows -= kRows, x += kRows, sums += kRows * kSumStride)
    register_tile<Code, kGroups, kRows>(a, b, groups, x, sums);
  if constexpr (kRows > 1) {
    if (rows > 0) tile_rows<Code, kGroups, kRows == 6 ? 4 : kRows / 2>(a, b, groups, x, rows, sums);
  }
}

template <class Code, class L = Lanes>
void tile(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows, float* sums) {
  if constexpr (Code::kWide && L::kMultipliesWords) {
    words_tile<Code>(a, b, groups, x, rows, sums);
  } else if (b && Lanes::kTileGroups == 2) {
    tile_rows<Code, 2>(a, b, groups, x, rows, sums);
  } else {
    tile_rows<Code, 1>(a, a, groups, x, rows, sums);
    if (b) tile_rows<Code, 1>(b, b, groups, x, rows, sums + kLanes);
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

#include "quant_dot_floats.h"

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

// out[k] = element k0 + k of the row, normalised with norm_weight unless that is null.
inline void normalize(const float* x, int64_t k0, int depth, const float* norm_weight, float factor, float* out) {
  if (norm_weight) {
    for (int k = 0; k < depth; ++k) out[k] = norm_weight[k0 + k] * (x[k0 + k] * factor);
  } else {
    for (int k = 0; k < depth; ++k) out[k] = x[k0 + k];
  }
}

void normalize_row(const float* x, int64_t cols, const float* norm_weight, float eps, FloatChunk* chunks,
                   int64_t chunk_stride) {
  const float factor = norm_weight ? inverse_rms(x, cols, eps) : 1.0f;
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk, chunks += chunk_stride)
    normalize(x, k0, int(cols - k0 < kChunk ? cols - k0 : kChunk), norm_weight, factor, chunks->x);
}

void round_row(const float* x, int64_t cols, const float* norm_weight, float eps, RoundedChunk* chunks,
               int64_t chunk_stride) {
  const float factor = norm_weight ? inverse_rms(x, cols, eps) : 1.0f;
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk, chunks += chunk_stride) {
    const int depth = int(cols - k0 < kChunk ? cols - k0 : kChunk);
    float values[kChunk];
    normalize(x, k0, depth, norm_weight, factor, values);
    for (int k = 0; k < depth; ++k) chunks->x[k] = round_to_bfloat16(values[k]);
    if (depth % 2) chunks->x[depth] = 0;
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

#include "quant_dot_probes.h"

constexpr Kernels kTable = {quantize_row,   normalize_row,   round_row,          codes,           widen,
                            float_tile,     bfloat16_tile,   float_matvec,       bfloat16_matvec, silu_mul,
                            int8_rate_loop, float_rate_loop, bfloat16_rate_loop, read_loop};
