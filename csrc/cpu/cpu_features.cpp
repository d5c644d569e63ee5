#include "cpu_features.h"

#include <atomic>

#include "check.h"

namespace helexa {
namespace {

std::atomic<int> chosen{-1};  // -1: the best
std::atomic<bool> without_bfloat16{false};

// Of this processor and of this build.
bool has(CpuIsa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case CpuIsa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case CpuIsa::kAvx2Vnni:
#if defined(HELEXA_HAS_AVXVNNI)
      return avx2 && __builtin_cpu_supports("avxvnni");
#else
      return false;
#endif
    case CpuIsa::kAvx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == CpuIsa::kGeneric;
#endif
}

CpuIsa best_cpu_isa() {
  static const CpuIsa best = [] {
    for (const CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2Vnni, CpuIsa::kAvx2}) {
      if (has(isa)) return isa;
    }
    return CpuIsa::kGeneric;
  }();
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  const int level = chosen.load(std::memory_order_relaxed);
  return level < 0 ? best_cpu_isa() : static_cast<CpuIsa>(level);
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && cpu_isa() == CpuIsa::kAvx512 && !without_bfloat16.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void set_cpu_isa(const std::string& name_or_subset) {
  const bool subset = name_or_subset == "avx512_vnni";
  const std::string wanted = subset ? name(CpuIsa::kAvx512) : name_or_subset;
  for (const CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx2Vnni, CpuIsa::kAvx512}) {
    if (wanted != name(isa)) continue;
    if (!has(isa))
      fail("set_cpu_isa", "name",
           std::string("one that this processor and build have, such as ") + name(best_cpu_isa()), wanted);
    chosen.store(static_cast<int>(isa));
    without_bfloat16.store(subset);
    return;
  }
  fail("set_cpu_isa", "name", "generic, avx2, avx2_vnni, avx512_vnni or avx512", wanted);
}

const char* name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2Vnni:
      return "avx2_vnni";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace helexa
