#include "cpu_features.h"

#include <atomic>

#include "check.h"

namespace helexa {
namespace {

std::atomic<int> chosen{-1};  // -1: the best

CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  static const CpuIsa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    return avx512 ? CpuIsa::kAvx512 : avx2 ? CpuIsa::kAvx2 : CpuIsa::kGeneric;
  }();
  return best;
#else
  return CpuIsa::kGeneric;
#endif
}

}  // namespace

CpuIsa cpu_isa() {
  const int level = chosen.load(std::memory_order_relaxed);
  return level < 0 ? best_cpu_isa() : static_cast<CpuIsa>(level);
}

void set_cpu_isa(const std::string& wanted) {
  for (const CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (wanted != name(isa)) continue;
    if (isa > best_cpu_isa()) fail("set_cpu_isa", "name", std::string("at most ") + name(best_cpu_isa()), wanted);
    chosen.store(static_cast<int>(isa));
    return;
  }
  fail("set_cpu_isa", "name", "generic, avx2 or avx512", wanted);
}

const char* name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace helexa
