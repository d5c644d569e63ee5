// What a level can multiply and read at most, for probes.h, over `Lanes`.
// Included by quant_dot_kernels.h, inside its unnamed namespace.

// Numbers a little below 1 that the compiler cannot know. Where sums began alike, or halves of a register pair did, it
// would see that they stay alike, and multiply once for all of them.
struct Unknown {
  float numbers[8][kLanes];

  Unknown() {
    volatile float number = 0.999f;
    for (auto& row : numbers) {
      for (float& one : row) one = number, number = number * 0.9999f;
    }
  }
  F floats(int i) const { return Lanes::load(numbers[i]); }
  I integers(int i) const { return Lanes::splat_shifted(int32_t(1e6f * numbers[i][0]), 0); }
};

// As the matmuls multiply: where sums of products are kept narrow for a while, codes are read for each product, which
// the compiler would else move out of the loop.
template <class L>
double int8_rate_of(int64_t turns) {
  constexpr int kChains = 8;
  const Unknown unknown;
  alignas(64) uint8_t bytes[2 * kChains][64];
  for (int i = 0; i < 2 * kChains * 64; ++i) bytes[i / 64][i % 64] = uint8_t(i % 61);
  const int8_t four[4] = {1, -2, 3, -4};
  const typename L::X x = L::quad(four);
  I sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = unknown.integers(c);
  if constexpr (L::kNarrowSums) {
    for (int64_t t = 0; t < turns; ++t) {
      const auto* codes = bytes + t % kChains;
      B narrow = L::products(L::load_bytes(codes[0]), x);
#pragma GCC unroll Lanes::kUnroll
      for (int c = 1; c < kChains; ++c) narrow = L::add_narrow(narrow, L::products(L::load_bytes(codes[c]), x));
      sum[0] = L::add_widened(sum[0], narrow);
    }
  } else {
    const B codes = L::load_bytes(bytes[0]);
    for (int64_t t = 0; t < turns; ++t) {
#pragma GCC unroll Lanes::kUnroll
      for (int c = 0; c < kChains; ++c) sum[c] = L::dot(sum[c], codes, x);
    }
  }
  float out[kLanes];
  volatile float sink;
  for (const auto& s : sum) L::store(out, L::to_float(s)), sink = out[0];
  (void)sink;
  return double(turns) * kChains * 64;
}

double int8_rate_loop(int64_t turns) { return int8_rate_of<Lanes>(turns); }

double float_rate_loop(int64_t turns) {
  constexpr int kChains = 8;
  const Unknown unknown;
  const F w = unknown.floats(0);
  F sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = unknown.floats(c);
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
  constexpr int kChains = 8;
  const Unknown unknown;
  alignas(64) uint16_t ones[32];  // and other numbers near 1, for no two halves of a register pair to be alike
  for (int i = 0; i < 32; ++i) ones[i] = uint16_t(0x3f70 + i);
  const B w = Lanes::load_bytes(reinterpret_cast<const uint8_t*>(ones));
  const Lanes::X x = Lanes::quad(reinterpret_cast<const int8_t*>(ones));
  F sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = unknown.floats(c);
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
