// What a level can multiply and read at most, for probes.h, over `Lanes`.
// Included by quant_dot_kernels.h, inside its unnamed namespace.

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
  constexpr int kChains = 8;
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
