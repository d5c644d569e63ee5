#include "packed_sequences.h"

#include <string>
#include <vector>

#include "check.h"

namespace helexa {

void check_packed_sequences(const char* function, const PackedSequences& s) {
  if (s.cu_seqlens[0] != 0) fail_at(function, "cu_seqlens", 0, "0", s.cu_seqlens[0]);
  std::vector<bool> taken(static_cast<size_t>(s.num_slots), false);
  for (int64_t i = 0; i < s.num_sequences; ++i) {
    if (s.end(i) < s.begin(i) || s.end(i) > s.num_tokens)
      fail_at(function, "cu_seqlens", i + 1, std::to_string(s.begin(i)) + " to " + std::to_string(s.num_tokens),
              s.end(i));
    const int64_t slot = s.slot(i);
    if (slot < 0 || slot >= s.num_slots || taken[static_cast<size_t>(slot)])
      fail_at(function, "state_slots", i, "a slot of its own from 0 to " + std::to_string(s.num_slots - 1), slot);
    taken[static_cast<size_t>(slot)] = true;
  }
  if (const int64_t last = s.end(s.num_sequences - 1); last != s.num_tokens)
    fail_at(function, "cu_seqlens", s.num_sequences, std::to_string(s.num_tokens), last);
}

}  // namespace helexa
