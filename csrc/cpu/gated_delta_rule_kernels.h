// Body of one instruction-set level of gated_delta_rule. Included inside an anonymous namespace by the file of each
// level, after vec_*.h and vec_math.h.
//
// Per token: S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q.
// A chunk of C tokens with G the running sum of g, D_ij = exp(G_i - G_j), S the state before it:
//   (I + A) V' = beta (V - exp(G) K S), A strictly lower triangular, A_ij = beta_i D_ij (k_i . k_j), by forward
//   substitution;  O = exp(G) Q S + P V', P_ij = D_ij (q_i . k_j) for j <= i;  S <- exp(G_C) S + K^T (exp(G_C - G) V').

inline int min_int(int a, int b) { return a < b ? a : b; }

// kDeltaChunk tokens of one value head.
struct HeadChunk {
  int64_t first;
  int key_head, value_head;
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

// out = RMSNorm(o) * norm_weight * SiLU(z) for one head of one token, from the sum of the squares of o.
inline void gated_norm(const GatedDeltaRule& p, const float* o, float sum_of_squares, int64_t token, int head) {
  const int n = p.head_v_dim;
  const Vec inverse = Vec::broadcast(float(1.0 / __builtin_sqrt(double(sum_of_squares) / n + p.eps)));
  const float* z = p.z + token * p.z_stride + int64_t(head) * n;
  float* out = p.out + (token * p.num_v_heads + head) * n;
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

void step(const GatedDeltaRule& p, int64_t token, int key_head, int value_head, float* state) {
  const int dk = p.head_k_dim, dv = p.head_v_dim;
  alignas(64) float q[kMaxDeltaHeadDim], k[kMaxDeltaHeadDim], o[kMaxDeltaHeadDim];
  const float* row = p.qkv + token * p.qkv_stride;
  const float* v = row + 2 * int64_t(p.num_k_heads) * dk + int64_t(value_head) * dv;
  l2_normalize(row + int64_t(key_head) * dk, dk, 1.0 / __builtin_sqrt(double(dk)), q);
  l2_normalize(row + int64_t(p.num_k_heads + key_head) * dk, dk, 1.0, k);
  const Gates gates = gates_of(p, token, value_head);
  const float decay = float(__builtin_exp(gates.g));
  constexpr int kN = Vec::kStepVectors;
  int c = 0;
  for (; c + kN * Vec::kWidth <= dv; c += kN * Vec::kWidth)
    step_columns<kN>(state + c, dv, dk, q, k, v + c, decay, gates.beta, o + c);
  for (; c < dv; c += Vec::kWidth) step_columns<1>(state + c, dv, dk, q, k, v + c, decay, gates.beta, o + c);
  Vec squares = Vec::broadcast(0.0f);
  for (int d = 0; d < dv; d += Vec::kWidth) squares = multiply_add(Vec::load(o + d), Vec::load(o + d), squares);
  gated_norm(p, o, reduce_add(squares), token, value_head);
}

// --- A chunk of tokens ---------------------------------------------------------------------------------------------
//
// Products go by tiles of kTile rows (tokens, or rows of the state) and one or two vectors of columns, whose sums stay
// in registers. A value head's columns never meet before the norm of its outputs, so they go in panels of two vectors:
// a panel of the state, contiguous, stays in the first-level cache while all the chunk's keys and queries pass over it.

constexpr int kTile = Vec::kTileRows;

static_assert(kDeltaChunk % kTile == 0 && kDeltaChunk % Vec::kWidth == 0 && kDeltaChunk <= 2 * Vec::kWidth);

struct ChunkScratch {
  float *q, *k;                 // [kDeltaChunk, head_k_dim], normalised
  float* k_transposed;          // [head_k_dim, kDeltaChunk]
  float *qk, *kk;               // [kDeltaChunk, kDeltaChunk], right for j <= i
  float *p, *minus_a;           // [kDeltaChunk, kDeltaChunk]
  float *new_values, *decayed;  // [kDeltaChunk, a panel's width]: V', exp(G_C - G) V'
  float* squares;               // [kDeltaChunk, Vec::kWidth], whose sums are those of the squares of o
  float* o;                     // [kDeltaChunk, head_v_dim]
  float* states;                // of each value head in turn, in panels: [panels][head_k_dim, a panel's width]
};

inline ChunkScratch divide(float* scratch, int head_k_dim, int head_v_dim) {
  ChunkScratch s;
  float** const parts[] = {&s.q,       &s.k,          &s.k_transposed, &s.qk,      &s.kk, &s.p,
                           &s.minus_a, &s.new_values, &s.decayed,      &s.squares, &s.o};
  const int widths[] = {head_k_dim,  head_k_dim, head_k_dim, kDeltaChunk, kDeltaChunk, kDeltaChunk,
                        kDeltaChunk, 32,         32,         16,          head_v_dim};
  for (int i = 0; i < 11; ++i) {
    *parts[i] = scratch;
    scratch += int64_t(kDeltaChunk) * widths[i];
  }
  s.states = scratch;
  return s;
}

template <int kC>
struct Tile {
  Vec v[kTile][kC];

  template <class Function>
  void each(Function function) {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kC; ++c) function(r, c, v[r][c]);
    }
  }

