// Body of one instruction-set level of paged_attention. Included inside an anonymous namespace by the file of each
// level, after vec_*.h and vec_math.h.

constexpr int kDotBlock = 32;  // a score is summed in blocks of this many dimensions: smaller rounding errors

// Fetches other memory while a matrix is read, as many bytes of it as of the matrix: pages lie scattered, so the
// processor does not foresee them.
struct Ahead {
  const char* at;

  template <int kBytes>
  void step() {
#pragma GCC unroll 16
    for (int i = 0; i < (kBytes + 63) / 64; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += (kBytes + 63) / 64 * 64;
  }
};

struct NoAhead {
  template <int kBytes>
  void step() {}
};

// A matrix of a page, converted each time it is read: for few rows, which read it once.
template <class T>
struct StoredMatrix {
  Matrix<T> matrix;
  Ahead& ahead;

  template <int kC>
  void load(int64_t k, int first, Vec (&out)[kC]) {
    ahead.step<kC * Vec::kWidth* int(sizeof(T))>();
    matrix.template load<kC>(k, first, out);
  }
};

// The same of codes [keys, dimensions] with the scales [dimensions / 32, keys], as floats.
template <>
struct StoredMatrix<int8_t> {
  Matrix<int8_t> codes;
  const float* scales;
  Ahead& ahead;

  template <int kC>
  void load(int64_t k, int first, Vec (&out)[kC]) {
    ahead.step<kC * Vec::kWidth>();
    codes.load<kC>(k, first, out);
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c)
      out[c] = out[c] * Vec::broadcast(scales[(first + c) * Vec::kWidth / kScaleBlock * kPageSize + k]);
  }
};

template <class T>
void convert(const T* in, int64_t n, float* out, Ahead& ahead) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    if (i * sizeof(T) % 64 == 0) ahead.step<64>();
    Vec::load(in + i).store(out + i);
  }
}

// RMSNorm and rotation of one head (of its first rotary_dim dimensions), then a factor. Squares are summed in double so
// that any order gives the same float, and multiplications and additions stay separate: the cached key is equal bit for
// bit to the Python reference's.
void norm_and_rotate(const float* x, const float* weight, double eps, const float* cos_sin, int rotary_dim,
                     int head_dim, float factor, float* out) {
  double squares[8] = {};
  for (int d = 0; d < head_dim; d += 8) {
    for (int i = 0; i < 8; ++i) squares[i] += double(x[d + i]) * x[d + i];
  }
  double sum = 0;
  for (int i = 0; i < 8; ++i) sum += squares[i];
  const Vec inverse = Vec::broadcast(float(1.0 / __builtin_sqrt(sum / head_dim + eps)));
  const Vec f = Vec::broadcast(factor);
  const int half = rotary_dim / 2;
  int d = 0;
  for (; d + Vec::kWidth <= half; d += Vec::kWidth) {
    const Vec a = Vec::load(x + d) * inverse * Vec::load(weight + d);
    const Vec b = Vec::load(x + half + d) * inverse * Vec::load(weight + half + d);
    const Vec cosine = Vec::load(cos_sin + d), sine = Vec::load(cos_sin + half + d);
    ((a * cosine - b * sine) * f).store(out + d);
    ((b * cosine + a * sine) * f).store(out + half + d);
  }
  for (; d < half; ++d) {  // head_dim 80: halves of 40
    const float root = inverse.first();
    const float a = x[d] * root * weight[d], b = x[half + d] * root * weight[half + d];
    out[d] = (a * cos_sin[d] - b * cos_sin[half + d]) * factor;
    out[half + d] = (b * cos_sin[d] + a * cos_sin[half + d]) * factor;
  }
  for (d = rotary_dim; d + Vec::kWidth <= head_dim; d += Vec::kWidth) {
    (Vec::load(x + d) * inverse * Vec::load(weight + d) * f).store(out + d);
  }
  for (; d < head_dim; ++d) out[d] = x[d] * inverse.first() * weight[d] * factor;
}

