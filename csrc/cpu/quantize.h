// float32 to the block formats, byte for byte as helexa_engine/quant/quantize.py, which is the definition.
#pragma once

#include <cstdint>

namespace helexa {

// Encodes rows x cols values, each row a whole number of blocks of the type (ggml's number), on all threads. `weights`
// [cols] are those of the squared errors, or null: all 1. The values must be finite. Throws std::invalid_argument for a
// type without quantiser or columns that do not fill its blocks.
void quantize(int quant_type, const float* source, int64_t rows, int64_t cols, const float* weights, void* out);

// The encoders of an instruction-set level. A batch is what sixteen lanes take at once: groups of values, each fitted
// alone. All levels compute the same.
struct Encoder {
  int quant_type, block_size, block_bytes, blocks_per_batch;
  // `count` <= blocks_per_batch consecutive blocks, the first being number `first_block` of the tensor.
  void (*encode)(const float* source, const float* weights, int64_t first_block, int64_t blocks_per_row, int count,
                 void* out);
};
struct EncoderTable {
  Encoder encoders[12];
};

extern const EncoderTable kEncodersGeneric;
#if defined(__x86_64__)
extern const EncoderTable kEncodersAvx2, kEncodersAvx512;
#endif

}  // namespace helexa
