// Eight floats in plain C++ that a compiler may vectorise for whatever it targets. Included inside an unnamed
// namespace, after half.h.
struct Half {
  uint16_t bits;
};

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kColumns = 2;      // of a register block
  static constexpr int kStepVectors = 4;  // columns of a state that a step of the delta rule takes at once
  static constexpr int kTileRows = 4;     // of a block of two vectors of sums in the chunk form of the delta rule
  float v[kWidth];

  static Vec broadcast(float x) {
    Vec a;
    for (float& lane : a.v) lane = x;
    return a;
  }
  static Vec load(const float* p) {
    Vec a;
    __builtin_memcpy(a.v, p, sizeof a.v);
    return a;
  }
  static Vec load(const Half* p) {
    Vec a;
    for (int i = 0; i < kWidth; ++i) a.v[i] = float_from_half(p[i].bits);
    return a;
  }
  static Vec load(const int8_t* p) {
    Vec a;
    for (int i = 0; i < kWidth; ++i) a.v[i] = p[i];
    return a;
  }
  void store(float* p) const { __builtin_memcpy(p, v, sizeof v); }
  void store(Half* p) const {
    for (int i = 0; i < kWidth; ++i) p[i].bits = half_from_float(v[i]);
  }
  float first() const { return v[0]; }

  // out[j][i] = p[4 * i + j]: numbers that lie in fours.
  static void load_fours(const float* p, Vec out[4]) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < 4; ++j) out[j].v[i] = p[4 * i + j];
    }
  }

  // out[i][j] = in[j][i] for 8 x 8 values.
  template <class T>
  static void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
    for (int j = 0; j < kWidth; ++j) {
      const Vec row = load(in + j * in_stride);
      for (int i = 0; i < kWidth; ++i) out[i * out_stride + j] = row.v[i];
    }
  }
};

template <class Function>
Vec each(Function function) {
  Vec a;
  for (int i = 0; i < Vec::kWidth; ++i) a.v[i] = function(i);
  return a;
}

inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec round(Vec a) {
  return each([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
// n in [-126, 127]; other n give any value.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  return each([&](int i) {
    const float clamped = n.v[i] >= -126.0f && n.v[i] <= 127.0f ? n.v[i] : 0.0f;
    return a.v[i] * float_from_bits(uint32_t(int32_t(clamped) + 127) << 23);
  });
}
inline Vec zero_where_less(Vec x, Vec limit, Vec a) {
  return each([&](int i) { return x.v[i] < limit.v[i] ? 0.0f : a.v[i]; });
}
inline Vec select_first(int n, Vec a, Vec b) {
  return each([&](int i) { return i < n ? a.v[i] : b.v[i]; });
}
inline float reduce_max(Vec a) {
  float m = a.v[0];
  for (float lane : a.v) m = lane > m ? lane : m;
  return m;
}
inline float reduce_add(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

// Four codes in -127..127 in each lane.
struct Fours {
  int8_t v[Vec::kWidth][4];

  static Fours load(const int8_t* p) {
    Fours a;
    __builtin_memcpy(a.v, p, sizeof a.v);
    return a;
  }
};

// An integer in each lane.
struct Ints {
  int32_t v[Vec::kWidth];

  // What a sum of products with `other` begins with, where `other_sum` is the sum of all codes of the others.
  static Ints begin(int32_t) { return {}; }
  // Adds to each lane the products of its four codes with the four of `other`.
  void add_products(Fours a, int32_t other) {
    int8_t b[4];
    __builtin_memcpy(b, &other, sizeof b);
    for (int i = 0; i < Vec::kWidth; ++i) {
      for (int j = 0; j < 4; ++j) v[i] += a.v[i][j] * b[j];
    }
  }
  Vec to_floats() const {
    return each([&](int i) { return float(v[i]); });
  }
};