// One block of Q8_0, quant/quantize.py bit for bit but that what is not finite gives a scale of NaN. Returns the scale
// before it is rounded to float16.
inline float quantise_block(const float* x, int8_t* codes) {
  Vec largest = Vec::broadcast(0.0f), poison = Vec::broadcast(0.0f);
  for (int i = 0; i < kScaleBlock; i += Vec::kWidth) {
    const Vec v = Vec::load(x + i);
    largest = max(largest, max(v, Vec::broadcast(0.0f) - v));
    poison = multiply_add(v, Vec::broadcast(0.0f), poison);
  }
  const float scale = reduce_max(largest) / 127.0f + reduce_add(poison);
  if (scale != scale) {
    for (int i = 0; i < kScaleBlock; ++i) codes[i] = 0;
    return scale;
  }
  float over = 1.0f / scale;
  if (over > 3.402823466e38f) over = 0.0f;
  for (int i = 0; i < kScaleBlock; ++i) {
    const float scaled = x[i] * over;
    codes[i] = int8_t(int(scaled + __builtin_copysignf(0.5f, scaled)));
  }
  return scale;
}

// Scales of a head as they are stored.
inline void round_scales(float* scales, Half* out) {
  for (int i = 0; i < kMaxHeadDim / kScaleBlock; i += Vec::kWidth)
    min(Vec::broadcast(65504.0f), Vec::load(scales + i)).store(out + i);  // NaN stays
}

// The keys of a page lie [head_dim, kPageSize], its values [kPageSize, head_dim].
template <class T>
struct PageWriter {
  T *k, *v;

  PageWriter(const PagedAttention& p, int64_t page, int64_t head)
      : k(static_cast<T*>(p.k_cache) + (page * p.num_kv_heads + head) * kPageSize * p.head_dim),
        v(static_cast<T*>(p.v_cache) + (page * p.num_kv_heads + head) * kPageSize * p.head_dim) {}

  void write(const float* key, const float* value, int64_t offset, int head_dim) {
    alignas(64) T stored[kMaxHeadDim];
    for (int d = 0; d < head_dim; d += Vec::kWidth) {
      Vec::load(key + d).store(stored + d);
      Vec::load(value + d).store(v + offset * head_dim + d);
    }
    for (int d = 0; d < head_dim; ++d) k[d * kPageSize + offset] = stored[d];
  }
};

// Codes, for keys [head_dim / 4, kPageSize, 4], then scales [head_dim / 32, kPageSize] in float16.
template <>
struct PageWriter<int8_t> {
  int8_t *k, *v;

  PageWriter(const PagedAttention& p, int64_t page, int64_t head)
      : k(static_cast<int8_t*>(p.k_cache) + (page * p.num_kv_heads + head) * quantised_page_bytes(p.head_dim)),
        v(static_cast<int8_t*>(p.v_cache) + (page * p.num_kv_heads + head) * quantised_page_bytes(p.head_dim)) {}

  void write(const float* key, const float* value, int64_t offset, int head_dim) {
    alignas(64) int8_t codes[kMaxHeadDim];
    quantise(key, codes, k + kPageSize * head_dim, offset, head_dim);
    for (int d = 0; d < head_dim; d += 4) __builtin_memcpy(k + d * kPageSize + 4 * offset, codes + d, 4);
    quantise(value, v + offset * head_dim, v + kPageSize * head_dim, offset, head_dim);
  }

 private:
  static void quantise(const float* x, int8_t* codes, int8_t* scales, int64_t offset, int head_dim) {
    alignas(64) float exact[kMaxHeadDim / kScaleBlock] = {};
    alignas(64) Half rounded[kMaxHeadDim / kScaleBlock];
    for (int d = 0; d < head_dim; d += kScaleBlock) exact[d / kScaleBlock] = quantise_block(x + d, codes + d);
    round_scales(exact, rounded);
    for (int b = 0; b < head_dim / kScaleBlock; ++b)
      __builtin_memcpy(scales + (b * kPageSize + offset) * sizeof(Half), rounded + b, sizeof(Half));
  }
};

