// Sixteen rows in two AVX2 registers. Part of quant_dot_avx2.cpp: included inside its unnamed namespace.
struct Lanes {
  static constexpr int kUnroll = 8;
  static constexpr int kTileRows = 6, kTileGroups = 1;  // 12 of 16 registers are sums
  static constexpr int kFloatTileRows = 6;
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  using B = I;
  using X = __m256i;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
  static F load_half(const void* p) {
    const auto* q = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static F load_u8(const uint8_t* p) { return from_u8(load16(p)); }
  static F load_i8(const uint8_t* p) {
    const __m128i x = load16(p);
    return to_float({_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
  }
  static F load_low_nibble(const uint8_t* p) { return from_u8(_mm_and_si128(load16(p), _mm_set1_epi8(15))); }
  static F load_high_nibble(const uint8_t* p) {
    return from_u8(_mm_and_si128(_mm_srli_epi16(load16(p), 4), _mm_set1_epi8(15)));
  }
  // What is not used in a loop is put away before it, so that the compiler gives its registers to what is.
  static void put_away(F& x) { asm("" : "+m"(x)); }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F clamp(F x, float low, float high) {
    const __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
    return {_mm256_min_ps(_mm256_max_ps(x.a, l), h), _mm256_min_ps(_mm256_max_ps(x.b, l), h)};
  }
  static F round(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
  static F times_power_of_two(F x, F n) {
    const auto scale = [](__m256 v, __m256 e) {
      return _mm256_castsi256_ps(
          _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_cvtps_epi32(e), 23)));
    };
    return {scale(x.a, n.a), scale(x.b, n.b)};
  }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I splat_shifted(int32_t x, int shift) {
    const __m256i v = _mm256_slli_epi32(_mm256_set1_epi32(x), shift);  // the splat comes from memory
    return {v, v};
  }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

  static int32_t largest_magnitude(F x, F y) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const auto bits = [&](__m256 v) { return _mm256_castps_si256(_mm256_and_ps(v, magnitude)); };
    const __m256i eight =
        _mm256_max_epi32(_mm256_max_epi32(bits(x.a), bits(x.b)), _mm256_max_epi32(bits(y.a), bits(y.b)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  static int32_t store_rounded(int8_t* p, F x) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);  // packs works within 128-bit halves
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    return sum_of_bytes(bytes);
  }

  static B load_bytes(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(q), _mm256_load_si256(q + 1)};
  }
  static void store_bytes(uint8_t* p, B x) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_store_si256(q, x.a), _mm256_store_si256(q + 1, x.b);
  }
  template <int kShift>
  static B bits(B x, int mask) {
    if constexpr (kShift > 0) x = {_mm256_slli_epi16(x.a, kShift), _mm256_slli_epi16(x.b, kShift)};
    if constexpr (kShift < 0) x = {_mm256_srli_epi16(x.a, -kShift), _mm256_srli_epi16(x.b, -kShift)};
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  static B either(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static B lookup(const uint8_t* table, B index) {
    const __m256i t = _mm256_broadcastsi128_si256(load16(table));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
  }
  static X quad(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
#if defined(__AVXVNNI__)
  // Four products of bytes are added in 32 bits, as in AVX-512: nothing overflows, so nothing needs another way.
  static constexpr bool kNarrowSums = false, kMultipliesWords = false, kWideDotRemovesOffset = false;
  static I dot(I sum, B codes, X x) {
    return {_mm256_dpbusd_avx_epi32(sum.a, codes.a, x), _mm256_dpbusd_avx_epi32(sum.b, codes.b, x)};
  }
  static I dot_wide(I sum, B codes, X x) { return dot(sum, codes, x); }
#else
  // maddubs adds pairs of products in 16 bits. Codes of at most 6 bits cannot overflow it (2 * 63 * 127).
  static I dot(I sum, B codes, X x) { return {dot8(sum.a, codes.a, x), dot8(sum.b, codes.b, x)}; }
  // The same in steps: pairs of products in 16 bits, sums of such, and these added to 32-bit sums.
  static constexpr bool kNarrowSums = true;
  static B products(B codes, X x) { return {_mm256_maddubs_epi16(codes.a, x), _mm256_maddubs_epi16(codes.b, x)}; }
  static B add_narrow(B x, B y) { return {in_turn(_mm256_add_epi16(x.a, y.a)), in_turn(_mm256_add_epi16(x.b, y.b))}; }
  static I add_widened(I sum, B narrow) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(narrow.a, ones)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(narrow.b, ones))};
  }
  // 8-bit codes: magnitude times activation with the code's sign, at most 2 * 128 * 127.
  static constexpr bool kWideDotRemovesOffset = true;
  static I dot_wide(I sum, B codes, X x) {
    const __m256i flip = _mm256_set1_epi8(char(0x80));
    const __m256i a = _mm256_xor_si256(codes.a, flip), b = _mm256_xor_si256(codes.b, flip);
    return {dot8(sum.a, _mm256_abs_epi8(a), _mm256_sign_epi8(x, a)),
            dot8(sum.b, _mm256_abs_epi8(b), _mm256_sign_epi8(x, b))};
  }
  // Where many rows meet the same 8-bit codes these are widened to 16 bits first: two instructions for 16 products,
  // where the above takes four for 32 but three of them compete for the multipliers. A word stands for the even or the
  // odd byte of each two, so that nothing has to be shuffled.
  static constexpr bool kMultipliesWords = true;
  static B even_words(B codes) {
    const __m256i low = _mm256_set1_epi16(255), offset = _mm256_set1_epi16(128);
    return {_mm256_sub_epi16(_mm256_and_si256(codes.a, low), offset),
            _mm256_sub_epi16(_mm256_and_si256(codes.b, low), offset)};
  }
  static B odd_words(B codes) {
    const __m256i offset = _mm256_set1_epi16(128);
    return {_mm256_sub_epi16(_mm256_srli_epi16(codes.a, 8), offset),
            _mm256_sub_epi16(_mm256_srli_epi16(codes.b, 8), offset)};
  }
  // Of 8 quads of activations: the even bytes of each, then the odd ones.
  static void store_words(int16_t* p, const int8_t* q) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    auto* out = reinterpret_cast<__m256i*>(p);
    _mm256_store_si256(out, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    _mm256_store_si256(out + 1, _mm256_srai_epi16(x, 8));
  }
  static I dot_words(I sum, B words, X x) {
    return {in_turn(_mm256_add_epi32(sum.a, _mm256_madd_epi16(words.a, x))),
            in_turn(_mm256_add_epi32(sum.b, _mm256_madd_epi16(words.b, x)))};
  }
#endif
  static constexpr bool kMultipliesBfloat16 = false;
  // The even and the odd of pairs of bfloat16 numbers.
  static F even(B pairs) { return {even8(pairs.a), even8(pairs.b)}; }
  static F odd(B pairs) { return {odd8(pairs.a), odd8(pairs.b)}; }
  // sum + odd product, then + even product, each fused: the order of AVX-512's instruction.
  static F dot_bfloat16(F sum, B w, X x) {
    const __m256 o = odd8(x), e = even8(x);
    return fma(even(w), {e, e}, fma(odd(w), {o, o}, sum));
  }

 private:
#if !defined(__AVXVNNI__)
  // Keeps the compiler from adding products to each other before the sum: it would run out of registers for them.
  static __m256i in_turn(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
  }
  static __m256i dot8(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  }
#endif
  static __m256 odd8(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536))); }
  static __m256 even8(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static int32_t sum_of_bytes(__m128i x) {
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(x, _mm_set1_epi8(char(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
  }
  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static F from_u8(__m128i x) {
    return to_float({_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))});
  }
};
