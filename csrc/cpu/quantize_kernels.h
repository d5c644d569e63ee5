// The encoders of one instruction-set level; kWidth is its number of float lanes. Included inside the unnamed namespace
// of quantize_<level>.cpp. Every operation is one of float32 in the order of helexa_engine/quant/quantize.py: groups
// lie in lanes and a group's values are visited from first to last, so the number of lanes changes nothing.

constexpr int kLanes = 16;  // groups of a batch; a vector takes kWidth of them
typedef float V __attribute__((vector_size(4 * kWidth)));

inline V splat(float x) { return x - V{}; }
inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V clamp(V x, float low, float high) { return smaller(larger(x, splat(low)), splat(high)); }
inline V magnitude(V x) { return larger(x, -x); }
// To the nearest integer, halves to even, for |x| < 2^22: adding this number leaves no room for a fraction.
inline V round_small(V x) {
  const V shift = splat(0x1.8p23f);
  return (x + shift) - shift;
}
// a / b, and 0 where the quotient is not finite.
inline V divide(V a, V b) {
  const V quotient = a / b;
  return magnitude(quotient) <= splat(3.402823466e38f) ? quotient : V{};
}
inline V inverse(V scale) { return divide(splat(1), scale); }
inline float divide(float a, float b) {
  const float quotient = a / b;
  return __builtin_fabsf(quotient) <= 3.402823466e38f ? quotient : 0.0f;
}

// Rounded to what float16 can hold; never -0.
inline float rounded_to_half(float x) {
  x = x > -65504.0f ? x : -65504.0f;
  x = x < 65504.0f ? x : 65504.0f;
  return float_from_half(half_from_float(x)) + 0.0f;
}
inline V rounded_to_half(V x) {
  for (int i = 0; i < kWidth; ++i) x[i] = rounded_to_half(x[i]);
  return x;
}

// The integers low..high as levels.
template <int kLow, int kHigh>
struct Whole {
  static constexpr float kLowest = kLow, kHighest = kHigh;
  static V nearest(V x) { return round_small(clamp(x, kLow, kHigh)); }
  static V code(V x) { return nearest(x) - splat(kLow); }
};

struct Iq4 {
  static constexpr float kLowest = kIq4Values[0], kHighest = kIq4Values[15];
  static V nearest(V x) {
    V level = splat(kLowest);
    for (int i = 1; i < 16; ++i) level = x >= splat(border(i)) ? splat(kIq4Values[i]) : level;
    return level;
  }
  static V code(V x) {
    V code{};
    for (int i = 1; i < 16; ++i) code = x >= splat(border(i)) ? splat(float(i)) : code;
    return code;
  }

 private:
  static constexpr float border(int i) { return float(kIq4Values[i - 1] + kIq4Values[i]) / 2; }
};

constexpr float kSignedFactors[] = {1.0f, 0.82f, 0.88f, 0.94f, 1.06f, 1.12f, 1.18f};
constexpr float kLineFactors[] = {1.0f,  0.82f, 0.85f, 0.88f, 0.91f, 0.94f, 0.97f,
                                  1.03f, 1.06f, 1.09f, 1.12f, 1.15f, 1.18f};

constexpr float kNeighbours[] = {-1.0f, 1.0f}, kItselfAndNeighbours[] = {0.0f, -1.0f, 1.0f};

// A batch: value i of group `lane` and its weight.
template <int K>
struct Groups {
  alignas(64) float x[K][kLanes];
  alignas(64) float w[K][kLanes];
};

