#include "probes.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "check.h"
#include "quant_dot.h"
#include "thread_pool.h"
#include "weight_memory.h"

namespace helexa {
namespace {

template <class Function>
double seconds_of(Function function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double rate(double (*loop)(int64_t)) {
  constexpr int64_t kTurns = 4 << 20;
  const int threads = num_threads();
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<double> done(size_t(threads), 0.0);
    const double seconds = seconds_of([&] {
      parallel_for(threads * 8, 1, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i) done[size_t(thread)] += 2 * loop(kTurns / 8);
      });
    });
    double total = 0;
    for (double d : done) total += d;
    best = std::max(best, total / seconds);
  }
  return best;
}

}  // namespace

double read_bandwidth(int64_t nbytes, int threads, int repeats) {
  check(nbytes >= 1 << 20, "read_bandwidth", "nbytes", "at least 1 MiB", nbytes);
  check(repeats >= 1, "read_bandwidth", "repeats", "at least 1", repeats);
  const int before = num_threads();
  if (threads > 0) set_num_threads(threads);
  constexpr int64_t kPiece = 64 << 10;  // floats
  const int64_t pieces = nbytes / (kPiece * int64_t(sizeof(float)));
  const size_t size = size_t(pieces * kPiece) * sizeof(float);
  const std::shared_ptr<uint8_t> memory = allocate_weights(size);  // what weights lie in
  auto* data = reinterpret_cast<float*>(memory.get());
  std::fill_n(data, pieces * kPiece, 1.0f);
  double best = 0;
  volatile float sink = 0;
  for (int i = 0; i < repeats; ++i) {
    const double seconds = seconds_of([&] {
      parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int) {
        sink = kernels().read_loop(data + begin * kPiece, (end - begin) * kPiece);
      });
    });
    best = std::max(best, double(size) / seconds);
  }
  (void)sink;
  if (threads > 0) set_num_threads(before);
  return best;
}

double int8_rate() { return rate(kernels().int8_rate_loop); }
double float_rate() { return rate(kernels().float_rate_loop); }
double bfloat16_rate() { return rate(kernels().bfloat16_rate_loop); }

}  // namespace helexa
