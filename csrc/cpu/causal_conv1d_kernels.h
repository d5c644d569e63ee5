// Body of one instruction-set level of causal_conv1d. Included inside an anonymous namespace by the file of each level,
// after vec_*.h and vec_math.h.

// out = SiLU(sum over taps, in order, of taps[j] * rows[j]) for one vector of channels.
template <int kTaps>
inline Vec convolve_vector(const Vec* taps, const float* const* rows, int64_t c, int num_taps) {
  Vec sum = taps[0] * Vec::load(rows[0] + c);
  const int n = kTaps ? kTaps : num_taps;
#pragma GCC unroll 8
  for (int j = 1; j < n; ++j) sum = multiply_add(taps[j], Vec::load(rows[j] + c), sum);
  return silu(sum);
}

// `rows` of the inputs that token t of the sequence sees, oldest first; input i of the sequence lies in the state while
// i < 0.
inline void input_rows(const CausalConv1d& p, const float* state, const float* x, int64_t t, const float** rows) {
  for (int j = 0; j < p.taps; ++j) {
    const int64_t i = t - (p.taps - 1) + j;
    rows[j] = i < 0 ? state + (p.taps - 1 + i) * p.channels : x + i * p.x_stride;
  }
}

template <int kTaps>
void convolve_as(const CausalConv1d& p, int64_t sequence, int64_t first, int count) {
  const int64_t begin = p.sequences.begin(sequence), length = p.sequences.end(sequence) - begin;
  float* state = p.conv_state + p.sequences.slot(sequence) * (p.taps - 1) * p.channels + first;
  const float* x = p.x + begin * p.x_stride + first;
  float* out = p.out + begin * p.channels + first;
  const float* weight = p.weight + first * p.taps;
  const float* rows[kMaxConvTaps];

  Vec taps[kConvChannels / Vec::kWidth][kMaxConvTaps];
  const int vectors = count / Vec::kWidth, rest = count % Vec::kWidth;
  for (int v = 0; v < vectors; ++v) {
    const float* w = weight + v * Vec::kWidth * p.taps;
    if (kTaps == 4) {
      Vec::load_fours(w, taps[v]);
      continue;
    }
    for (int j = 0; j < p.taps; ++j) {
      float column[Vec::kWidth];
      for (int i = 0; i < Vec::kWidth; ++i) column[i] = w[i * p.taps + j];
      taps[v][j] = Vec::load(column);
    }
  }
  for (int64_t t = 0; t < length; ++t) {
    input_rows(p, state, x, t, rows);
    for (int v = 0; v < vectors; ++v) {
      const int c = v * Vec::kWidth;
      convolve_vector<kTaps>(taps[v], rows, c, p.taps).store(out + t * p.channels + c);
    }
  }
  if (rest) {  // the channels that fill no vector, through copies that do
    const int c = vectors * Vec::kWidth;
    float column[kMaxConvTaps][Vec::kWidth] = {}, inputs[kMaxConvTaps][Vec::kWidth] = {}, result[Vec::kWidth];
    const float* copies[kMaxConvTaps];
    for (int j = 0; j < p.taps; ++j) {
      for (int i = 0; i < rest; ++i) column[j][i] = weight[(c + i) * p.taps + j];
      taps[0][j] = Vec::load(column[j]);
      copies[j] = inputs[j];
    }
    for (int64_t t = 0; t < length; ++t) {
      input_rows(p, state, x, t, rows);
      for (int j = 0; j < p.taps; ++j) {
        for (int i = 0; i < rest; ++i) inputs[j][i] = rows[j][c + i];
      }
      convolve_vector<kTaps>(taps[0], copies, 0, p.taps).store(result);
      for (int i = 0; i < rest; ++i) out[t * p.channels + c + i] = result[i];
    }
  }

  // The last taps - 1 inputs, oldest first: a row of the state is read before it is overwritten.
  for (int j = 0; j < p.taps - 1; ++j) {
    const int64_t i = length - (p.taps - 1) + j;
    const float* from = i < 0 ? state + (p.taps - 1 + i) * p.channels : x + i * p.x_stride;
    float* to = state + j * p.channels;
    if (from != to) __builtin_memcpy(to, from, size_t(count) * sizeof(float));
  }
}

void convolve(const CausalConv1d& p, int64_t sequence, int64_t first, int count) {
  p.taps == 4 ? convolve_as<4>(p, sequence, first, count) : convolve_as<0>(p, sequence, first, count);
}
