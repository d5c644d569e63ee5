// Sixteen rows in one AVX-512 register. Part of quant_dot_avx512.cpp: included inside its unnamed namespace.
struct Lanes {
  static constexpr int kUnroll = 8;
  static constexpr int kTileRows = 6, kTileGroups = 2;  // activation rows and row groups of a tile's register block
  static constexpr int kFloatTileRows = 6;
  using F = __m512;
  using I = __m512i;
  using B = __m512i;  // 64 bytes: quads of 16 rows
  using X = __m512i;  // one quad of activations, for all rows

  static F zero() { return _mm512_setzero_ps(); }
  static F splat(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static F load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(p))); }
  static F load_i8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p))); }
  static F load_low_nibble(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(load16(p), _mm_set1_epi8(15))));
  }
  static F load_high_nibble(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(load16(p), 4), _mm_set1_epi8(15))));
  }
  static void put_away(F&) {}  // there are registers enough
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F clamp(F x, float low, float high) { return _mm512_min_ps(_mm512_max_ps(x, splat(low)), splat(high)); }
  static F round(F x) { return _mm512_roundscale_ps(x, 8); }
  static F times_power_of_two(F x, F n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static I splat_shifted(int32_t x, int shift) { return _mm512_set1_epi32(int32_t(uint32_t(x) << shift)); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  static int32_t largest_magnitude(F a, F b) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i x = _mm512_and_si512(_mm512_castps_si512(a), magnitude);
    return _mm512_reduce_max_epi32(_mm512_max_epi32(x, _mm512_and_si512(_mm512_castps_si512(b), magnitude)));
  }
  static int32_t store_rounded(int8_t* p, F x) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(char(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
  }

  static B load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store_bytes(uint8_t* p, B x) { _mm512_store_si512(p, x); }
  template <int kShift>  // left when positive, right when negative; the mask drops what crosses a byte
  static B bits(B x, int mask) {
    if constexpr (kShift > 0) x = _mm512_slli_epi16(x, kShift);
    if constexpr (kShift < 0) x = _mm512_srli_epi16(x, -kShift);
    return _mm512_and_si512(x, _mm512_set1_epi8(char(mask)));
  }
  static B either(B a, B b) { return _mm512_or_si512(a, b); }
  static B lookup(const uint8_t* table, B index) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index);
  }
  static X quad(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  // Wide codes carry an offset of 128; here the accumulator's start takes it off.
  static constexpr bool kWideDotRemovesOffset = false;
  static constexpr bool kNarrowSums = false, kMultipliesWords = false;
  static I dot(I sum, B codes, X x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  static I dot_wide(I sum, B codes, X x) { return dot(sum, codes, x); }
#if defined(__AVX512BF16__)
  static constexpr bool kMultipliesBfloat16 = true;
#else
  static constexpr bool kMultipliesBfloat16 = false;
#endif
  // The even and the odd of pairs of bfloat16 numbers.
  static F even(B pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static F odd(B pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))); }
  // sum + odd product, then + even product, each fused: the instruction's own order.
  static F dot_bfloat16(F sum, B w, X x) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
    return fma(even(w), even(x), fma(odd(w), odd(x), sum));
#endif
  }

 private:
  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
};