// Lanes beyond `count` blocks are filled with zeros.
template <int K, int kBlockSize>
void load_groups(const float* source, const float* weights, int64_t first_block, int64_t blocks_per_row, int count,
                 Groups<K>& groups) {
  constexpr int kPerBlock = kBlockSize / K;
  for (int i = 0; i < K; ++i)
    for (int lane = 0; lane < kLanes; ++lane) groups.w[i][lane] = 1, groups.x[i][lane] = 0;
  for (int lane = 0; lane < count * kPerBlock; ++lane) {
    for (int i = 0; i < K; ++i) groups.x[i][lane] = source[lane * K + i];
    if (!weights) continue;
    const int64_t block = (first_block + lane / kPerBlock) % blocks_per_row;
    const float* w = weights + block * kBlockSize + lane % kPerBlock * K;
    for (int i = 0; i < K; ++i) groups.w[i][lane] = w[i];
  }
}

// The lanes c..c + kWidth of a batch.
template <int K>
struct Column {
  const float *x_, *w_;
  Column(const Groups<K>& groups, int c) : x_(groups.x[0] + c), w_(groups.w[0] + c) {}
  V x(int i) const { return load(x_ + i * kLanes); }
  V w(int i) const { return load(w_ + i * kLanes); }
};

template <int K>
V extreme(Column<K> g) {
  V best{}, largest = splat(-1);
  for (int i = 0; i < K; ++i) {
    const V x = g.x(i), size = magnitude(x);
    best = size > largest ? x : best;
    largest = larger(size, largest);
  }
  return best;
}

inline float extreme(const float* values, int n) {
  float best = values[0];
  for (int i = 1; i < n; ++i)
    if (__builtin_fabsf(values[i]) > __builtin_fabsf(best)) best = values[i];
  return best;
}

inline float total(const float* values, int n) {
  float sum = values[0];
  for (int i = 1; i < n; ++i) sum += values[i];
  return sum;
}

template <int K, class Levels>
V squared_error(Column<K> g, V scale, V minimum) {
  const V over = inverse(scale);
  V sum{};
  for (int i = 0; i < K; ++i) {
    const V raised = g.x(i) + minimum;
    const V residual = raised - scale * Levels::nearest(raised * over);
    sum += g.w(i) * residual * residual;
  }
  return sum;
}

template <int K, class Levels>
V fit_scale(Column<K> g) {
  const V widest = extreme<K>(g);
  const V naive[2] = {widest / splat(Levels::kLowest), widest / splat(Levels::kHighest)};
  V best = naive[0], best_gain = splat(-1);
  const auto attempt = [&](V from) {
    const V over = inverse(from);
    V product{}, square{};
    for (int i = 0; i < K; ++i) {
      const V x = g.x(i), q = Levels::nearest(x * over), weighted = g.w(i) * q;
      product += weighted * x;
      square += weighted * q;
    }
    const V scale = divide(product, square), gain = product * scale;
    best = gain > best_gain ? scale : best;
    best_gain = gain > best_gain ? gain : best_gain;
  };
  for (const V from : naive)
    for (const float factor : kSignedFactors) attempt(from * splat(factor));
  attempt(best);
  return best;
}

struct Line {
  V scale, minimum;
};

template <int K, class Levels, bool kNegativeOnly>
Line fit_line(Column<K> g, V naive, V naive_minimum) {
  V sum_w{}, sum_x{}, square_x{};
  for (int i = 0; i < K; ++i) {
    const V x = g.x(i), w = g.w(i), weighted = w * x;
    sum_w += w, sum_x += weighted, square_x += weighted * x;
  }
  const V mean_x = sum_x / sum_w, spread_x = square_x - sum_x * mean_x;
  Line best = {naive, naive_minimum};
  V best_error = splat(__builtin_inff());
  const auto attempt = [&](V from, V raise) {
    const V over = inverse(from);
    V sum_q{}, square_q{}, product{};
    for (int i = 0; i < K; ++i) {
      const V x = g.x(i), q = Levels::nearest((x + raise) * over), weighted = g.w(i) * q;
      sum_q += weighted, square_q += weighted * q, product += weighted * x;
    }
    const V mean_q = sum_q / sum_w, covariance = product - sum_q * mean_x;
    V slope = larger(divide(covariance, square_q - sum_q * mean_q), V{});
    V minimum = slope * mean_q - mean_x;
    V error = spread_x - slope * covariance;
    if (kNegativeOnly) {
      const V through_zero = larger(divide(product, square_q), V{});
      slope = minimum < V{} ? through_zero : slope;
      error = minimum < V{} ? square_x - through_zero * product : error;
      minimum = minimum < V{} ? V{} : minimum;
    }
    best.scale = error < best_error ? slope : best.scale;
    best.minimum = error < best_error ? minimum : best.minimum;
    best_error = error < best_error ? error : best_error;
  };
  for (const float factor : kLineFactors) attempt(naive * splat(factor), naive_minimum);
  attempt(best.scale, best.minimum);
  return best;
}