template <class T>
void write_kv_as(const PagedAttention& p, int64_t begin, int64_t end) {
  const int d = p.head_dim;
  alignas(64) float key[kMaxHeadDim];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / p.num_tokens, token = i % p.num_tokens;
    const float* k = p.qkv + token * p.qkv_width() + p.keys_at() + head * d;
    const int64_t page = p.slot_mapping[token] / kPageSize, offset = p.slot_mapping[token] % kPageSize;
    norm_and_rotate(k, p.k_norm, p.eps, p.cos_sin + p.positions[token] * p.rotary_dim, p.rotary_dim, d, 1.0f, key);
    PageWriter<T>(p, page, head).write(key, k + int64_t(p.num_kv_heads) * d, offset, d);
  }
}

void write_kv(const PagedAttention& p, int64_t begin, int64_t end) {
  switch (p.kv_type) {
    case QuantType::F32:
      return write_kv_as<float>(p, begin, end);
    case QuantType::F16:
      return write_kv_as<Half>(p, begin, end);
    default:
      return write_kv_as<int8_t>(p, begin, end);
  }
}

// The step of the online softmax for one row and one page. `scores` becomes exp(score - new maximum), 0 from `valid`
// on; returns the factor by which what was summed before shrinks. With no valid key nothing changes and the factor
// is 1.
float softmax_step(float* scores, int valid, int vectors, float* maximum, float* sum) {
  const Vec infinite = Vec::broadcast(-__builtin_inff());
  Vec s[kPageSize / Vec::kWidth];
  Vec top = Vec::broadcast(*maximum);
  for (int v = 0; v < vectors; ++v) {
    s[v] = select_first(valid - v * Vec::kWidth, Vec::load(scores + v * Vec::kWidth), infinite);
    top = max(top, s[v]);
  }
  const float new_maximum = reduce_max(top);
  const Vec m = Vec::broadcast(new_maximum);
  Vec total = Vec::broadcast(0.0f);
  for (int v = 0; v < vectors; ++v) {
    const Vec e = exp_of_negative(s[v] - m);
    e.store(scores + v * Vec::kWidth);
    total = total + e;
  }
  const float factor = new_maximum == *maximum ? 1.0f : exp_of_negative(Vec::broadcast(*maximum - new_maximum)).first();
  *sum = *sum * factor + reduce_add(total);
  *maximum = new_maximum;
  return factor;
}

// What the queries of a tile meet, page by page: the scores of a page's keys, then the sum of its values. One for each
// way of storing them.
template <class T>
class Pages {
 public:
  Pages(const PagedAttention& p, int kv_head, float* scratch) : p_(p), kv_head_(kv_head), page_(scratch) {
    for (float& one : ones_) one = 1.0f;
  }

  void take_queries(const float* queries, int rows) { queries_ = queries, rows_ = rows; }

  void scores(int64_t page, int vectors, float* out) {
    const T* k = at(p_.k_cache, page);
    Ahead ahead{reinterpret_cast<const char*>(at(p_.v_cache, page))};
    if (read_once()) {
      multiply_blocks(StoredMatrix<T>{{k, kPageSize}, ahead}, vectors, out);
    } else {
      convert(k, int64_t(kPageSize) * p_.head_dim, page_, ahead);
      multiply_blocks(Matrix<float>{page_, kPageSize}, vectors, out);
    }
  }

  void add_values(int64_t page, int64_t next_page, const float* weights, const float* factor, int num_keys,
                  float* context) {
    const T* v = at(p_.v_cache, page);
    Ahead ahead{reinterpret_cast<const char*>(at(p_.k_cache, next_page))};
    const int d = p_.head_dim;
    if (read_once()) {
      multiply(weights, kPageSize, StoredMatrix<T>{{v, d}, ahead}, num_keys, factor, context, d, rows_,
               d / Vec::kWidth);
    } else {
      convert(v, int64_t(num_keys) * d, page_, ahead);
      multiply(weights, kPageSize, Matrix<float>{page_, d}, num_keys, factor, context, d, rows_, d / Vec::kWidth);
    }
  }

