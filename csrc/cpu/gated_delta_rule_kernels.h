// Body of one instruction-set level of gated_delta_rule. Included inside an anonymous namespace by the file of each
// level, after vec_*.h and vec_math.h.
//
// Per token: S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q.
// A chunk of C tokens with G the running sum of g, D_ij = exp(G_i - G_j), S the state before it:
//   (I + A) V' = beta (V - exp(G) K S), A strictly lower triangular, A_ij = beta_i D_ij (k_i . k_j), by forward
//   substitution;  O = exp(G) Q S + P V', P_ij = D_ij (q_i . k_j) for j <= i;  S <- exp(G_C) S + K^T (exp(G_C - G) V').

inline int min_int(int a, int b) { return a < b ? a : b; }

// Tokens [first, first + length) of one value head.
struct HeadChunk {
  int64_t first;
  int length, key_head, value_head;
};

struct Gates {
  double g;  // log of the decay; summed over a chunk in double, so that differences of sums keep their bits
  float beta;
};

inline Gates gates_of(const GatedDeltaRule& p, int64_t token, int head) {
  const double x = double(p.a[token * p.a_stride + head]) + p.dt_bias[head];
  const double softplus = (x > 0 ? x : 0.0) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x));
  const double b = p.b[token * p.b_stride + head];
  return {p.a_coefficient[head] * softplus, float(1.0 / (1.0 + __builtin_exp(-b)))};
}

// out = factor * x / sqrt(sum x^2 + 1e-6)
inline void l2_normalize(const float* x, int n, double factor, float* out) {
  Vec squares[2] = {Vec::broadcast(0.0f), Vec::broadcast(0.0f)};
  for (int d = 0; d < n; d += 16) {
    for (int i = 0; i < 16; i += Vec::kWidth) {
      const Vec v = Vec::load(x + d + i);
      Vec& sum = squares[i / Vec::kWidth];
      sum = multiply_add(v, v, sum);
    }
  }
  const double sum = double(reduce_add(squares[0])) + (Vec::kWidth < 16 ? double(reduce_add(squares[1])) : 0.0);
  const Vec scale = Vec::broadcast(float(factor / __builtin_sqrt(sum + 1e-6)));
  for (int d = 0; d < n; d += Vec::kWidth) (Vec::load(x + d) * scale).store(out + d);
}

// out = RMSNorm(o) * norm_weight * SiLU(z) for one head of one token.
inline void gated_norm(const GatedDeltaRule& p, const float* o, int64_t token, int head) {
  const int n = p.head_v_dim;
  const float* z = p.z + token * p.z_stride + int64_t(head) * n;
  float* out = p.out + (token * p.num_v_heads + head) * n;
  Vec squares = Vec::broadcast(0.0f);
  for (int d = 0; d < n; d += Vec::kWidth) squares = multiply_add(Vec::load(o + d), Vec::load(o + d), squares);
  const Vec inverse = Vec::broadcast(float(1.0 / __builtin_sqrt(double(reduce_add(squares)) / n + p.eps)));
  for (int d = 0; d < n; d += Vec::kWidth) {
    (Vec::load(o + d) * inverse * Vec::load(p.norm_weight + d) * silu(Vec::load(z + d))).store(out + d);
  }
}

// --- One token -----------------------------------------------------------------------------------------------------

constexpr int kDotBlock = 16;  // sums over a head dimension go by blocks of so many terms: smaller rounding errors