// --- results of a batch: codes of group `lane` at [lane * K, (lane + 1) * K), so blocks stand in order ---

template <int K, class Levels>
void store_codes(Column<K> g, int c, V scale, V minimum, uint8_t* codes) {
  const V over = inverse(scale);
  for (int i = 0; i < K; ++i) {
    const V code = Levels::code((g.x(i) + minimum) * over);
    for (int lane = 0; lane < kWidth; ++lane) codes[(c + lane) * K + i] = uint8_t(int(code[lane]));
  }
}

// Blocks of 32 with one scale. d: [lanes].
template <class Levels>
void one_scale(const Groups<32>& groups, float* d, uint8_t* codes) {
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<32> g(groups, c);
    const V naive = rounded_to_half(extreme<32>(g) / splat(Levels::kLowest));
    const V fitted = rounded_to_half(fit_scale<32, Levels>(g));
    const V better =
        squared_error<32, Levels>(g, fitted, V{}) < squared_error<32, Levels>(g, naive, V{}) ? fitted : naive;
    store(d + c, better);
    store_codes<32, Levels>(g, c, better, V{}, codes);
  }
}

// Blocks of 32 with a scale and a minimum.
template <class Levels>
void one_line(const Groups<32>& groups, float* d, float* m, uint8_t* codes) {
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<32> g(groups, c);
    V lowest = g.x(0), highest = lowest;
    for (int i = 1; i < 32; ++i) lowest = smaller(g.x(i), lowest), highest = larger(g.x(i), highest);
    Line naive = {(highest - lowest) / splat(Levels::kHighest), -lowest};
    Line best = fit_line<32, Levels, false>(g, naive.scale, naive.minimum);
    best = {rounded_to_half(best.scale), rounded_to_half(best.minimum)};
    naive = {rounded_to_half(naive.scale), rounded_to_half(naive.minimum)};
    const V error = squared_error<32, Levels>(g, best.scale, best.minimum);
    const V naive_error = squared_error<32, Levels>(g, naive.scale, naive.minimum);
    const V scale = error < naive_error ? best.scale : naive.scale;
    const V minimum = error < naive_error ? best.minimum : naive.minimum;
    store(d + c, scale);
    store(m + c, V{} - minimum);
    store_codes<32, Levels>(g, c, scale, minimum, codes);
  }
}

