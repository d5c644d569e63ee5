// Byte layouts of ggml's block formats, as stored in GGUF files. Source: ggml-common.h of llama.cpp. The meaning of the
// bits is defined by helexa_engine/quant/dequantize.py; numbers and names are in helexa_engine/quant/types.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace helexa {

enum class QuantType : int {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  I8 = 24,
  I16 = 25,
  I32 = 26,
  I64 = 27,
  F64 = 28,
  IQ1_M = 29,
  BF16 = 30,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,
  NVFP4 = 40,
  Q1_0 = 41,
};

using half_bits = uint16_t;  // IEEE float16

struct block_q4_0 {
  half_bits d;
  uint8_t qs[16];
};
struct block_q4_1 {
  half_bits d, m;
  uint8_t qs[16];
};
struct block_q5_0 {
  half_bits d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct block_q5_1 {
  half_bits d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct block_q8_0 {
  half_bits d;
  int8_t qs[32];
};
struct block_q1_0 {
  half_bits d;
  uint8_t qs[16];
};
struct block_mxfp4 {
  uint8_t e;
  uint8_t qs[16];
};
struct block_nvfp4 {
  uint8_t d[4];
  uint8_t qs[4][8];
};
struct block_q2_K {
  uint8_t scales[16];
  uint8_t qs[2][32];
  half_bits d, dmin;
};
struct block_q3_K {
  uint8_t hmask[32];
  uint8_t qs[2][32];
  uint8_t scales[12];
  half_bits d;
};
struct block_q4_K {
  half_bits d, dmin;
  uint8_t scales[12];
  uint8_t qs[4][32];
};
struct block_q5_K {
  half_bits d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[4][32];
};
struct block_q6_K {
  uint8_t ql[2][64];
  uint8_t qh[2][32];
  int8_t scales[16];
  half_bits d;
};
struct block_tq1_0 {
  uint8_t qs[48];
  uint8_t qh[4];
  half_bits d;
};
struct block_tq2_0 {
  uint8_t qs[2][32];
  half_bits d;
};
struct block_iq2_xxs {
  half_bits d;
  uint16_t qs[32];
};
struct block_iq2_xs {
  half_bits d;
  uint16_t qs[32];
  uint8_t scales[8];
};
struct block_iq2_s {
  half_bits d;
  uint8_t qs[32];
  uint8_t signs[32];
  uint8_t qh[8];
  uint8_t scales[8];
};
struct block_iq3_xxs {
  half_bits d;
  uint8_t qs[64];
  uint8_t signs_scale[32];
};
struct block_iq3_s {
  half_bits d;
  uint8_t qs[64];
  uint8_t qh[8];
  uint8_t signs[32];
  uint8_t scales[4];
};
struct block_iq1_s {
  half_bits d;
  uint8_t qs[32];
  uint16_t qh[8];
};
struct block_iq1_m {
  uint8_t qs[32];
  uint8_t qh[16];
  uint16_t scales[4];
};
struct block_iq4_nl : block_q4_0 {};
struct block_iq4_xs {
  half_bits d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[8][16];
};

static_assert(sizeof(block_q4_0) == 18 && sizeof(block_iq4_nl) == 18 && sizeof(block_q4_1) == 20 &&
              sizeof(block_q5_0) == 22);
static_assert(sizeof(block_q5_1) == 24 && sizeof(block_q8_0) == 34 && sizeof(block_q1_0) == 18);
static_assert(sizeof(block_mxfp4) == 17 && sizeof(block_nvfp4) == 36);
static_assert(sizeof(block_q2_K) == 84 && sizeof(block_q3_K) == 110 && sizeof(block_q4_K) == 144);
static_assert(sizeof(block_q5_K) == 176 && sizeof(block_q6_K) == 210);
static_assert(sizeof(block_tq1_0) == 54 && sizeof(block_tq2_0) == 66);
static_assert(sizeof(block_iq2_xxs) == 66 && sizeof(block_iq2_xs) == 74 && sizeof(block_iq2_s) == 82);
static_assert(sizeof(block_iq3_xxs) == 98 && sizeof(block_iq3_s) == 110);
static_assert(sizeof(block_iq1_s) == 50 && sizeof(block_iq1_m) == 56 && sizeof(block_iq4_xs) == 136);

}  // namespace helexa
