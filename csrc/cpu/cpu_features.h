// The instruction-set levels of the kernels, and which one runs.
#pragma once

#include <string>

namespace helexa {

enum class CpuIsa { kGeneric, kAvx2, kAvx2Vnni, kAvx512 };

// The level that kernels use: the best one of this processor and operating system, until set_cpu_isa.
CpuIsa cpu_isa();
// Whether the level in use is AVX-512 with its instruction for products of bfloat16 numbers.
bool multiplies_bfloat16();
// Takes "generic", "avx2", "avx2_vnni", "avx512", or "avx512_vnni": that without what newer processors add to it.
// Throws std::invalid_argument for another name or a level that this processor or build lacks.
void set_cpu_isa(const std::string& name);
const char* name(CpuIsa isa);

// The one for the level in use of tableGeneric, tableAvx2 and tableAvx512, an op's tables of kernels. AVX-VNNI adds
// products of bytes to AVX2, which make a difference to the quantised matmul alone.
#if defined(__x86_64__)
#define HELEXA_AT_LEVEL(table) \
  (cpu_isa() == CpuIsa::kAvx512 ? table##Avx512 : cpu_isa() >= CpuIsa::kAvx2 ? table##Avx2 : table##Generic)
#else
#define HELEXA_AT_LEVEL(table) (table##Generic)
#endif

}  // namespace helexa