// Blocks of 256 with signed integer scales -half..half - 1. d: [blocks of the batch], scales: [lanes].
template <int K, class Levels, int kHalf>
void scaled_groups(const Groups<K>& groups, float* d, float* scales, uint8_t* codes) {
  using Scales = Whole<-kHalf, kHalf - 1>;
  constexpr int kPerBlock = 256 / K, kBlocks = kLanes / kPerBlock;
  alignas(64) float fitted[kLanes], each_d[kLanes], error[kLanes], product[kLanes], square[kLanes], tried_error[kLanes];
  const auto try_neighbours = [&](Column<K> g, int c) {
    const V centre = load(scales + c), block_d = load(each_d + c);
    V best = centre, least = load(error + c);
    for (const float change : kNeighbours) {
      const V tried = Scales::nearest(centre + splat(change));
      const V its_error = squared_error<K, Levels>(g, block_d * tried, V{});
      best = its_error < least ? tried : best;
      least = its_error < least ? its_error : least;
    }
    store(scales + c, best), store(error + c, least);
  };

  for (int c = 0; c < kLanes; c += kWidth) store(fitted + c, fit_scale<K, Levels>(Column<K>(groups, c)));
  for (int b = 0; b < kBlocks; ++b) {
    d[b] = rounded_to_half(extreme(fitted + b * kPerBlock, kPerBlock) / float(-kHalf));
    for (int i = 0; i < kPerBlock; ++i) each_d[b * kPerBlock + i] = d[b];
  }
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<K> g(groups, c);
    const V block_d = load(each_d + c), rounded = Scales::nearest(load(fitted + c) * inverse(block_d));
    store(scales + c, rounded);
    store(error + c, squared_error<K, Levels>(g, block_d * rounded, V{}));
    try_neighbours(g, c);
    const V scale = load(scales + c), over = inverse(block_d * scale);
    V sum_product{}, sum_square{};
    for (int i = 0; i < K; ++i) {
      const V x = g.x(i), y = scale * Levels::nearest(x * over), weighted = g.w(i) * y;
      sum_product += weighted * x, sum_square += weighted * y;
    }
    store(product + c, sum_product), store(square + c, sum_square);
  }
  alignas(64) float tried_d[kLanes];
  for (int b = 0; b < kBlocks; ++b) {
    const int first = b * kPerBlock;
    const float best = rounded_to_half(divide(total(product + first, kPerBlock), total(square + first, kPerBlock)));
    for (int i = 0; i < kPerBlock; ++i) tried_d[first + i] = best;
  }
  for (int c = 0; c < kLanes; c += kWidth)
    store(tried_error + c, squared_error<K, Levels>(Column<K>(groups, c), load(tried_d + c) * load(scales + c), V{}));
  for (int b = 0; b < kBlocks; ++b) {
    const int first = b * kPerBlock;
    if (!(total(tried_error + first, kPerBlock) < total(error + first, kPerBlock))) continue;
    d[b] = tried_d[first];
    for (int i = first; i < first + kPerBlock; ++i) each_d[i] = d[b], error[i] = tried_error[i];
  }
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<K> g(groups, c);
    try_neighbours(g, c);
    store_codes<K, Levels>(g, c, load(each_d + c) * load(scales + c), V{}, codes);
  }
}

