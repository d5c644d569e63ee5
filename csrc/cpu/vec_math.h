// Functions over `Vec` that several kernels share. Included inside an unnamed namespace, after a vec_*.h. No standard
// library here: an inline function compiled for a higher level must not reach the linker.

// e^x for |x| <= 87, about 1 unit in the last place; NaN for NaN, any value elsewhere. Cody and Waite's reduction, then
// Taylor's polynomial on |r| <= ln(2) / 2.
inline Vec exp_within_87(Vec x) {
  const Vec n = round(x * Vec::broadcast(1.44269504088896341f));
  Vec r = multiply_add(n, Vec::broadcast(-0.693359375f), x);
  r = multiply_add(n, Vec::broadcast(2.12194440e-4f), r);
  Vec y = Vec::broadcast(1.0f / 5040);
  y = multiply_add(y, r, Vec::broadcast(1.0f / 720));
  y = multiply_add(y, r, Vec::broadcast(1.0f / 120));
  y = multiply_add(y, r, Vec::broadcast(1.0f / 24));
  y = multiply_add(y, r, Vec::broadcast(1.0f / 6));
  y = multiply_add(y, r, Vec::broadcast(0.5f));
  y = multiply_add(y, r, Vec::broadcast(1.0f));
  y = multiply_add(y, r, Vec::broadcast(1.0f));
  return scale_by_power_of_two(y, n);
}

// e^x for x <= 0; 0 below -87, NaN for NaN.
inline Vec exp_of_negative(Vec x) { return zero_where_less(x, Vec::broadcast(-87.0f), exp_within_87(x)); }

// x / (1 + e^-x); NaN for NaN. Below -87 the denominator stays: the true value is smaller than any float that matters.
inline Vec silu(Vec x) {
  const Vec one = Vec::broadcast(1.0f), limit = Vec::broadcast(87.0f), zero = Vec::broadcast(0.0f);
  return x / (one + exp_within_87(min(max(zero - x, zero - limit), limit)));
}

// 1 / (1 + e^-x), from an exponential of a negative number on either side of 0; NaN for NaN.
inline Vec sigmoid(Vec x) {
  const Vec zero = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  const Vec e = exp_of_negative(zero - max(x, zero - x));
  return (e + zero_where_less(x, zero, one - e)) / (one + e);
}

constexpr int kRows = 6;  // rows of a register block

// The right factor of `multiply`: a matrix [k, columns] in memory. Others than this one convert what they read.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;

  // kC vectors of row k from vector `first` on.
  template <int kC>
  void load(int64_t k, int first, Vec (&out)[kC]) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) out[c] = Vec::load(data + k * stride + (first + c) * Vec::kWidth);
  }
};

// out[r][c] = out[r][c] * factor[r] + sum over k, in order, of a[r][k] * b[k][c], for kR rows and kC vectors of
// columns from vector `first` on; without factors the sum alone. The sum of one element never depends on kR or kC.
template <int kR, int kC, class B>
void multiply_block(const float* a, int64_t a_stride, B& b, int first, int k_end, const float* factor, float* out,
                    int64_t out_stride) {
  Vec sum[kR][kC];
  for (auto& row : sum) {
    for (Vec& s : row) s = Vec::broadcast(0.0f);
  }
  for (int k = 0; k < k_end; ++k) {
    Vec column[kC];
    b.template load<kC>(k, first, column);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Vec row = Vec::broadcast(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sum[r][c] = multiply_add(row, column[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      float* place = out + r * out_stride + (first + c) * Vec::kWidth;
      if (factor) sum[r][c] = multiply_add(Vec::load(place), Vec::broadcast(factor[r]), sum[r][c]);
      sum[r][c].store(place);
    }
  }
}

template <int kR, class B>
void multiply_rows(const float* a, int64_t a_stride, B& b, int k_end, const float* factor, float* out,
                   int64_t out_stride, int vectors) {
  int c = 0;
  if constexpr (kR <= 2) {  // enough sums at a time to hide how long a product takes
    constexpr int kWide = 2 * Vec::kColumns;
    for (; c + kWide <= vectors; c += kWide)
      multiply_block<kR, kWide>(a, a_stride, b, c, k_end, factor, out, out_stride);
  }
  for (; c + Vec::kColumns <= vectors; c += Vec::kColumns)
    multiply_block<kR, Vec::kColumns>(a, a_stride, b, c, k_end, factor, out, out_stride);
  for (; c < vectors; ++c) multiply_block<kR, 1>(a, a_stride, b, c, k_end, factor, out, out_stride);
}

// out [rows, vectors * kWidth] = out * factor (or nothing) + a [rows, k_end] b [k_end, vectors * kWidth].
template <class B>
void multiply(const float* a, int64_t a_stride, B&& b, int k_end, const float* factor, float* out, int64_t out_stride,
              int rows, int vectors) {
  for (int r = 0; r < rows; r += kRows) {
    const float* a_rows = a + r * a_stride;
    const float* factors = factor ? factor + r : nullptr;
    float* out_rows = out + r * out_stride;
    switch (rows - r) {
      case 1:
        multiply_rows<1>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
        break;
      case 2:
        multiply_rows<2>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
        break;
      case 3:
        multiply_rows<3>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
        break;
      case 4:
        multiply_rows<4>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
        break;
      case 5:
        multiply_rows<5>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
        break;
      default:
        multiply_rows<kRows>(a_rows, a_stride, b, k_end, factors, out_rows, out_stride, vectors);
    }
  }
}