  void zero() {
    each([](int, int, Vec& x) { x = Vec::broadcast(0.0f); });
  }

  // v[r] += sum over k, in order, of a[r][k] * b[k], rows of a and b so far apart.
  void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int k_end) {
    for (int k = 0; k < k_end; ++k) {
      Vec column[kC];
#pragma GCC unroll 2
      for (int c = 0; c < kC; ++c) column[c] = Vec::load(b + k * b_stride + c * Vec::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        const Vec row = Vec::broadcast(a[r * a_stride + k]);
#pragma GCC unroll 2
        for (int c = 0; c < kC; ++c) v[r][c] = multiply_add(row, column[c], v[r][c]);
      }
    }
  }

  // v[r] = the sum over k of a[r][k] * b[k]: of each kDotBlock terms, then of those sums.
  void dot_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int k_end) {
    alignas(64) float total[kTile * kC * Vec::kWidth];
    const auto place = [&](int r, int c) { return total + (r * kC + c) * Vec::kWidth; };
    zero();
    add_product(a, a_stride, b, b_stride, min_int(kDotBlock, k_end));
    for (int k = kDotBlock; k < k_end; k += kDotBlock) {
      if (k == kDotBlock) {
        each([&](int r, int c, Vec& x) { x.store(place(r, c)); });
      } else {
        each([&](int r, int c, Vec& x) { (Vec::load(place(r, c)) + x).store(place(r, c)); });
      }
      zero();
      add_product(a + k, a_stride, b + k * b_stride, b_stride, min_int(kDotBlock, k_end - k));
    }
    if (k_end > kDotBlock) each([&](int r, int c, Vec& x) { x = Vec::load(place(r, c)) + x; });
  }
};

// out[rows of a tile][columns of kC vectors] = a b over a head dimension.
template <int kC>
void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int head_dim, float* out,
                   int64_t out_stride) {
  Tile<kC> tile;
  tile.dot_product(a, a_stride, b, b_stride, head_dim);
  for (int r = 0; r < kTile; ++r) {
    for (int c = 0; c < kC; ++c) tile.v[r][c].store(out + r * out_stride + c * Vec::kWidth);
  }
}

// Of kWidth rows of kWidth floats, the sum of each.
inline Vec sum_rows(const float* rows) {
  alignas(64) float columns[Vec::kWidth * Vec::kWidth];
  Vec::transpose(rows, Vec::kWidth, columns, Vec::kWidth);
  for (int n = Vec::kWidth / 2; n; n /= 2) {
    for (int i = 0; i < n * Vec::kWidth; i += Vec::kWidth)
      (Vec::load(columns + i) + Vec::load(columns + n * Vec::kWidth + i)).store(columns + i);
  }
  return Vec::load(columns);
}

// kWidth rows of l2_normalize at once.
inline void l2_normalize_rows(const float* x, int64_t stride, int n, double factor, float* out) {
  alignas(64) float squares[Vec::kWidth * Vec::kWidth], scales[Vec::kWidth];
  for (int r = 0; r < Vec::kWidth; ++r) {
    Vec sum[2] = {Vec::broadcast(0.0f), Vec::broadcast(0.0f)};
    for (int d = 0; d < n; d += Vec::kWidth) {
      const Vec v = Vec::load(x + r * stride + d);
      Vec& part = sum[d / Vec::kWidth % 2];
      part = multiply_add(v, v, part);
    }
    (sum[0] + sum[1]).store(squares + r * Vec::kWidth);
  }
  sum_rows(squares).store(scales);
  for (float& scale : scales) scale = float(factor / __builtin_sqrt(double(scale) + 1e-6));
  for (int r = 0; r < Vec::kWidth; ++r) {
    const Vec scale = Vec::broadcast(scales[r]);
    for (int d = 0; d < n; d += Vec::kWidth) (Vec::load(x + r * stride + d) * scale).store(out + r * n + d);
  }
}