// Blocks of 256 with integer scales and minimums 0..highest. d, dmin: [blocks of the batch], scales, minimums: [lanes].
template <int K, class Levels, int kHighestScale>
void affine_groups(const Groups<K>& groups, float* d, float* dmin, float* scales, float* minimums, uint8_t* codes) {
  using Scales = Whole<0, kHighestScale>;
  constexpr int kPerBlock = 256 / K, kBlocks = kLanes / kPerBlock;
  alignas(64) float fitted[kLanes], fitted_minimum[kLanes], each_d[kLanes], each_dmin[kLanes], error[kLanes];
  alignas(64) float sum_w[kLanes], sum_x[kLanes], yy[kLanes], yx[kLanes], ym[kLanes], mm[kLanes], xm[kLanes];
  alignas(64) float tried_d[kLanes], tried_dmin[kLanes], tried_error[kLanes];
  // The scale's neighbours, each with the best minimum for its integers.
  const auto try_neighbours = [&](Column<K> g, int c) {
    const V block_d = load(each_d + c), block_dmin = load(each_dmin + c), over_dmin = inverse(block_dmin);
    const V weight = load(sum_w + c), mean_x = load(sum_x + c) / weight;
    const V centre = load(scales + c), centre_minimum = block_dmin * load(minimums + c);
    V best = centre, best_minimum = load(minimums + c), least = load(error + c);
    for (const float change : kItselfAndNeighbours) {
      const V tried = Scales::nearest(centre + splat(change)), scale = block_d * tried, over = inverse(scale);
      V sum_q{};
      for (int i = 0; i < K; ++i) sum_q += g.w(i) * Levels::nearest((g.x(i) + centre_minimum) * over);
      const V mean_q = sum_q / weight;
      const V tried_minimum = Scales::nearest((scale * mean_q - mean_x) * over_dmin);
      const V its_error = squared_error<K, Levels>(g, scale, block_dmin * tried_minimum);
      best = its_error < least ? tried : best;
      best_minimum = its_error < least ? tried_minimum : best_minimum;
      least = its_error < least ? its_error : least;
    }
    store(scales + c, best), store(minimums + c, best_minimum), store(error + c, least);
  };

  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<K> g(groups, c);
    V lowest = g.x(0), highest = lowest, weight{}, sum{};
    for (int i = 1; i < K; ++i) lowest = smaller(g.x(i), lowest), highest = larger(g.x(i), highest);
    for (int i = 0; i < K; ++i) weight += g.w(i), sum += g.w(i) * g.x(i);
    const V naive_minimum = V{} - smaller(lowest, V{});
    const V naive = (highest + naive_minimum) / splat(Levels::kHighest);
    const Line best = fit_line<K, Levels, true>(g, naive, naive_minimum);
    store(fitted + c, best.scale), store(fitted_minimum + c, best.minimum);
    store(sum_w + c, weight), store(sum_x + c, sum);
  }
  for (int b = 0; b < kBlocks; ++b) {
    const int first = b * kPerBlock;
    float largest = 0, largest_minimum = 0;
    for (int i = first; i < first + kPerBlock; ++i) {
      largest = fitted[i] > largest ? fitted[i] : largest;
      largest_minimum = fitted_minimum[i] > largest_minimum ? fitted_minimum[i] : largest_minimum;
    }
    d[b] = rounded_to_half(largest / float(kHighestScale));
    dmin[b] = rounded_to_half(largest_minimum / float(kHighestScale));
    for (int i = first; i < first + kPerBlock; ++i) each_d[i] = d[b], each_dmin[i] = dmin[b];
  }
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<K> g(groups, c);
    const V block_d = load(each_d + c), block_dmin = load(each_dmin + c);
    const V rounded = Scales::nearest(load(fitted + c) * inverse(block_d));
    const V rounded_minimum = Scales::nearest(load(fitted_minimum + c) * inverse(block_dmin));
    store(scales + c, rounded), store(minimums + c, rounded_minimum);
    store(error + c, squared_error<K, Levels>(g, block_d * rounded, block_dmin * rounded_minimum));
    try_neighbours(g, c);
    const V scale = load(scales + c), minimum = load(minimums + c);
    const V over = inverse(block_d * scale), raise = block_dmin * minimum;
    V sum_y{}, sum_yy{}, sum_yx{};
    for (int i = 0; i < K; ++i) {
      const V x = g.x(i), y = scale * Levels::nearest((x + raise) * over), weighted = g.w(i) * y;
      sum_y += weighted, sum_yy += weighted * y, sum_yx += weighted * x;
    }
    store(yy + c, sum_yy), store(yx + c, sum_yx), store(ym + c, sum_y * minimum);
    store(mm + c, load(sum_w + c) * minimum * minimum), store(xm + c, load(sum_x + c) * minimum);
  }
  // The least squares problem for (d, dmin), two equations a block.
  for (int b = 0; b < kBlocks; ++b) {
    const int first = b * kPerBlock;
    const float a = total(yy + first, kPerBlock), y = total(yx + first, kPerBlock), both = total(ym + first, kPerBlock);
    const float m = total(mm + first, kPerBlock), x = total(xm + first, kPerBlock);
    const float determinant = a * m - both * both;
    const float best = rounded_to_half(divide(y * m - x * both, determinant));
    const float best_min = rounded_to_half(divide(y * both - x * a, determinant));
    for (int i = first; i < first + kPerBlock; ++i) tried_d[i] = best, tried_dmin[i] = best_min;
  }
  for (int c = 0; c < kLanes; c += kWidth)
    store(tried_error + c, squared_error<K, Levels>(Column<K>(groups, c), load(tried_d + c) * load(scales + c),
                                                    load(tried_dmin + c) * load(minimums + c)));
  for (int b = 0; b < kBlocks; ++b) {
    const int first = b * kPerBlock;
    const bool lower = total(tried_error + first, kPerBlock) < total(error + first, kPerBlock);
    if (!(lower && tried_d[first] > 0 && tried_dmin[first] >= 0)) continue;
    d[b] = tried_d[first], dmin[b] = tried_dmin[first];
    for (int i = first; i < first + kPerBlock; ++i) each_d[i] = d[b], each_dmin[i] = dmin[b], error[i] = tried_error[i];
  }
  for (int c = 0; c < kLanes; c += kWidth) {
    const Column<K> g(groups, c);
    try_neighbours(g, c);
    store_codes<K, Levels>(g, c, load(each_d + c) * load(scales + c), load(each_dmin + c) * load(minimums + c), codes);
  }
}