 private:
  const T* at(const void* cache, int64_t page) const {
    return static_cast<const T*>(cache) + (page * p_.num_kv_heads + kv_head_) * kPageSize * p_.head_dim;
  }
  bool read_once() const { return rows_ <= kRows; }

  template <class B>
  void multiply_blocks(B keys, int vectors, float* out) {
    const int head_dim = p_.head_dim;
    for (int d = 0; d < head_dim; d += kDotBlock) {
      multiply(queries_ + d, head_dim, keys, head_dim - d < kDotBlock ? head_dim - d : kDotBlock, d ? ones_ : nullptr,
               out, kPageSize, rows_, vectors);
      skip_rows(keys);
    }
  }
  static void skip_rows(StoredMatrix<T>& m) { m.matrix.data += kDotBlock * kPageSize; }
  static void skip_rows(Matrix<float>& m) { m.data += kDotBlock * kPageSize; }

  const PagedAttention& p_;
  int kv_head_, rows_ = 0;
  const float* queries_ = nullptr;
  float* page_;  // [kPageSize * head_dim]
  float ones_[kAttentionTileRows];
};

// Scores are sums of products of codes, block by block: queries are quantised too. Their scales stay in float32.
template <>
class Pages<int8_t> {
 public:
  Pages(const PagedAttention& p, int kv_head, float* scratch)
      : p_(p), kv_head_(kv_head), blocks_(p.head_dim / kScaleBlock), page_(scratch) {
    k_scales_ = page_ + kPageSize * p.head_dim;
    v_scales_ = k_scales_ + kPageSize * blocks_;
    query_scales_ = v_scales_ + kPageSize * blocks_;
    query_sums_ = reinterpret_cast<int32_t*>(query_scales_ + kAttentionTileRows * blocks_);
    query_codes_ = reinterpret_cast<int8_t*>(query_sums_ + kAttentionTileRows * blocks_);
  }

  void take_queries(const float* queries, int rows) {
    rows_ = rows;
    for (int i = 0; i < rows * blocks_; ++i) {
      int8_t* codes = query_codes_ + i * kScaleBlock;
      query_scales_[i] = quantise_block(queries + i * kScaleBlock, codes);
      query_sums_[i] = 0;
      for (int j = 0; j < kScaleBlock; ++j) query_sums_[i] += codes[j];
    }
  }

  void scores(int64_t page, int vectors, float* out) {
    const int8_t *k = at(p_.k_cache, page), *v = at(p_.v_cache, page);
    Ahead ahead{reinterpret_cast<const char*>(v)};
    read_scales(k, v, k_scales_);
    score_some<Ahead>(k, 0, vectors, out, ahead);
    NoAhead nothing;  // the first rows have fetched all
    for (int r = kFew; r < rows_; r += kFew) score_some<NoAhead>(k, r, vectors, out, nothing);
  }

  void add_values(int64_t page, int64_t next_page, const float* weights, const float* factor, int num_keys,
                  float* context) {
    const int8_t* v = at(p_.v_cache, page);
    const int d = p_.head_dim, vectors = d / Vec::kWidth;
    const int8_t* next_k = at(p_.k_cache, next_page);
    read_scales(v, next_k, v_scales_);
    Ahead ahead{reinterpret_cast<const char*>(next_k)};
    StoredMatrix<int8_t> stored{{v, d}, v_scales_, ahead};
    if (rows_ <= kRows) {
      multiply(weights, kPageSize, stored, num_keys, factor, context, d, rows_, vectors);
      return;
    }
    for (int k = 0; k < num_keys; ++k) {
      for (int c = 0; c < vectors; c += kScaleBlock / Vec::kWidth) {
        Vec values[kScaleBlock / Vec::kWidth];
        stored.load(k, c, values);
        for (int i = 0; i < kScaleBlock / Vec::kWidth; ++i) values[i].store(page_ + k * d + (c + i) * Vec::kWidth);
      }
    }
    multiply(weights, kPageSize, Matrix<float>{page_, d}, num_keys, factor, context, d, rows_, vectors);
  }

