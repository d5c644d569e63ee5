// Every stored type to float32, bit for bit as helexa_engine/quant/dequantize.py.
#pragma once

#include <cstdint>

#include "quant_blocks.h"

namespace helexa {

struct TypeTraits {
  QuantType type;
  const char* name;
  int block_size, block_bytes;
  void (*dequantize_block)(const void* block, float* out);  // block_size values
};

// Throws std::invalid_argument naming `function` for a number that is no stored type.
const TypeTraits& type_traits(int quant_type, const char* function);

// `n` values, a whole number of blocks.
void dequantize_row(const TypeTraits& traits, const void* source, int64_t n, float* out);
// The same for a tensor, on all threads. Throws std::invalid_argument unless n is a multiple of the block size.
void dequantize(int quant_type, const void* source, int64_t n, float* out);

}  // namespace helexa