// --- layouts ---------------------------------------------------------------------------------------------------------

inline void pack_nibbles(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 16; ++i) out[i] = uint8_t((codes[i] & 15) | (codes[i + 16] & 15) << 4);
}
inline void pack_fifth_bits(const uint8_t* codes, uint8_t* out) {
  for (int byte = 0; byte < 4; ++byte) {
    int bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (codes[8 * byte + i] >> 4) << i;
    out[byte] = uint8_t(bits);
  }
}

template <class Block, class Levels>
void encode_one_scale(const float* source, const float* weights, int64_t first, int64_t per_row, int count, void* out) {
  Groups<32> groups;
  alignas(64) float d[kLanes];
  uint8_t codes[32 * kLanes];
  load_groups<32, 32>(source, weights, first, per_row, count, groups);
  one_scale<Levels>(groups, d, codes);
  auto* block = static_cast<Block*>(out);
  for (int b = 0; b < count; ++b) {
    block[b].d = half_from_float(d[b]);
    pack_nibbles(codes + 32 * b, block[b].qs);
    if constexpr (sizeof(Block) == sizeof(block_q5_0)) pack_fifth_bits(codes + 32 * b, block[b].qh);
  }
}

template <class Block, class Levels>
void encode_one_line(const float* source, const float* weights, int64_t first, int64_t per_row, int count, void* out) {
  Groups<32> groups;
  alignas(64) float d[kLanes], m[kLanes];
  uint8_t codes[32 * kLanes];
  load_groups<32, 32>(source, weights, first, per_row, count, groups);
  one_line<Levels>(groups, d, m, codes);
  auto* block = static_cast<Block*>(out);
  for (int b = 0; b < count; ++b) {
    block[b].d = half_from_float(d[b]), block[b].m = half_from_float(m[b]);
    pack_nibbles(codes + 32 * b, block[b].qs);
    if constexpr (sizeof(Block) == sizeof(block_q5_1)) pack_fifth_bits(codes + 32 * b, block[b].qh);
  }
}

// The format's plain definition; halves round away from zero, as ggml rounds.
inline void encode_q8_0(const float* source, const float*, int64_t, int64_t, int count, void* out) {
  auto* block = static_cast<block_q8_0*>(out);
  for (int b = 0; b < count; ++b) {
    const float* x = source + 32 * b;
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
    const float d = largest / 127.0f, over = divide(1.0f, d);
    block[b].d = half_from_float(rounded_to_half(d));
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * over;
      block[b].qs[i] = int8_t(int(scaled + __builtin_copysignf(0.5f, scaled)));
    }
  }
}

// Planes of 2 bits: value 32 p + i of a half lies in bits 2 p of byte i.
inline void pack_two_bits(const uint8_t* codes, uint8_t (*qs)[32]) {
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i) {
      const uint8_t* c = codes + 128 * half + i;
      qs[half][i] = uint8_t((c[0] & 3) | (c[32] & 3) << 2 | (c[64] & 3) << 4 | (c[96] & 3) << 6);
    }
}

