// Sixteen floats in one AVX-512 register. Included inside an unnamed namespace, after <immintrin.h>.
struct Half {
  uint16_t bits;
};

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kColumns = 4;      // of a register block: 6 x 4 sums, 4 columns, 1 row: 29 of 32 registers
  static constexpr int kStepVectors = 4;  // columns of a state that a step of the delta rule takes at once
  static constexpr int kTileRows = 8;     // of a block of two vectors of sums in the chunk form of the delta rule
  __m512 v;

  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  float first() const { return _mm512_cvtss_f32(v); }

  // out[j][i] = p[4 * i + j]: numbers that lie in fours.
  static void load_fours(const float* p, Vec out[4]) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i third = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    const Vec a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    const __m512 ab01 = _mm512_permutex2var_ps(a.v, first, b.v), cd01 = _mm512_permutex2var_ps(c.v, first, d.v);
    const __m512 ab23 = _mm512_permutex2var_ps(a.v, third, b.v), cd23 = _mm512_permutex2var_ps(c.v, third, d.v);
    out[0].v = _mm512_shuffle_f32x4(ab01, cd01, 0x44), out[1].v = _mm512_shuffle_f32x4(ab01, cd01, 0xee);
    out[2].v = _mm512_shuffle_f32x4(ab23, cd23, 0x44), out[3].v = _mm512_shuffle_f32x4(ab23, cd23, 0xee);
  }

  // out[i][j] = in[j][i] for 16 x 16 values.
  template <class T>
  static void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = load(in + i * in_stride).v;
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // a[i + k]: in lane L, rows i to i + 3 of column 4 L + k
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 even_low = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x88);        // lanes 0 and 2 of rows 0-3, 4-7
      const __m512 odd_low = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xdd);         // lanes 1 and 3
      const __m512 even_high = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x88);  // the same of rows 8-11, 12-15
      const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xdd);
      _mm512_storeu_ps(out + k * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
      _mm512_storeu_ps(out + (4 + k) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
      _mm512_storeu_ps(out + (8 + k) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
      _mm512_storeu_ps(out + (12 + k) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec zero_where_less(Vec x, Vec limit, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
// The first n lanes of a, the others of b; any n.
inline Vec select_first(int n, Vec a, Vec b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(n)), b.v, a.v)};
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }

// Four codes in -127..127 in each lane.
struct Fours {
  __m512i v;  // codes + 128: one factor of the product has no sign

  static Fours load(const int8_t* p) { return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))}; }
};

// An integer in each lane.
struct Ints {
  __m512i v;

  // What a sum of products with `other` begins with, where `other_sum` is the sum of all codes of the others.
  static Ints begin(int32_t other_sum) { return {_mm512_set1_epi32(-128 * other_sum)}; }
  // Adds to each lane the products of its four codes with the four of `other`.
  void add_products(Fours a, int32_t other) { v = _mm512_dpbusd_epi32(v, a.v, _mm512_set1_epi32(other)); }
  Vec to_floats() const { return {_mm512_cvtepi32_ps(v)}; }
};