// The step for kN vectors of columns of the state: its rows are read, then read again and written.
template <int kN>
void step_columns(float* state, int64_t stride, int head_k_dim, const float* q, const float* k, const float* v,
                  float decay, float beta, float* o) {
  constexpr int kChains = 2;  // sums in flight, to hide the latency of an addition
  const Vec zero = Vec::broadcast(0.0f), factor = Vec::broadcast(decay);
  Vec delta[kN], total[kN];
  for (Vec& t : total) t = zero;
  for (int first = 0; first < head_k_dim; first += kDotBlock) {
    const int end = min_int(first + kDotBlock, head_k_dim);
    Vec sum[kChains][kN];
    for (auto& chain : sum) {
      for (Vec& s : chain) s = zero;
    }
    for (int d = first; d < end; d += kChains) {
#pragma GCC unroll 2
      for (int u = 0; u < kChains; ++u) {
        const Vec key = Vec::broadcast(k[d + u]);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c)
          sum[u][c] = multiply_add(key, Vec::load(state + (d + u) * stride + c * Vec::kWidth), sum[u][c]);
      }
    }
    for (int c = 0; c < kN; ++c) total[c] = total[c] + (sum[0][c] + sum[1][c]);
  }
  for (int c = 0; c < kN; ++c) {
    delta[c] = Vec::broadcast(beta) * (Vec::load(v + c * Vec::kWidth) - factor * total[c]);
    total[c] = zero;
  }
  for (int first = 0; first < head_k_dim; first += kDotBlock) {
    const int end = min_int(first + kDotBlock, head_k_dim);
    Vec sum[kChains][kN];
    for (auto& chain : sum) {
      for (Vec& s : chain) s = zero;
    }
    for (int d = first; d < end; d += kChains) {
#pragma GCC unroll 2
      for (int u = 0; u < kChains; ++u) {
        const Vec key = Vec::broadcast(k[d + u]), query = Vec::broadcast(q[d + u]);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) {
          float* place = state + (d + u) * stride + c * Vec::kWidth;
          const Vec s = multiply_add(key, delta[c], factor * Vec::load(place));
          s.store(place);
          sum[u][c] = multiply_add(query, s, sum[u][c]);
        }
      }
    }
    for (int c = 0; c < kN; ++c) total[c] = total[c] + (sum[0][c] + sum[1][c]);
  }
  for (int c = 0; c < kN; ++c) total[c].store(o + c * Vec::kWidth);
}

void step(const GatedDeltaRule& p, const HeadChunk& chunk, float* state) {
  const int dk = p.head_k_dim, dv = p.head_v_dim;
  alignas(64) float q[kMaxDeltaHeadDim], k[kMaxDeltaHeadDim], o[kMaxDeltaHeadDim];
  for (int i = 0; i < chunk.length; ++i) {
    const int64_t token = chunk.first + i;
    const float* row = p.qkv + token * p.qkv_stride;
    const float* v = row + 2 * int64_t(p.num_k_heads) * dk + int64_t(chunk.value_head) * dv;
    l2_normalize(row + int64_t(chunk.key_head) * dk, dk, 1.0 / __builtin_sqrt(double(dk)), q);
    l2_normalize(row + int64_t(p.num_k_heads + chunk.key_head) * dk, dk, 1.0, k);
    const Gates gates = gates_of(p, token, chunk.value_head);
    const float decay = float(__builtin_exp(gates.g));
    constexpr int kN = Vec::kStepVectors;
    int c = 0;
    for (; c + kN * Vec::kWidth <= dv; c += kN * Vec::kWidth)
      step_columns<kN>(state + c, dv, dk, q, k, v + c, decay, gates.beta, o + c);
    for (; c < dv; c += Vec::kWidth) step_columns<1>(state + c, dv, dk, q, k, v + c, decay, gates.beta, o + c);
    gated_norm(p, o, token, chunk.value_head);
  }
}

// --- A chunk of tokens ---------------------------------------------------------------------------------------------

struct ChunkScratch {
  float *q, *k;         // [kDeltaChunk, head_k_dim], normalised
  float* k_transposed;  // [head_k_dim, kDeltaChunk]
  float *qk, *kk;       // [kDeltaChunk, kDeltaChunk], right for j <= i
  float *p, *minus_a;   // [kDeltaChunk, kDeltaChunk]
  float *values, *o;    // [kDeltaChunk, head_v_dim]
};

inline ChunkScratch divide(float* scratch, int head_k_dim, int head_v_dim) {
  ChunkScratch s;
  float** const parts[] = {&s.q, &s.k, &s.k_transposed, &s.qk, &s.kk, &s.p, &s.minus_a, &s.values, &s.o};
  const int widths[] = {head_k_dim,  head_k_dim,  head_k_dim, kDeltaChunk, kDeltaChunk,
                        kDeltaChunk, kDeltaChunk, head_v_dim, head_v_dim};
  for (int i = 0; i < 9; ++i) {
    *parts[i] = scratch;
    scratch += int64_t(kDeltaChunk) * widths[i];
  }
  return s;
}