inline void encode_q2_k(const float* source, const float* weights, int64_t first, int64_t per_row, int count,
                        void* out) {
  Groups<16> groups;
  float d[1], dmin[1];
  alignas(64) float scales[kLanes], minimums[kLanes];
  uint8_t codes[256];
  load_groups<16, 256>(source, weights, first, per_row, count, groups);
  affine_groups<16, Whole<0, 3>, 15>(groups, d, dmin, scales, minimums, codes);
  auto& block = *static_cast<block_q2_K*>(out);
  block.d = half_from_float(d[0]), block.dmin = half_from_float(dmin[0]);
  for (int i = 0; i < 16; ++i) block.scales[i] = uint8_t(int(scales[i]) | int(minimums[i]) << 4);
  pack_two_bits(codes, block.qs);
}

inline void pack_six_bit_scales(const float* scales, const float* minimums, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    const int s = int(scales[i]), m = int(minimums[i]), s2 = int(scales[i + 4]), m2 = int(minimums[i + 4]);
    out[i] = uint8_t(s | s2 >> 4 << 6);
    out[i + 4] = uint8_t(m | m2 >> 4 << 6);
    out[i + 8] = uint8_t((s2 & 15) | (m2 & 15) << 4);
  }
}

template <class Block, class Levels>
void encode_q4_q5_k(const float* source, const float* weights, int64_t first, int64_t per_row, int count, void* out) {
  Groups<32> groups;
  float d[2], dmin[2];
  alignas(64) float scales[kLanes], minimums[kLanes];
  uint8_t codes[512];
  load_groups<32, 256>(source, weights, first, per_row, count, groups);
  affine_groups<32, Levels, 63>(groups, d, dmin, scales, minimums, codes);
  auto* block = static_cast<Block*>(out);
  for (int b = 0; b < count; ++b) {
    block[b].d = half_from_float(d[b]), block[b].dmin = half_from_float(dmin[b]);
    pack_six_bit_scales(scales + 8 * b, minimums + 8 * b, block[b].scales);
    const uint8_t* code = codes + 256 * b;
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 32; ++i)
        block[b].qs[pair][i] = uint8_t((code[64 * pair + i] & 15) | (code[64 * pair + 32 + i] & 15) << 4);
    if constexpr (sizeof(Block) == sizeof(block_q5_K))
      for (int i = 0; i < 32; ++i) {
        int bits = 0;
        for (int plane = 0; plane < 8; ++plane) bits |= (code[32 * plane + i] >> 4) << plane;
        block[b].qh[i] = uint8_t(bits);
      }
  }
}

inline void encode_q3_k(const float* source, const float* weights, int64_t first, int64_t per_row, int count,
                        void* out) {
  Groups<16> groups;
  float d[1];
  alignas(64) float scales[kLanes];
  uint8_t codes[256];
  load_groups<16, 256>(source, weights, first, per_row, count, groups);
  scaled_groups<16, Whole<-4, 3>, 32>(groups, d, scales, codes);
  auto& block = *static_cast<block_q3_K*>(out);
  block.d = half_from_float(d[0]);
  pack_two_bits(codes, block.qs);
  for (int i = 0; i < 32; ++i) {
    int bits = 0;
    for (int plane = 0; plane < 8; ++plane) bits |= (codes[32 * plane + i] >> 2) << plane;
    block.hmask[i] = uint8_t(bits);
  }
  int raised[16];
  for (int i = 0; i < 16; ++i) raised[i] = int(scales[i]) + 32;
  for (int i = 0; i < 8; ++i) block.scales[i] = uint8_t((raised[i] & 15) | (raised[i + 8] & 15) << 4);
  for (int i = 0; i < 4; ++i) {
    int bits = 0;
    for (int plane = 0; plane < 4; ++plane) bits |= (raised[4 * plane + i] >> 4) << 2 * plane;
    block.scales[8 + i] = uint8_t(bits);
  }
}

