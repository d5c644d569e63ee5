// Products with weights that are stored as F32, F16 or BF16, over `Lanes`.
// Included by quant_dot_kernels.h, inside its unnamed namespace.

// A step multiplies what stands side by side in a packed group: a column of F32 or F16, a pair of columns of BF16.
template <QuantType kType>
struct FloatStep {
  using Chunk = FloatChunk;
  static constexpr int kColumns = 1;
  static constexpr int kBytes = kType == QuantType::F16 ? 32 : 64;  // of 16 rows
  static F load(const uint8_t* w) {
    if constexpr (kType == QuantType::F16) return Lanes::load_half(w);
    return Lanes::load(reinterpret_cast<const float*>(w));
  }
  static F multiply_add(F weight, const FloatChunk& x, int step, F total) {
    return Lanes::fma(weight, Lanes::splat(x.x[step]), total);
  }
};
template <>
struct FloatStep<QuantType::BF16> {
  using Chunk = RoundedChunk;
  static constexpr int kColumns = 2, kBytes = 64;
  static B load(const uint8_t* w) { return Lanes::load_bytes(w); }
  static F multiply_add(const B& weights, const RoundedChunk& x, int step, F total) {
    return Lanes::dot_bfloat16(total, weights, Lanes::quad(reinterpret_cast<const int8_t*>(x.x + 2 * step)));
  }
};

// kSwapped: of each two steps the second first. `next`, unless null: as many bytes to fetch as a weight group has here.
template <QuantType kType, int kGroups, int kRows, bool kSwapped = false>
inline void float_register_tile(const uint8_t* a, const uint8_t* b, int depth,
                                const typename FloatStep<kType>::Chunk* x, float* sums, const uint8_t* next = nullptr) {
  using Step = FloatStep<kType>;
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::load(sums + r * kSumStride + n * kLanes);
  const uint8_t* w[2] = {a, b};
  const int steps = div_up(depth, Step::kColumns);
  for (int i = 0; i < steps; ++i) {
    const int k = kSwapped ? i ^ 1 : i;
    decltype(Step::load(a)) weight[kGroups];
    for (int n = 0; n < kGroups; ++n) weight[n] = Step::load(w[n] + k * Step::kBytes);
    if (next) __builtin_prefetch(next + k * Step::kBytes, 0, 2);
#pragma GCC unroll Lanes::kUnroll
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kGroups; ++n) total[r][n] = Step::multiply_add(weight[n], x[r], k, total[r][n]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) Lanes::store(sums + r * kSumStride + n * kLanes, total[r][n]);
}

// Rows kRows at a time, then those that are left in one go. The first `fetching` blocks fetch one of `next` each.
template <QuantType kType, int kGroups, bool kSwapped, int kRows = Lanes::kFloatTileRows>
void float_tile_rows(const uint8_t* a, const uint8_t* b, const uint8_t* const* next, int fetching, int depth,
                     const typename FloatStep<kType>::Chunk* x, int rows, float* sums) {
  for (; rows >= kRows; rows -= kRows, x += kRows, sums += kRows * kSumStride, --fetching)
    float_register_tile<kType, kGroups, kRows, kSwapped>(a, b, depth, x, sums, fetching > 0 ? *next++ : nullptr);
  if constexpr (kRows > 1) {
    if (rows > 0) float_tile_rows<kType, kGroups, kSwapped, kRows - 1>(a, b, next, fetching, depth, x, rows, sums);
  }
}

template <QuantType kType, bool kSwapped = false>
void float_tile_of(const uint8_t* a, const uint8_t* b, const uint8_t* const* next, int depth,
                   const typename FloatStep<kType>::Chunk* x, int rows, float* sums) {
  if (b && Lanes::kTileGroups == 2) {
    float_tile_rows<kType, 2, kSwapped>(a, b, next, next ? 2 : 0, depth, x, rows, sums);
  } else {
    float_tile_rows<kType, 1, kSwapped>(a, a, next, next ? 1 : 0, depth, x, rows, sums);
    if (b)
      float_tile_rows<kType, 1, kSwapped>(b, b, next ? next + 1 : next, next ? 1 : 0, depth, x, rows, sums + kLanes);
  }
}

void float_tile(const float* a, const float* b, int depth, const FloatChunk* x, int rows, float* sums) {
  float_tile_of<QuantType::F32>(reinterpret_cast<const uint8_t*>(a), reinterpret_cast<const uint8_t*>(b), nullptr,
                                depth, x, rows, sums);
}

void widen(QuantType type, const uint8_t* source, int depth, float* out) {
  if (type == QuantType::F16) {
    for (int k = 0; k < depth; ++k) Lanes::store(out + k * kLanes, Lanes::load_half(source + k * 32));
    return;
  }
  for (int k = 0; k < depth; k += 2) {
    const B pairs = Lanes::load_bytes(source + k * 32);
    Lanes::store(out + k * kLanes, Lanes::even(pairs)), Lanes::store(out + (k + 1) * kLanes, Lanes::odd(pairs));
  }
}