 private:
  const int8_t* at(const void* cache, int64_t page) const {
    return static_cast<const int8_t*>(cache) + (page * p_.num_kv_heads + kv_head_) * quantised_page_bytes(p_.head_dim);
  }

  // Fetches those of another page meanwhile.
  void read_scales(const int8_t* page, const int8_t* other, float* out) const {
    Ahead ahead{reinterpret_cast<const char*>(other + kPageSize * p_.head_dim)};
    for (int b = 0; b < blocks_; ++b) ahead.step<kPageSize* int(sizeof(Half))>();
    const auto* scales = reinterpret_cast<const Half*>(page + kPageSize * p_.head_dim);
    for (int i = 0; i < kPageSize * blocks_; i += Vec::kWidth) Vec::load(scales + i).store(out + i);
  }

  static constexpr int kFew = 4;  // rows of a register block

  template <class A>
  void score_some(const int8_t* k, int row, int vectors, float* out, A& ahead) {
    switch (rows_ - row) {
      case 1:
        score_rows<1>(k, row, vectors, out, ahead);
        break;
      case 2:
        score_rows<2>(k, row, vectors, out, ahead);
        break;
      case 3:
        score_rows<3>(k, row, vectors, out, ahead);
        break;
      default:
        score_rows<kFew>(k, row, vectors, out, ahead);
    }
  }

  template <int kR, class A>
  void score_rows(const int8_t* k, int row, int vectors, float* out, A& ahead) {
    constexpr int kC = Vec::kColumns;
    int c = 0;
    for (; c + kC <= vectors; c += kC) score_block<kR, kC>(k, row, c, out, ahead);
    for (; c < vectors; ++c) score_block<kR, 1>(k, row, c, out, ahead);
  }

  template <int kR, int kC, class A>
  void score_block(const int8_t* k, int row, int first, float* out, A& ahead) {
    const int head_dim = p_.head_dim;
    Vec score[kR][kC];
    for (auto& line : score) {
      for (Vec& s : line) s = Vec::broadcast(0.0f);
    }
    for (int b = 0; b < blocks_; ++b) {
      Ints sum[kR][kC];
      for (int r = 0; r < kR; ++r) {
        for (Ints& s : sum[r]) s = Ints::begin(query_sums_[(row + r) * blocks_ + b]);
      }
      for (int d = b * kScaleBlock; d < (b + 1) * kScaleBlock; d += 4) {
        Fours keys[kC];
        ahead.template step<kC * Vec::kWidth * 4>();
#pragma GCC unroll 8
        for (int i = 0; i < kC; ++i) keys[i] = Fours::load(k + d * kPageSize + (first + i) * Vec::kWidth * 4);
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) {
          int32_t query;
          __builtin_memcpy(&query, query_codes_ + (row + r) * head_dim + d, sizeof query);
#pragma GCC unroll 8
          for (int i = 0; i < kC; ++i) sum[r][i].add_products(keys[i], query);
        }
      }
      for (int i = 0; i < kC; ++i) {
        const Vec k_scale = Vec::load(k_scales_ + b * kPageSize + (first + i) * Vec::kWidth);
        for (int r = 0; r < kR; ++r) {
          const Vec scale = k_scale * Vec::broadcast(query_scales_[(row + r) * blocks_ + b]);
          score[r][i] = multiply_add(sum[r][i].to_floats(), scale, score[r][i]);
        }
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int i = 0; i < kC; ++i) score[r][i].store(out + (row + r) * kPageSize + (first + i) * Vec::kWidth);
    }
  }

  const PagedAttention& p_;
  int kv_head_, rows_ = 0, blocks_;
  float *page_, *k_scales_, *v_scales_,
      *query_scales_;    // [kPageSize, head_dim], 2 x [blocks, kPageSize], [rows, blocks]
  int32_t* query_sums_;  // [rows, blocks]
  int8_t* query_codes_;  // [rows, head_dim]
};

