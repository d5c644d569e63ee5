// Body of one instruction-set level of paged_attention. Included inside an anonymous namespace by the file of each
// level, after vec_*.h and vec_math.h.

constexpr int kDotBlock = 32;  // a score is summed in blocks of this many dimensions: smaller rounding errors

// Keys of a page, transposed and converted: out[d][key], for the first `vectors` vectors of keys. Meanwhile as much as
// these keys take is fetched from two other places: pages lie scattered, so the processor does not foresee them.
template <class T>
void transpose_keys(const T* keys, int head_dim, int vectors, float* out, const T* soon, const T* next) {
  constexpr int kBlock = Vec::kWidth * Vec::kWidth, kLine = 64 / int(sizeof(T));
  for (int v = 0; v < vectors; ++v) {
    for (int d = 0; d < head_dim; d += Vec::kWidth) {
      const int64_t done = int64_t(v) * Vec::kWidth * head_dim + int64_t(d) * Vec::kWidth;
      for (int i = 0; i < kBlock; i += kLine) {
        __builtin_prefetch(soon + done + i, 0, 3);
        __builtin_prefetch(next + done + i, 0, 2);
      }
      Vec::transpose(keys + int64_t(v) * Vec::kWidth * head_dim + d, head_dim, out + d * kPageSize + v * Vec::kWidth,
                     kPageSize);
    }
  }
}

template <class T>
void convert(const T* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) Vec::load(in + i).store(out + i);
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

template <class T>
void write_kv_as(const PagedAttention& p, int64_t begin, int64_t end) {
  const int d = p.head_dim;
  alignas(64) float key[kMaxHeadDim];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / p.num_kv_heads, head = i % p.num_kv_heads;
    const float* k = p.qkv + token * p.qkv_width() + p.keys_at() + head * d;
    const float* v = k + int64_t(p.num_kv_heads) * d;
    const int64_t page = p.slot_mapping[token] / kPageSize, offset = p.slot_mapping[token] % kPageSize;
    const int64_t place = ((page * p.num_kv_heads + head) * kPageSize + offset) * d;
    norm_and_rotate(k, p.k_norm, p.eps, p.cos_sin + p.positions[token] * p.rotary_dim, p.rotary_dim, d, 1.0f, key);
    for (int j = 0; j < d; j += Vec::kWidth) {
      Vec::load(key + j).store(static_cast<T*>(p.k_cache) + place + j);
      Vec::load(v + j).store(static_cast<T*>(p.v_cache) + place + j);
    }
  }
}

void write_kv(const PagedAttention& p, int64_t begin, int64_t end) {
  p.half_cache ? write_kv_as<Half>(p, begin, end) : write_kv_as<float>(p, begin, end);
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
  const float factor = exp_of_negative(Vec::broadcast(*maximum - new_maximum)).first();
  *sum = *sum * factor + reduce_add(total);
  *maximum = new_maximum;
  return factor;
}

template <class T>
void attend_as(const PagedAttention& p, const AttentionTile& tile, float* scratch) {
  const int head_dim = p.head_dim, group = p.num_heads / p.num_kv_heads;
  const int rows = int(tile.num_tokens) * group;
  float* keys = scratch;                                     // [head_dim, kPageSize]
  float* values = keys + kPageSize * head_dim;               // [kPageSize, head_dim]
  float* queries = values + kPageSize * head_dim;            // [kAttentionTileRows, head_dim]
  float* context = queries + kAttentionTileRows * head_dim;  // [kAttentionTileRows, head_dim]
  float* scores = context + kAttentionTileRows * head_dim;   // [kAttentionTileRows, kPageSize]
  float maximum[kAttentionTileRows], sum[kAttentionTileRows], factor[kAttentionTileRows];
  float ones[kAttentionTileRows];
  for (float& one : ones) one = 1.0f;

  for (int r = 0; r < rows; ++r) {
    const int64_t token = tile.first_token + r / group;
    const int64_t head = int64_t(tile.kv_head) * group + r % group;
    const float* q = p.qkv + token * p.qkv_width() + head * p.query_stride();
    norm_and_rotate(q, p.q_norm, p.eps, p.cos_sin + p.positions[token] * p.rotary_dim, p.rotary_dim, head_dim, p.scale,
                    queries + r * head_dim);
    maximum[r] = -__builtin_inff();
    sum[r] = 0.0f;
  }
  for (int64_t i = 0; i < int64_t(rows) * head_dim; ++i) context[i] = 0.0f;

  const int32_t* pages = p.page_tables + tile.sequence * p.pages_per_sequence;
  const int64_t length = p.positions[tile.first_token + tile.num_tokens - 1] + 1;  // keys that the last row sees
  for (int64_t first_key = 0; first_key < length; first_key += kPageSize) {
    const int num_keys = length - first_key < kPageSize ? int(length - first_key) : kPageSize;
    const int vectors = (num_keys + Vec::kWidth - 1) / Vec::kWidth;
    const int64_t place =
        (int64_t(pages[first_key / kPageSize]) * p.num_kv_heads + tile.kv_head) * kPageSize * head_dim;
    const T* v = static_cast<const T*>(p.v_cache) + place;
    const int64_t next_page = pages[first_key + kPageSize < length ? first_key / kPageSize + 1 : first_key / kPageSize];
    const int64_t next_place = (next_page * p.num_kv_heads + tile.kv_head) * kPageSize * head_dim;
    const T* k = static_cast<const T*>(p.k_cache);
    transpose_keys(k + place, head_dim, vectors, keys, v, k + next_place);
    for (int d = 0; d < head_dim; d += kDotBlock) {
      multiply(queries + d, head_dim, keys + d * kPageSize, kPageSize,
               head_dim - d < kDotBlock ? head_dim - d : kDotBlock, d ? ones : nullptr, scores, kPageSize, rows,
               vectors);
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t visible = p.positions[tile.first_token + r / group] + 1 - first_key;
      const int valid = visible < 0 ? 0 : visible < num_keys ? int(visible) : num_keys;
      factor[r] = softmax_step(scores + r * kPageSize, valid, vectors, maximum + r, sum + r);
    }
    if (rows <= kRows || sizeof(T) == sizeof(float)) {  // each value is used once, or needs no conversion
      multiply(scores, kPageSize, v, head_dim, num_keys, factor, context, head_dim, rows, head_dim / Vec::kWidth);
    } else {
      convert(v, int64_t(num_keys) * head_dim, values);
      multiply(scores, kPageSize, values, head_dim, num_keys, factor, context, head_dim, rows, head_dim / Vec::kWidth);
    }
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
  p.half_cache ? attend_as<Half>(p, tile, scratch) : attend_as<float>(p, tile, scratch);
}
