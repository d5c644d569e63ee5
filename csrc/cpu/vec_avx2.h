// Eight floats in one AVX2 register (with FMA and F16C). Included inside an unnamed namespace, after <immintrin.h>.
struct Half {
  uint16_t bits;
};

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kColumns = 2;      // of a register block: 6 x 2 sums, 2 columns, 1 row: 15 of 16 registers
  static constexpr int kStepVectors = 4;  // columns of a state that a step of the delta rule takes at once
  static constexpr int kTileRows = 4;     // of a block of two vectors of sums in the chunk form of the delta rule
  __m256 v;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  float first() const { return _mm256_cvtss_f32(v); }

  // out[j][i] = p[4 * i + j]: numbers that lie in fours.
  static void load_fours(const float* p, Vec out[4]) {
    const Vec a = load(p), b = load(p + 8), c = load(p + 16), d = load(p + 24);
    const __m256 i0 = _mm256_permute2f128_ps(a.v, c.v, 0x20), i1 = _mm256_permute2f128_ps(a.v, c.v, 0x31);
    const __m256 i2 = _mm256_permute2f128_ps(b.v, d.v, 0x20), i3 = _mm256_permute2f128_ps(b.v, d.v, 0x31);
    const __m256 low01 = _mm256_unpacklo_ps(i0, i1), low23 = _mm256_unpacklo_ps(i2, i3);
    const __m256 high01 = _mm256_unpackhi_ps(i0, i1), high23 = _mm256_unpackhi_ps(i2, i3);
    out[0].v = _mm256_shuffle_ps(low01, low23, 0x44), out[1].v = _mm256_shuffle_ps(low01, low23, 0xee);
    out[2].v = _mm256_shuffle_ps(high01, high23, 0x44), out[3].v = _mm256_shuffle_ps(high01, high23, 0xee);
  }

  // out[i][j] = in[j][i] for 8 x 8 values.
  template <class T>
  static void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = load(in + i * in_stride).v;
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // a[i + k]: in lane L, rows i to i + 3 of column 4 L + k
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      _mm256_storeu_ps(out + k * out_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x20));
      _mm256_storeu_ps(out + (4 + k) * out_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x31));
    }
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// n in [-126, 127]; other n give any value.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
inline Vec zero_where_less(Vec x, Vec limit, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
// The first n lanes of a, the others of b; any n.
inline Vec select_first(int n, Vec a, Vec b) {
  const __m256i chosen = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(chosen))};
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// Four codes in -127..127 in each lane.
struct Fours {
  __m256i v, magnitude;  // one factor of the product has no sign

  static Fours load(const int8_t* p) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {codes, _mm256_abs_epi8(codes)};
  }
};

// An integer in each lane.
struct Ints {
  __m256i v;

  // What a sum of products with `other` begins with, where `other_sum` is the sum of all codes of the others.
  static Ints begin(int32_t) { return {_mm256_setzero_si256()}; }
  // Adds to each lane the products of its four codes with the four of `other`. Two of them fit 16 bits.
  void add_products(Fours a, int32_t other) {
    const __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(other), a.v));
    v = _mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  Vec to_floats() const { return {_mm256_cvtepi32_ps(v)}; }
};