template <class T>
void attend_as(const PagedAttention& p, const AttentionTile& tile, float* scratch) {
  const int head_dim = p.head_dim, group = p.num_heads / p.num_kv_heads;
  const int rows = int(tile.num_tokens) * group;
  float* queries = scratch;                                  // [kAttentionTileRows, head_dim]
  float* context = queries + kAttentionTileRows * head_dim;  // [kAttentionTileRows, head_dim]
  float* scores = context + kAttentionTileRows * head_dim;   // [kAttentionTileRows, kPageSize]
  Pages<T> kv(p, tile.kv_head, scores + kAttentionTileRows * kPageSize);
  float maximum[kAttentionTileRows], sum[kAttentionTileRows], factor[kAttentionTileRows];

  for (int r = 0; r < rows; ++r) {
    const int64_t token = tile.first_token + r / group;
    const int64_t head = int64_t(tile.kv_head) * group + r % group;
    const float* q = p.qkv + token * p.qkv_width() + head * p.query_stride();
    norm_and_rotate(q, p.q_norm, p.eps, p.cos_sin + p.positions[token] * p.rotary_dim, p.rotary_dim, head_dim, p.scale,
                    queries + r * head_dim);
    maximum[r] = -__builtin_inff();
    sum[r] = 0.0f;
  }
  kv.take_queries(queries, rows);
  for (int64_t i = 0; i < int64_t(rows) * head_dim; ++i) context[i] = 0.0f;

  const int32_t* pages = p.page_tables + tile.sequence * p.pages_per_sequence;
  const int64_t length = p.positions[tile.first_token + tile.num_tokens - 1] + 1;  // keys that the last row sees
  for (int64_t first_key = 0; first_key < length; first_key += kPageSize) {
    const int num_keys = length - first_key < kPageSize ? int(length - first_key) : kPageSize;
    const int32_t* page = pages + first_key / kPageSize;
    kv.scores(*page, (num_keys + Vec::kWidth - 1) / Vec::kWidth, scores);
    for (int r = 0; r < rows; ++r) {
      const int64_t visible = p.positions[tile.first_token + r / group] + 1 - first_key;
      const int valid = visible < 0 ? 0 : visible < num_keys ? int(visible) : num_keys;
      factor[r] =
          softmax_step(scores + r * kPageSize, valid, (num_keys + Vec::kWidth - 1) / Vec::kWidth, maximum + r, sum + r);
    }
    kv.add_values(*page, first_key + kPageSize < length ? page[1] : *page, scores, factor, num_keys, context);
  }

  for (int r = 0; r < rows; ++r) {
    const int64_t token = tile.first_token + r / group;
    const int64_t head = int64_t(tile.kv_head) * group + r % group;
    float* out = p.ctx + (token * p.num_heads + head) * head_dim;
    const Vec inverse = Vec::broadcast(1.0f / sum[r]);
    for (int d = 0; d < head_dim; d += Vec::kWidth) (Vec::load(context + r * head_dim + d) * inverse).store(out + d);
    if (!p.gated) continue;
    const float* gate = p.qkv + token * p.qkv_width() + head * p.query_stride() + head_dim;
    for (int d = 0; d < head_dim; d += Vec::kWidth) (Vec::load(out + d) * sigmoid(Vec::load(gate + d))).store(out + d);
  }
}

void attend(const PagedAttention& p, const AttentionTile& tile, float* scratch) {
  switch (p.kv_type) {
    case QuantType::F32:
      return attend_as<float>(p, tile, scratch);
    case QuantType::F16:
      return attend_as<Half>(p, tile, scratch);
    default:
      return attend_as<int8_t>(p, tile, scratch);
  }
}
