#include "quantize.h"

#include <string>

#include "check.h"
#include "cpu_features.h"
#include "half.h"
#include "quant_blocks.h"
#include "thread_pool.h"

namespace helexa {
namespace {

template <class Convert>
void convert(const float* source, int64_t n, uint16_t* out, Convert one) {
  parallel_for(n, 16384, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) out[i] = one(source[i]);
  });
}

}  // namespace

void quantize(int quant_type, const float* source, int64_t rows, int64_t cols, const float* weights, void* out) {
  constexpr const char* f = "quantize";
  check(rows >= 0, f, "rows", "0 or more", rows);
  check(cols >= 0, f, "cols", "0 or more", cols);
  if (quant_type == int(QuantType::F16))
    return convert(source, rows * cols, static_cast<uint16_t*>(out), half_from_float);
  if (quant_type == int(QuantType::BF16))
    return convert(source, rows * cols, static_cast<uint16_t*>(out), bfloat16_from_float);
  const Encoder* encoder = nullptr;
  for (const Encoder& candidate : HELEXA_AT_LEVEL(kEncoders).encoders)
    if (candidate.quant_type == quant_type) encoder = &candidate;
  if (!encoder) fail(f, "quant_type", "a type that has a quantiser", std::to_string(quant_type));
  const int64_t size = encoder->block_size, batch = encoder->blocks_per_batch;
  if (cols % size) fail(f, "cols", "a multiple of the block size " + std::to_string(size), std::to_string(cols));
  const int64_t per_row = cols / size, blocks = rows * per_row;
  parallel_for((blocks + batch - 1) / batch, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * batch;
      const int count = int(blocks - first < batch ? blocks - first : batch);
      encoder->encode(source + first * size, weights, first, per_row, count,
                      static_cast<uint8_t*>(out) + first * encoder->block_bytes);
    }
  });
}

}  // namespace helexa