// What the value heads of one key head share: normalised queries and keys, and their products on and below the
// diagonal.
void prepare_chunk(const GatedDeltaRule& p, const HeadChunk& chunk, const ChunkScratch& s) {
  const int dk = p.head_k_dim;
  const float* q = p.qkv + chunk.first * p.qkv_stride + int64_t(chunk.key_head) * dk;
  const float* k = q + int64_t(p.num_k_heads) * dk;
  for (int i = 0; i < kDeltaChunk; i += Vec::kWidth) {
    l2_normalize_rows(q + i * p.qkv_stride, p.qkv_stride, dk, 1.0 / __builtin_sqrt(double(dk)), s.q + i * dk);
    l2_normalize_rows(k + i * p.qkv_stride, p.qkv_stride, dk, 1.0, s.k + i * dk);
    for (int d = 0; d < dk; d += Vec::kWidth)
      Vec::transpose(s.k + i * dk + d, dk, s.k_transposed + d * kDeltaChunk + i, kDeltaChunk);
  }
  for (int i = 0; i < kDeltaChunk; i += kTile) {
    float *kk = s.kk + i * kDeltaChunk, *qk = s.qk + i * kDeltaChunk;
    if (i + kTile <= Vec::kWidth) {
      multiply_tile<1>(s.k + i * dk, dk, s.k_transposed, kDeltaChunk, dk, kk, kDeltaChunk);
      multiply_tile<1>(s.q + i * dk, dk, s.k_transposed, kDeltaChunk, dk, qk, kDeltaChunk);
    } else {
      multiply_tile<2>(s.k + i * dk, dk, s.k_transposed, kDeltaChunk, dk, kk, kDeltaChunk);
      multiply_tile<2>(s.q + i * dk, dk, s.k_transposed, kDeltaChunk, dk, qk, kDeltaChunk);
    }
  }
}

struct ChunkGates {
  alignas(64) float from_start[kDeltaChunk], to_end[kDeltaChunk], beta[kDeltaChunk];  // exp(G), exp(G_C - G)
};

// The gates, and P and -A from them.
void decay_chunk(const GatedDeltaRule& p, const HeadChunk& chunk, const ChunkScratch& s, ChunkGates& gates) {
  // A running sum is kept as a float and what the float lacks, so that differences are as exact as of doubles.
  alignas(64) float sum_high[kDeltaChunk], sum_low[kDeltaChunk];
  double sum = 0;
  for (int i = 0; i < kDeltaChunk; ++i) {
    const Gates token = gates_of(p, chunk.first + i, chunk.value_head);
    sum += token.g;
    sum_high[i] = float(sum), sum_low[i] = float(sum - double(sum_high[i]));
    gates.beta[i] = token.beta;
  }
  const Vec total_high = Vec::broadcast(sum_high[kDeltaChunk - 1]),
            total_low = Vec::broadcast(sum_low[kDeltaChunk - 1]);
  for (int i = 0; i < kDeltaChunk; i += Vec::kWidth) {
    const Vec high = Vec::load(sum_high + i), low = Vec::load(sum_low + i);
    exp_of_negative(high).store(gates.from_start + i);
    exp_of_negative((total_high - high) + (total_low - low)).store(gates.to_end + i);
  }
  const Vec never = Vec::broadcast(-__builtin_inff()), zero = Vec::broadcast(0.0f);
  for (int i = 0; i < kDeltaChunk; ++i) {
    const Vec high = Vec::broadcast(sum_high[i]), low = Vec::broadcast(sum_low[i]), b = Vec::broadcast(-gates.beta[i]);
    const int end = i / kTile * kTile + kTile;  // what the products read of this row
    for (int j = 0; j < end; j += Vec::kWidth) {
      const Vec exponent = (high - Vec::load(sum_high + j)) + (low - Vec::load(sum_low + j));
      const Vec decay = exp_of_negative(select_first(i + 1 - j, exponent, never));
      const int64_t place = i * kDeltaChunk + j;
      select_first(i + 1 - j, decay * Vec::load(s.qk + place), zero).store(s.p + place);
      select_first(i - j, b * decay * Vec::load(s.kk + place), zero).store(s.minus_a + place);
    }
  }
}

// Rows lie a page or more apart, where no hardware prefetcher follows: while one chunk is at work, what the next one
// reads and writes is asked for piece by piece.
class Ahead {
 public:
  // kDeltaChunk rows of n floats.
  void add(const float* first, int64_t stride, int n) { parts_[count_++] = {first, stride, n}; }

