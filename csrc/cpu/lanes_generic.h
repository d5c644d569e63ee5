// Sixteen rows in plain arrays. Part of quant_dot_generic.cpp: included inside its unnamed namespace.
struct Lanes {
  static constexpr int kUnroll = 1;
  static constexpr int kTileRows = 1, kTileGroups = 2;
  static constexpr int kFloatTileRows = 1;
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  struct B {
    uint8_t v[64];
  };
  struct X {
    int8_t v[4];
  };

  template <class Function>
  static F each(Function f) {
    F out;
    for (int i = 0; i < 16; ++i) out.v[i] = f(i);
    return out;
  }
  static F zero() { return splat(0); }
  static F splat(float x) {
    return each([=](int) { return x; });
  }
  static F load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, F x) {
    for (int i = 0; i < 16; ++i) p[i] = x.v[i];
  }
  static F load_half(const void* p) {
    return each([=](int i) { return float_from_half(word(p, i)); });
  }
  static F load_u8(const uint8_t* p) {
    return each([=](int i) { return float(p[i]); });
  }
  static F load_i8(const uint8_t* p) {
    return each([=](int i) { return float(int8_t(p[i])); });
  }
  static F load_low_nibble(const uint8_t* p) {
    return each([=](int i) { return float(p[i] & 15); });
  }
  static F load_high_nibble(const uint8_t* p) {
    return each([=](int i) { return float(p[i] >> 4); });
  }
  static void put_away(F&) {}
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  // Two roundings: without the instruction a true fma is a slow library call.
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static F clamp(F x, float low, float high) {
    return each([&](int i) { return x.v[i] > low ? (x.v[i] < high ? x.v[i] : high) : low; });
  }
  static F round(F x) {
    return each([&](int i) { return __builtin_nearbyintf(x.v[i]); });
  }
  static F times_power_of_two(F x, F n) {
    return each([&](int i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &x.v[i], 4);
      return float_from_bits(bits + (uint32_t(int32_t(n.v[i])) << 23));
    });
  }

  static I izero() { return splat_shifted(0, 0); }
  static I splat_shifted(int32_t x, int shift) {
    I out;
    for (int i = 0; i < 16; ++i) out.v[i] = int32_t(uint32_t(x) << shift);
    return out;
  }
  static F to_float(I x) {
    return each([&](int i) { return float(x.v[i]); });
  }

  // The larger of all magnitudes in both, as the bits of a float.
  static int32_t largest_magnitude(const F& a, const F& b) {
    int32_t largest = 0;
    for (int i = 0; i < 16; ++i) {
      int32_t x, y;
      __builtin_memcpy(&x, &a.v[i], 4), __builtin_memcpy(&y, &b.v[i], 4);
      x &= 0x7fffffff, y &= 0x7fffffff;
      largest = x > largest ? x : largest, largest = y > largest ? y : largest;
    }
    return largest;
  }
  // Stores the nearest integers (ties to even) of numbers within int8 and returns their sum.
  static int32_t store_rounded(int8_t* p, const F& x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) {
      const float shifted = x.v[i] + 12582912.0f;  // 1.5 * 2^23 leaves the integer in the low bits
      int32_t bits;
      __builtin_memcpy(&bits, &shifted, 4);
      p[i] = int8_t(bits - 0x4b400000), sum += p[i];
    }
    return sum;
  }

  static B load_bytes(const uint8_t* p) {
    B out;
    __builtin_memcpy(out.v, p, 64);
    return out;
  }
  static void store_bytes(uint8_t* p, const B& x) { __builtin_memcpy(p, x.v, 64); }
  template <int kShift>
  __attribute__((noinline)) static B bits(B x, int mask) {
    for (int i = 0; i < 64; ++i) x.v[i] = uint8_t((kShift > 0 ? x.v[i] << kShift : x.v[i] >> -kShift) & mask);
    return x;
  }
  static B either(B a, const B& b) {
    for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
    return a;
  }
  static B lookup(const uint8_t* table, B index) {
    for (int i = 0; i < 64; ++i) index.v[i] = table[index.v[i]];
    return index;
  }
  static X quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static constexpr bool kWideDotRemovesOffset = false;
  static constexpr bool kNarrowSums = false, kMultipliesWords = false;
  // Out of line: unrolled into every kernel it would make this file the longest to compile by far.
  __attribute__((noinline)) static I dot(I sum, const B& codes, X x) {
    for (int i = 0; i < 16; ++i)
      for (int b = 0; b < 4; ++b) sum.v[i] += int(codes.v[4 * i + b]) * x.v[b];
    return sum;
  }
  static I dot_wide(I sum, const B& codes, X x) { return dot(sum, codes, x); }
  static constexpr bool kMultipliesBfloat16 = false;
  static F even(const B& pairs) {
    return each([&](int i) { return float_from_bfloat16(word(pairs.v, 2 * i)); });
  }
  static F odd(const B& pairs) {
    return each([&](int i) { return float_from_bfloat16(word(pairs.v, 2 * i + 1)); });
  }
  static F dot_bfloat16(const F& sum, const B& w, X x) {
    const F o = splat(float_from_bfloat16(word(x.v, 1))), e = splat(float_from_bfloat16(word(x.v, 0)));
    return fma(even(w), e, fma(odd(w), o, sum));
  }

 private:
  static uint16_t word(const void* p, int i) {
    uint16_t bits;
    __builtin_memcpy(&bits, static_cast<const uint8_t*>(p) + 2 * i, 2);
    return bits;
  }
};
