#include "packed_sequences.h"

#include <string>
#include <vector>

#include "check.h"

namespace helexa {

void check_packed_sequences(const char* function, const PackedSequences& s) {
  const auto check_at = [&](bool holds, const char* argument, int64_t index, const std::string& expected, int64_t got) {
    const std::string place = std::string(argument) + "[" + std::to_string(index) + "]";
    if (!holds) fail(function, place.c_str(), expected, std::to_string(got));
  };
  check_at(s.cu_seqlens[0] == 0, "cu_seqlens", 0, "0", s.cu_seqlens[0]);
  std::vector<bool> taken(static_cast<size_t>(s.num_slots), false);
  for (int64_t i = 0; i < s.num_sequences; ++i) {
    check_at(s.begin(i) <= s.end(i) && s.end(i) <= s.num_tokens, "cu_seqlens", i + 1,
             std::to_string(s.begin(i)) + " to " + std::to_string(s.num_tokens), s.end(i));
    const int64_t slot = s.slot(i);
    check_at(slot >= 0 && slot < s.num_slots && !taken[static_cast<size_t>(slot)], "state_slots", i,
             "a slot of its own from 0 to " + std::to_string(s.num_slots - 1), slot);
    taken[static_cast<size_t>(slot)] = true;
  }
  check_at(s.end(s.num_sequences - 1) == s.num_tokens, "cu_seqlens", s.num_sequences, std::to_string(s.num_tokens),
           s.end(s.num_sequences - 1));
}

}  // namespace helexa
