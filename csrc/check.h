// Checks of arguments that come from Python. A message names the function, the argument, what it should be and what
// came.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace helexa {

// Throws std::invalid_argument, which pybind11 turns into ValueError.
[[noreturn]] inline void fail(const char* function, const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::invalid_argument(std::string(function) + ": " + argument + ": expected " + expected + ", got " + got);
}

// The same for one element of an argument.
[[noreturn]] inline void fail_at(const char* function, const std::string& argument, int64_t index,
                                 const std::string& expected, int64_t got) {
  fail(function, (argument + "[" + std::to_string(index) + "]").c_str(), expected, std::to_string(got));
}

inline void check(bool holds, const char* function, const char* argument, const char* expected, int64_t got) {
  if (!holds) fail(function, argument, expected, std::to_string(got));
}

inline void check_pointer(uintptr_t pointer, const char* function, const char* argument) {
  if (pointer == 0) fail(function, argument, "the address of a tensor", "0");
}

}  // namespace helexa