inline void encode_q6_k(const float* source, const float* weights, int64_t first, int64_t per_row, int count,
                        void* out) {
  Groups<16> groups;
  float d[1];
  alignas(64) float scales[kLanes];
  uint8_t codes[256];
  load_groups<16, 256>(source, weights, first, per_row, count, groups);
  scaled_groups<16, Whole<-32, 31>, 128>(groups, d, scales, codes);
  auto& block = *static_cast<block_q6_K*>(out);
  block.d = half_from_float(d[0]);
  for (int i = 0; i < 16; ++i) block.scales[i] = int8_t(int(scales[i]));
  for (int half = 0; half < 2; ++half) {
    const uint8_t* c = codes + 128 * half;
    for (int i = 0; i < 64; ++i) block.ql[half][i] = uint8_t((c[i] & 15) | (c[64 + i] & 15) << 4);
    for (int i = 0; i < 32; ++i)
      block.qh[half][i] = uint8_t(c[i] >> 4 | c[32 + i] >> 4 << 2 | c[64 + i] >> 4 << 4 | c[96 + i] >> 4 << 6);
  }
}

inline void encode_iq4_xs(const float* source, const float* weights, int64_t first, int64_t per_row, int count,
                          void* out) {
  Groups<32> groups;
  float d[2];
  alignas(64) float scales[kLanes];
  uint8_t codes[512];
  load_groups<32, 256>(source, weights, first, per_row, count, groups);
  scaled_groups<32, Iq4, 32>(groups, d, scales, codes);
  auto* block = static_cast<block_iq4_xs*>(out);
  for (int b = 0; b < count; ++b) {
    block[b].d = half_from_float(d[b]);
    int high = 0;
    for (int i = 0; i < 8; ++i) {
      const int raised = int(scales[8 * b + i]) + 32;
      high |= (raised >> 4) << 2 * i;
      if (i % 2)
        block[b].scales_l[i / 2] = uint8_t(block[b].scales_l[i / 2] | (raised & 15) << 4);
      else
        block[b].scales_l[i / 2] = uint8_t(raised & 15);
      pack_nibbles(codes + 256 * b + 32 * i, block[b].qs[i]);
    }
    block[b].scales_h = uint16_t(high);
  }
}

constexpr EncoderTable kTable = {{
    {int(QuantType::Q8_0), 32, sizeof(block_q8_0), 16, encode_q8_0},
    {int(QuantType::Q4_0), 32, sizeof(block_q4_0), 16, encode_one_scale<block_q4_0, Whole<-8, 7>>},
    {int(QuantType::Q5_0), 32, sizeof(block_q5_0), 16, encode_one_scale<block_q5_0, Whole<-16, 15>>},
    {int(QuantType::IQ4_NL), 32, sizeof(block_iq4_nl), 16, encode_one_scale<block_iq4_nl, Iq4>},
    {int(QuantType::Q4_1), 32, sizeof(block_q4_1), 16, encode_one_line<block_q4_1, Whole<0, 15>>},
    {int(QuantType::Q5_1), 32, sizeof(block_q5_1), 16, encode_one_line<block_q5_1, Whole<0, 31>>},
    {int(QuantType::Q2_K), 256, sizeof(block_q2_K), 1, encode_q2_k},
    {int(QuantType::Q3_K), 256, sizeof(block_q3_K), 1, encode_q3_k},
    {int(QuantType::Q4_K), 256, sizeof(block_q4_K), 2, encode_q4_q5_k<block_q4_K, Whole<0, 15>>},
    {int(QuantType::Q5_K), 256, sizeof(block_q5_K), 2, encode_q4_q5_k<block_q5_K, Whole<0, 31>>},
    {int(QuantType::Q6_K), 256, sizeof(block_q6_K), 1, encode_q6_k},
    {int(QuantType::IQ4_XS), 256, sizeof(block_iq4_xs), 2, encode_iq4_xs},
}};
