#include "cpu_features.h"

#include <atomic>

#include "check.h"

namespace helexa {
namespace {

std::atomic<int> chosen{-1};  // -1: the best
std::atomic<bool> without_bfloat16{false};

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
  for (const CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (wanted != name(isa)) continue;
    if (isa > best_cpu_isa()) fail("set_cpu_isa", "name", std::string("at most ") + name(best_cpu_isa()), wanted);
    chosen.store(static_cast<int>(isa));
    without_bfloat16.store(subset);
    return;
  }
  fail("set_cpu_isa", "name", "generic, avx2, avx512_vnni or avx512", wanted);
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
