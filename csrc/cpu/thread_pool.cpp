#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "check.h"
#include "thread_count.h"

namespace helexa {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int kUnitsPerThread = 16;  // a phase's items go out in this many pieces a thread

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or until kSpin has passed; true when done() came first. The clock is read every 64 turns.
template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Keeps the workers, which are threads 1, 2, ..., on a physical core each. The first core is the caller's, which goes
// where the system likes.
void keep_on_cores([[maybe_unused]] std::vector<std::thread>& workers) {
#if defined(__linux__)
  const std::vector<int> cores = physical_cores("", allowed_processors());
  for (size_t i = 0; i < workers.size() && !cores.empty(); ++i) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cores[(i + 1) % cores.size()], &set);
    (void)pthread_setaffinity_np(workers[i].native_handle(), sizeof set, &set);  // a refusal costs speed only
  }
#endif
}

thread_local int current_thread = -1;  // -1 outside of parallel_for

class Pool {
 public:
  Pool(int threads, bool pinned) : threads_(threads), pinned_(pinned), slices_(size_t(threads)) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    if (pinned) keep_on_cores(workers_);
  }

  ~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }
  bool pinned() const { return pinned_; }

  void run(int64_t n, int64_t grain, detail::RangeFunction function, void* body) {
    function_ = function, body_ = body, end_ = n;
    unit_ = std::max(grain, (n + threads_ * kUnitsPerThread - 1) / (threads_ * kUnitsPerThread));
    const int64_t units = (n + unit_ - 1) / unit_;
    for (int i = 0; i < threads_; ++i)
      slices_[size_t(i)].left.store(pack(units * i / threads_, units * (i + 1) / threads_), std::memory_order_relaxed);
    entered_.store(0, std::memory_order_release);  // opens the phase
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    take_ranges(0);
    // A worker that has not come by now is not waited for: on a busy machine that could take a whole time slice.
    entered_.fetch_or(kClosed, std::memory_order_acq_rel);
    const auto all_left = [this] { return entered_.load(std::memory_order_acquire) == kClosed; };
    while (!spin_until(all_left)) std::this_thread::yield();
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;

  // Units first (low half) to last (high half) of a thread's share that nobody has taken.
  struct alignas(64) Slice {
    std::atomic<uint64_t> left{0};
  };
  static uint64_t pack(int64_t first, int64_t last) { return uint64_t(first) | uint64_t(last) << 32; }

  // Its owner takes a slice from the front, so that it walks through memory in one go; others take from the back.
  static int64_t take(Slice& slice, bool owner) {
    uint64_t left = slice.left.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = left & 0xffffffff, last = left >> 32;
      if (first >= last) return -1;
      const uint64_t rest = owner ? left + 1 : left - (uint64_t(1) << 32);
      if (slice.left.compare_exchange_weak(left, rest, std::memory_order_relaxed))
        return int64_t(owner ? first : last - 1);
    }
  }

  void take_ranges(int thread) {
    current_thread = thread;
    for (int i = 0; i < threads_; ++i) {
      Slice& slice = slices_[size_t((thread + i) % threads_)];
      for (int64_t unit = take(slice, i == 0); unit >= 0; unit = take(slice, i == 0))
        function_(body_, unit * unit_, std::min((unit + 1) * unit_, end_), thread);
    }
    current_thread = -1;
  }

  bool enter() {
    uint32_t count = entered_.load(std::memory_order_acquire);
    while (!(count & kClosed)) {
      if (entered_.compare_exchange_weak(count, count + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return epoch_.load() != seen; };
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load();
      if (stop_.load()) return;
      if (enter()) {
        take_ranges(thread);
        entered_.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }

  const int threads_;
  const bool pinned_;
  // The phase, written by the caller while it is closed.
  detail::RangeFunction function_ = nullptr;
  void* body_ = nullptr;
  int64_t end_ = 0, unit_ = 1;
  std::vector<Slice> slices_;
  alignas(64) std::atomic<uint32_t> entered_{kClosed};  // workers inside, and whether the door is shut
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

std::mutex pool_mutex;       // held for a whole phase: callers take turns
std::unique_ptr<Pool> pool;  // made at first use
std::atomic<int> wanted_threads{0};
std::atomic<bool> wanted_pinned{false};

// Threads do not survive fork(): the child forgets the pool (its memory is lost, once) and makes a new one when needed.
void forget_pool_in_child() {
  (void)pool.release();
  new (&pool_mutex) std::mutex;
  current_thread = -1;
}

}  // namespace

int num_threads() {
  static const int default_threads = threads_for("", allowed_processors());
  const int wanted = wanted_threads.load();
  return wanted ? wanted : default_threads;
}

void set_num_threads(int n) {
  check(n >= 0 && n <= 1024, "set_num_threads", "n", "0 (default) or 1 to 1024", n);
  wanted_threads.store(n);
}

void pin_threads(bool pinned) { wanted_pinned.store(pinned); }

void detail::parallel_for(int64_t n, int64_t grain, RangeFunction function, void* body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (current_thread >= 0) return function(body, 0, n, current_thread);
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  (void)registered;
  std::lock_guard<std::mutex> lock(pool_mutex);
  const int threads = num_threads();
  if (threads == 1 || n <= grain) {
    current_thread = 0;
    function(body, 0, n, 0);
    current_thread = -1;
    return;
  }
  const bool pinned = wanted_pinned.load();
  if (!pool || pool->threads() != threads || pool->pinned() != pinned) {
    pool.reset();
    pool = std::make_unique<Pool>(threads, pinned);
  }
  pool->run(n, grain, function, body);
}

}  // namespace helexa