  // Asks for a row of one part.
  void next() {
    if (part_ == count_) return;
    const Part& part = parts_[part_];
    for (int i = 0; i < part.n; i += 16) __builtin_prefetch(part.first + row_ * part.stride + i, 0, 2);
    if (++row_ == kDeltaChunk) row_ = 0, ++part_;
  }

 private:
  struct Part {
    const float* first;
    int64_t stride;
    int n;
  };
  Part parts_[5];
  int count_ = 0, part_ = 0, row_ = 0;
};

// One panel of one value head: kC vectors of columns from `column` on. `v` are the chunk's values there, rows
// p.qkv_stride apart; `state` the panel.
template <int kC>
void advance_panel(const GatedDeltaRule& p, const ChunkScratch& s, const ChunkGates& gates, const float* v, int column,
                   float* state, Ahead& ahead) {
  constexpr int kPanel = kC * Vec::kWidth;
  const int dk = p.head_k_dim, dv = p.head_v_dim;
  Tile<kC> tile;
  // Products with the state wait here for the sums over the chunk's tokens: terms that are added to something larger
  // one by one would each be rounded as it is.
  alignas(64) float held[kTile * kPanel];
  for (int i = 0; i < kDeltaChunk; i += kTile) {
    ahead.next();
    tile.dot_product(s.k + i * dk, dk, state, kPanel, dk);
    tile.each([&](int r, int c, Vec& x) {
      const Vec decay = Vec::broadcast(gates.from_start[i + r]), b = Vec::broadcast(gates.beta[i + r]);
      const float* value = v + (i + r) * p.qkv_stride + c * Vec::kWidth;
      (b * (Vec::load(value) - decay * x)).store(held + r * kPanel + c * Vec::kWidth);
    });
    ahead.next();
    const float* a = s.minus_a + i * kDeltaChunk;
    tile.zero();
    tile.add_product(a, kDeltaChunk, s.new_values, kPanel, i);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const Vec decay = Vec::broadcast(gates.to_end[i + j]);
#pragma GCC unroll 2
      for (int c = 0; c < kC; ++c) {
        const int64_t place = (i + j) * kPanel + c * Vec::kWidth;
        tile.v[j][c] = Vec::load(held + j * kPanel + c * Vec::kWidth) + tile.v[j][c];
        tile.v[j][c].store(s.new_values + place);
        (decay * tile.v[j][c]).store(s.decayed + place);
      }
#pragma GCC unroll 8
      for (int r = j + 1; r < kTile; ++r) {
        const Vec factor = Vec::broadcast(a[r * kDeltaChunk + i + j]);
#pragma GCC unroll 2
        for (int c = 0; c < kC; ++c) tile.v[r][c] = multiply_add(factor, tile.v[j][c], tile.v[r][c]);
      }
    }
  }
  for (int i = 0; i < kDeltaChunk; i += kTile) {
    ahead.next();
    tile.dot_product(s.q + i * dk, dk, state, kPanel, dk);
    tile.each([&](int r, int c, Vec& x) { x.store(held + r * kPanel + c * Vec::kWidth); });
    ahead.next();
    tile.zero();
    tile.add_product(s.p + i * kDeltaChunk, kDeltaChunk, s.new_values, kPanel, i + kTile);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const Vec decay = Vec::broadcast(gates.from_start[i + r]);
      float* squares = s.squares + (i + r) * Vec::kWidth;
      Vec sum = column ? Vec::load(squares) : Vec::broadcast(0.0f);
#pragma GCC unroll 2
      for (int c = 0; c < kC; ++c) {
        const Vec o = multiply_add(decay, Vec::load(held + r * kPanel + c * Vec::kWidth), tile.v[r][c]);
        o.store(s.o + int64_t(i + r) * dv + column + c * Vec::kWidth);
        sum = multiply_add(o, o, sum);
      }
      sum.store(squares);
    }
  }
  const Vec whole = Vec::broadcast(gates.from_start[kDeltaChunk - 1]);
  for (int d = 0; d < dk; d += kTile) {
    ahead.next();
    tile.dot_product(s.k_transposed + d * kDeltaChunk, kDeltaChunk, s.decayed, kPanel, kDeltaChunk);
    for (int r = 0; r < kTile; ++r) {
      for (int c = 0; c < kC; ++c) {
        float* place = state + int64_t(d + r) * kPanel + c * Vec::kWidth;
        multiply_add(whole, Vec::load(place), tile.v[r][c]).store(place);
      }
    }
  }
}

