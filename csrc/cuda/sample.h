// Choosing tokens on a device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace helexa::cuda {

using Stream = uintptr_t;

// What one row is sampled by, and one element of its lists: ROW and ENTRY of helexa_engine/ops/sample/rows.py.
struct SampleRow {
  double temperature, top_p, min_p, uniform;
  float repetition_penalty, frequency_penalty, presence_penalty;
  int32_t top_k;
  int32_t
      lists[5];  // where among the entries the biases, the seen, the generated and the masked tokens begin, and the end
  int32_t mask_row;      // of the bitmasks; -1: everything is allowed
  int32_t forced;        // the only token that is allowed; -1: there is none
  int32_t num_logprobs;  // how many of the likeliest are reported; -1: no log probabilities
};
struct SampleEntry {
  int32_t id;
  float value;  // of a bias, or how often a token was generated
};

// Words of scratch memory that sample needs.
int64_t sample_scratch_words(int64_t rows, int64_t cols, bool logprobs);

// One token for each row of logits [rows, cols], which are overwritten where the rows have lists (`adjusts`).
//
// table: `rows` SampleRows and behind them their entries. mask: bitmasks of `mask_words` each, or null. raw: the logits
// before anything is done to them, for the log probabilities; they may be `logits` where nothing is adjusted. num_top:
// the most log probabilities that a row asks for; -1: none does. scratch: sample_scratch_words, may hold anything.
//
// out [2 (+ 1 + num_top), rows]: the token; how it went in the low half (0 well, 1 the largest logit is not finite, 2
// no token is allowed) and the bits of the largest logit in the high half; the bits of the token's log probability; the
// likeliest tokens, with the bits of their log probabilities in the high half.
void sample(const void* table, int64_t row_bytes, int64_t rows, int64_t cols, float* logits, const float* raw,
            const uint32_t* mask, int64_t mask_words, bool adjusts, int64_t num_top, uint64_t* scratch, int64_t* out,
            Stream stream);

}  // namespace helexa::cuda
