// Checks of what the ops with a state share: sequences packed end to end, and the slot in which each keeps its state.
#pragma once

#include <cstdint>

namespace helexa {

struct PackedSequences {
  const int32_t* cu_seqlens;   // [N + 1]
  const int32_t* state_slots;  // [N]
  int64_t num_sequences, num_tokens, num_slots;

  int64_t begin(int64_t sequence) const { return cu_seqlens[sequence]; }
  int64_t end(int64_t sequence) const { return cu_seqlens[sequence + 1]; }
  int64_t slot(int64_t sequence) const { return state_slots[sequence]; }
};

// Throws std::invalid_argument naming `function`, the argument and the index unless cu_seqlens goes from 0 to
// num_tokens without falling and every sequence has a slot of its own.
void check_packed_sequences(const char* function, const PackedSequences& sequences);

}  // namespace helexa