// What the value heads of one key head share: normalised queries and keys, and their products on and below the
// diagonal.
void prepare_chunk(const GatedDeltaRule& p, const HeadChunk& chunk, const ChunkScratch& s) {
  const int dk = p.head_k_dim, length = chunk.length;
  const int padded = (length + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
  const double scale = 1.0 / __builtin_sqrt(double(dk));
  for (int i = 0; i < length; ++i) {
    const float* row = p.qkv + (chunk.first + i) * p.qkv_stride;
    l2_normalize(row + int64_t(chunk.key_head) * dk, dk, scale, s.q + i * dk);
    l2_normalize(row + int64_t(p.num_k_heads + chunk.key_head) * dk, dk, 1.0, s.k + i * dk);
  }
  for (int64_t i = int64_t(length) * dk; i < int64_t(padded) * dk; ++i) s.k[i] = 0.0f;
  for (int i = 0; i < padded; i += Vec::kWidth) {
    for (int d = 0; d < dk; d += Vec::kWidth)
      Vec::transpose(s.k + int64_t(i) * dk + d, dk, s.k_transposed + d * kDeltaChunk + i, kDeltaChunk);
  }
  float ones[kRows];
  for (float& one : ones) one = 1.0f;
  for (int i = 0; i < length; i += kRows) {
    const int rows = min_int(kRows, length - i), vectors = (i + rows + Vec::kWidth - 1) / Vec::kWidth;
    for (int d = 0; d < dk; d += kDotBlock) {
      const int n = min_int(kDotBlock, dk - d);
      const float *factor = d ? ones : nullptr, *keys = s.k_transposed + d * kDeltaChunk;
      const int64_t place = i * dk + d, product = i * kDeltaChunk;
      multiply(s.k + place, dk, keys, kDeltaChunk, n, factor, s.kk + product, kDeltaChunk, rows, vectors);
      multiply(s.q + place, dk, keys, kDeltaChunk, n, factor, s.qk + product, kDeltaChunk, rows, vectors);
    }
  }
}

void advance_chunk(const GatedDeltaRule& p, const HeadChunk& chunk, const ChunkScratch& s, float* state) {
  const int dk = p.head_k_dim, dv = p.head_v_dim, length = chunk.length, value_vectors = dv / Vec::kWidth;
  // A running sum is kept as a float and what the float lacks, so that differences are as exact as of doubles.
  alignas(64) float sum_high[kDeltaChunk], sum_low[kDeltaChunk];
  alignas(64) float from_start[kDeltaChunk], to_end[kDeltaChunk], beta[kDeltaChunk], ones[kDeltaChunk];
  double sum = 0;
  for (int i = 0; i < length; ++i) {
    const Gates gates = gates_of(p, chunk.first + i, chunk.value_head);
    sum += gates.g;
    sum_high[i] = float(sum), sum_low[i] = float(sum - double(sum_high[i]));
    beta[i] = gates.beta;
  }
  for (int i = length; i < kDeltaChunk; ++i) sum_high[i] = sum_low[i] = 0.0f;
  const Vec total_high = Vec::broadcast(sum_high[length - 1]), total_low = Vec::broadcast(sum_low[length - 1]);
  const Vec never = Vec::broadcast(-__builtin_inff());
  for (int i = 0; i < kDeltaChunk; i += Vec::kWidth) {
    const Vec high = Vec::load(sum_high + i), low = Vec::load(sum_low + i);
    exp_of_negative(high).store(from_start + i);
    exp_of_negative((total_high - high) + (total_low - low)).store(to_end + i);
    Vec::broadcast(1.0f).store(ones + i);
  }
  for (int i = 0; i < length; ++i) {
    const Vec high = Vec::broadcast(sum_high[i]), low = Vec::broadcast(sum_low[i]), b = Vec::broadcast(-beta[i]);
    const int end = min_int(length, i / kRows * kRows + kRows);  // what the products below read of this row
    for (int j = 0; j < end; j += Vec::kWidth) {
      const Vec exponent = (high - Vec::load(sum_high + j)) + (low - Vec::load(sum_low + j));
      const Vec decay = exp_of_negative(select_first(i + 1 - j, exponent, never));
      const int64_t place = i * kDeltaChunk + j;
      const Vec zero = Vec::broadcast(0.0f);
      select_first(i + 1 - j, decay * Vec::load(s.qk + place), zero).store(s.p + place);
      select_first(i - j, b * decay * Vec::load(s.kk + place), zero).store(s.minus_a + place);
    }
  }

  for (int d = 0; d < dk; d += kDotBlock) {
    const int n = min_int(kDotBlock, dk - d);
    const float* factor = d ? ones : nullptr;
    multiply(s.k + d, dk, state + d * dv, dv, n, factor, s.values, dv, length, value_vectors);
    multiply(s.q + d, dk, state + d * dv, dv, n, factor, s.o, dv, length, value_vectors);
  }
  for (int i = 0; i < length; ++i) {
    const float* v =
        p.qkv + (chunk.first + i) * p.qkv_stride + 2 * int64_t(p.num_k_heads) * dk + int64_t(chunk.value_head) * dv;
    const Vec decay = Vec::broadcast(from_start[i]), b = Vec::broadcast(beta[i]);
    float* row = s.values + i * dv;
    for (int d = 0; d < dv; d += Vec::kWidth) (b * (Vec::load(v + d) - decay * Vec::load(row + d))).store(row + d);
  }
  for (int i = 0; i < length; i += kRows) {
    const int rows = min_int(kRows, length - i);
    float* block = s.values + i * dv;
    if (i) multiply(s.minus_a + i * kDeltaChunk, kDeltaChunk, s.values, dv, i, ones, block, dv, rows, value_vectors);
    for (int r = 1; r < rows; ++r) {
      const float* a = s.minus_a + (i + r) * kDeltaChunk + i;
      for (int d = 0; d < dv; d += Vec::kWidth) {
        Vec x = Vec::load(block + r * dv + d);
        for (int j = 0; j < r; ++j) x = multiply_add(Vec::broadcast(a[j]), Vec::load(block + j * dv + d), x);
        x.store(block + r * dv + d);
      }
    }
    multiply(s.p + i * kDeltaChunk, kDeltaChunk, s.values, dv, i + rows, from_start + i, s.o + i * dv, dv, rows,
             value_vectors);
  }
  for (int i = 0; i < length; ++i) gated_norm(p, s.o + i * dv, chunk.first + i, chunk.value_head);

  for (int i = 0; i < length; ++i) {
    const Vec decay = Vec::broadcast(to_end[i]);
    float* row = s.values + i * dv;
    for (int d = 0; d < dv; d += Vec::kWidth) (decay * Vec::load(row + d)).store(row + d);
  }
  const float whole = from_start[length - 1];
  float factor[kRows];
  for (float& f : factor) f = whole;
  for (int d = 0; d < dk; d += kRows) {
    multiply(s.k_transposed + d * kDeltaChunk, kDeltaChunk, s.values, dv, length, factor, state + d * dv, dv,
             min_int(kRows, dk - d), value_vectors);
  }
}

void run(const GatedDeltaRule& p, const DeltaTile& tile, float* scratch) {
  const ChunkScratch s = divide(scratch, p.head_k_dim, p.head_v_dim);
  const int group = p.num_v_heads / p.num_k_heads;
  const int64_t state_size = int64_t(p.head_k_dim) * p.head_v_dim;
  float* states = p.state + p.sequences.slot(tile.sequence) * p.num_v_heads * state_size;
  const int64_t end = p.sequences.end(tile.sequence);
  for (int64_t first = p.sequences.begin(tile.sequence); first < end; first += kDeltaChunk) {
    const int length = end - first < kDeltaChunk ? int(end - first) : kDeltaChunk;
    HeadChunk chunk = {first, length, tile.key_head, 0};
    if (length >= kDeltaChunkFrom) prepare_chunk(p, chunk, s);
    for (int i = tile.first; i < tile.first + tile.count; ++i) {
      chunk.value_head = p.tiled ? tile.key_head + i * p.num_k_heads : tile.key_head * group + i;
      float* state = states + chunk.value_head * state_size;
      length >= kDeltaChunkFrom ? advance_chunk(p, chunk, s, state) : step(p, chunk, state);
    }
  }
}
