#include "argmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int kLanes = 16;

// The largest of values [0, n), NaN if one of them is.
float largest_of(const float* values, int64_t n) {
  float lanes[kLanes];
  int32_t nans[kLanes] = {};
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float x = values[i + l];
      lanes[l] = x > lanes[l] ? x : lanes[l];
      nans[l] |= x != x;
    }
  for (; i < n; ++i) {
    lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    nans[0] |= values[i] != values[i];
  }
  for (int l = 0; l < kLanes; ++l)
    if (nans[l]) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace

void argmax(const float* values, int64_t rows, int64_t cols, int64_t* out) {
  check(cols >= 1, "argmax", "cols", "at least 1", cols);
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
  std::vector<float> largest(size_t(rows * blocks));
  parallel_for(rows * blocks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock;
      largest[size_t(i)] = largest_of(values + i / blocks * cols + first, std::min(kBlock, cols - first));
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = largest.data() + r * blocks;
    int64_t best = 0;
    for (int64_t b = 1; b < blocks && row[best] == row[best]; ++b)
      if (!(row[b] <= row[best])) best = b;  // larger, or NaN
    const float* at = values + r * cols + best * kBlock;
    const bool wants_nan = row[best] != row[best];
    while (!(wants_nan ? *at != *at : *at == row[best])) ++at;
    out[r] = at - (values + r * cols);
  }
}

}  // namespace helexa
