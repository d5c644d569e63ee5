// The instruction-set levels of the kernels, and which one runs.
#pragma once

#include <string>

namespace helexa {

enum class CpuIsa { kGeneric, kAvx2, kAvx512 };

// The best level of this processor and operating system.
CpuIsa best_cpu_isa();
// The level that kernels use: the best one, until set_cpu_isa.
CpuIsa cpu_isa();
// Takes "generic", "avx2" or "avx512". Throws std::invalid_argument for another name or a level this processor lacks.
void set_cpu_isa(const std::string& name);
const char* name(CpuIsa isa);

}  // namespace helexa