void advance_chunk(const GatedDeltaRule& p, const HeadChunk& chunk, const ChunkScratch& s, float* state, Ahead ahead) {
  const int dk = p.head_k_dim, dv = p.head_v_dim;
  ChunkGates gates;
  decay_chunk(p, chunk, s, gates);
  const float* v =
      p.qkv + chunk.first * p.qkv_stride + 2 * int64_t(p.num_k_heads) * dk + int64_t(chunk.value_head) * dv;
  int c = 0;
  for (; c + 2 * Vec::kWidth <= dv; c += 2 * Vec::kWidth) {
    advance_panel<2>(p, s, gates, v + c, c, state + int64_t(c) * dk, ahead);
  }
  if (c < dv) advance_panel<1>(p, s, gates, v + c, c, state + int64_t(c) * dk, ahead);
  for (int i = 0; i < kDeltaChunk; i += Vec::kWidth) {
    alignas(64) float sums[Vec::kWidth];
    sum_rows(s.squares + i * Vec::kWidth).store(sums);
    for (int r = 0; r < Vec::kWidth; ++r)
      gated_norm(p, s.o + (i + r) * dv, sums[r], chunk.first + i + r, chunk.value_head);
  }
}

// A state [head_k_dim, head_v_dim] to or from its panels.
template <bool kToPanels>
void copy_panels(float* rows, float* panels, int head_k_dim, int head_v_dim) {
  for (int c = 0; c < head_v_dim;) {
    const int width = min_int(2 * Vec::kWidth, head_v_dim - c);
    for (int d = 0; d < head_k_dim; ++d, panels += width) {
      for (int i = 0; i < width; i += Vec::kWidth) {
        float* row = rows + int64_t(d) * head_v_dim + c + i;
        kToPanels ? Vec::load(row).store(panels + i) : Vec::load(panels + i).store(row);
      }
    }
    c += width;
  }
}

void run(const GatedDeltaRule& p, const DeltaTile& tile, float* scratch) {
  const int dk = p.head_k_dim, dv = p.head_v_dim, group = p.num_v_heads / p.num_k_heads;
  const ChunkScratch s = divide(scratch, dk, dv);
  const int64_t state_size = int64_t(dk) * dv;
  float* states = p.state + p.sequences.slot(tile.sequence) * p.num_v_heads * state_size;
  const int64_t begin = p.sequences.begin(tile.sequence), end = p.sequences.end(tile.sequence);
  const int64_t chunks_end = end - (end - begin) % kDeltaChunk;
  const auto value_head = [&](int i) {
    return p.tiled ? tile.key_head + (tile.first + i) * p.num_k_heads : tile.key_head * group + tile.first + i;
  };
  for (int i = 0; i < tile.count && begin < chunks_end; ++i)
    copy_panels<true>(states + value_head(i) * state_size, s.states + i * state_size, dk, dv);
  for (int64_t first = begin; first < chunks_end; first += kDeltaChunk) {
    for (int i = 0; i < tile.count; ++i) {
      const HeadChunk chunk = {first, tile.key_head, value_head(i)};
      if (i == 0) prepare_chunk(p, chunk, s);
      const int64_t next = first + kDeltaChunk, value = int64_t(chunk.value_head) * dv;
      Ahead ahead;
      if (next < chunks_end) {
        const float* row = p.qkv + next * p.qkv_stride;
        if (i == 0) {
          ahead.add(row + int64_t(chunk.key_head) * dk, p.qkv_stride, dk);
          ahead.add(row + int64_t(p.num_k_heads + chunk.key_head) * dk, p.qkv_stride, dk);
        }
        ahead.add(row + 2 * int64_t(p.num_k_heads) * dk + value, p.qkv_stride, dv);
        ahead.add(p.z + next * p.z_stride + value, p.z_stride, dv);
        ahead.add(p.out + next * p.num_v_heads * dv + value, int64_t(p.num_v_heads) * dv, dv);
      }
      advance_chunk(p, chunk, s, s.states + i * state_size, ahead);
    }
  }
  for (int i = 0; i < tile.count; ++i) {
    float* state = states + value_head(i) * state_size;
    if (begin < chunks_end) copy_panels<false>(state, s.states + i * state_size, dk, dv);
    for (int64_t token = chunks_end; token < end; ++token) step(p, token, tile.key_head, value_head(i), state);
  }
}
