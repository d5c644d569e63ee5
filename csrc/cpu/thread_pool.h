// One pool of threads for every kernel of the core: workers spin for a moment between phases, then sleep.
#pragma once

#include <cstdint>
#include <type_traits>

namespace helexa {

// Threads that parallel_for uses, the caller among them. Default: the physical cores that the affinity mask and the
// cgroup quota leave to this process.
int num_threads();
// Takes effect at the next parallel_for. Throws std::invalid_argument unless 1 <= n <= 1024; 0 restores the default.
void set_num_threads(int n);
// Whether each worker stays on a physical core of its own, of those its creator may use; from the next parallel_for on.
// Off by default: it spares moves between cores, but a pinned thread cannot leave a core that another process takes.
void pin_threads(bool pinned);

namespace detail {
using RangeFunction = void (*)(void* body, int64_t begin, int64_t end, int thread);
void parallel_for(int64_t n, int64_t grain, RangeFunction function, void* body);
}  // namespace detail

// Calls body(begin, end, thread) for disjoint ranges that cover [0, n), each of at least `grain` items but the last;
// 0 <= thread < num_threads() and no two calls at one time share a `thread`. Every thread walks through a share of its
// own from first to last and then helps with what others have left, so a slow or stolen core does less. Returns when
// all are done. Safe to call from several Python threads at once (they take turns) and from inside a body (the inner
// one then runs on that thread alone). It must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
  using B = std::remove_reference_t<Body>;
  detail::parallel_for(
      n, grain, [](void* p, int64_t begin, int64_t end, int thread) { (*static_cast<B*>(p))(begin, end, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace helexa