// Without the instruction taking pairs apart costs as much as multiplying: it is done once here, for so few columns
// that both groups' weights stay in the first-level cache. Odd columns are added first: the instruction's order.
void bfloat16_tile_as_floats(const uint8_t* a, const uint8_t* b, const uint8_t* const* next, int depth,
                             const RoundedChunk* x, int rows, float* sums) {
  constexpr int kStep = Lanes::kFloatTileRows, kDepth = kChunk / 2;
  alignas(64) float weights[2][kDepth * kLanes];
  FloatChunk floats[kStep];
  for (int k0 = 0; k0 < depth; k0 += kDepth) {
    const int columns = 2 * div_up(depth - k0 < kDepth ? depth - k0 : kDepth, 2);
    widen(QuantType::BF16, a + k0 * 2 * kLanes, columns, weights[0]);
    if (b) widen(QuantType::BF16, b + k0 * 2 * kLanes, columns, weights[1]);
    const auto *w0 = reinterpret_cast<const uint8_t*>(weights[0]), *w1 = reinterpret_cast<const uint8_t*>(weights[1]);
    for (int r = 0; r < rows; r += kStep) {
      const int count = rows - r < kStep ? rows - r : kStep;
      for (int i = 0; i < count; ++i)
        for (int k = 0; k < columns; ++k) floats[i].x[k] = float_from_bfloat16(x[r + i].x[k0 + k]);
      const bool fetches = k0 + r == 0;  // as many steps of floats as the next chunk of pairs has lines
      float_tile_of<QuantType::F32, true>(w0, b ? w1 : nullptr, fetches ? next : nullptr, columns, floats, count,
                                          sums + r * kSumStride);
    }
  }
}

void bfloat16_tile(const uint8_t* a, const uint8_t* b, const uint8_t* const* next, int depth, const RoundedChunk* x,
                   int rows, float* sums) {
  if constexpr (Lanes::kMultipliesBfloat16) {
    float_tile_of<QuantType::BF16>(a, b, next, depth, x, rows, sums);
  } else {
    bfloat16_tile_as_floats(a, b, next, depth, x, rows, sums);
  }
}

template <QuantType kType, int kGroups, int kRows>
void float_matvec_rows(const uint8_t* a, const uint8_t* b, int64_t cols, const typename FloatStep<kType>::Chunk* x,
                       int64_t chunk_stride, float* sums) {
  using Step = FloatStep<kType>;
  // Each of two groups reads on where its next one is: neighbours are followed by two others, a gate and its up by
  // theirs.
  const int64_t group_bytes = (cols + Step::kColumns - 1) / Step::kColumns * Step::kBytes;
  const int64_t padded = (group_bytes + 63) / 64 * 64, skipped = kGroups == 2 && b - a == padded ? padded : 0;
  const uint8_t* w[2] = {a, b};
  F total[kRows][kGroups];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) total[r][n] = Lanes::zero();
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk, x += chunk_stride) {
    const int steps = div_up(cols - k0 < kChunk ? cols - k0 : kChunk, Step::kColumns);
    const int64_t at = k0 / Step::kColumns * Step::kBytes;
    const int64_t ahead = k0 + kChunk < cols ? at + kChunk / Step::kColumns * Step::kBytes : padded + skipped;
#pragma GCC unroll Lanes::kUnroll
    for (int k = 0; k < steps; ++k) {
      for (int n = 0; n < kGroups; ++n) {
        if (Step::kBytes == 64 || k % 2 == 0) __builtin_prefetch(w[n] + ahead + k * Step::kBytes, 0, 3);
        const auto weight = Step::load(w[n] + at + k * Step::kBytes);
        for (int r = 0; r < kRows; ++r) total[r][n] = Step::multiply_add(weight, x[r], k, total[r][n]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kGroups; ++n) Lanes::store(sums + r * kSumStride + n * kLanes, total[r][n]);
}

template <QuantType kType, int kGroups>
void float_matvec_of(const uint8_t* a, const uint8_t* b, int64_t cols, const typename FloatStep<kType>::Chunk* x,
                     int64_t chunk_stride, int rows, float* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    float_matvec_rows<kType, kGroups, 4>(a, b, cols, x + r, chunk_stride, sums + r * kSumStride);
  for (; r < rows; ++r) float_matvec_rows<kType, kGroups, 1>(a, b, cols, x + r, chunk_stride, sums + r * kSumStride);
}

template <QuantType kType>
void float_matvec_type(const uint8_t* a, const uint8_t* b, int64_t cols, const typename FloatStep<kType>::Chunk* x,
                       int64_t chunk_stride, int rows, float* sums) {
  if (b) {
    float_matvec_of<kType, 2>(a, b, cols, x, chunk_stride, rows, sums);
  } else {
    float_matvec_of<kType, 1>(a, a, cols, x, chunk_stride, rows, sums);
  }
}

void float_matvec(QuantType type, const uint8_t* a, const uint8_t* b, int64_t cols, const FloatChunk* x,
                  int64_t chunk_stride, int rows, float* sums) {
  if (type == QuantType::F16) return float_matvec_type<QuantType::F16>(a, b, cols, x, chunk_stride, rows, sums);
  float_matvec_type<QuantType::F32>(a, b, cols, x, chunk_stride, rows, sums);
}

void bfloat16_matvec(const uint8_t* a, const uint8_t* b, int64_t cols, const RoundedChunk* x, int64_t chunk_stride,
                     int rows, float* sums) {
  float_matvec_type<QuantType::BF16>(a, b, cols, x, chunk_stride, rows, sums);
}
