// One token for each row of logits, as helexa_engine/runtime/sampler.py defines it, in at most three kernels:
//
//   sample_adjust  a block a row: biases, penalties and masked tokens, written into the logits.
//   sample_scan    reads all logits once, in parts for a block each: the best value of each part, its sum of
//                  exponentials, and the largest value of each strip of 128.
//   sample_choose  a block a row: which values can matter follows from those, so it reads only strips that hold some.
//                  Usually a few dozen candidates are left, which are sorted, summed and drawn from. Where more are
//                  left than shared memory takes, thresholds are found by radix descent instead, without sorting.
//
// Every row is computed alone and every sum has a fixed order: of floats by place, else of integers. Compiled with
// -fmad=false, for penalties are defined without it.
#include <cmath>

#include "order.cuh"
#include "sample.h"
// Behind common.cuh.
#include "../check.h"

namespace helexa::cuda {
namespace {

constexpr int kStrip = 4 * kWarpSize;                         // values that a warp reads at once
constexpr int kPart = 2048, kScanThreads = 256;               // of sample_scan
constexpr int kThreads = 512, kWarps = kThreads / kWarpSize;  // of sample_choose
constexpr int kMostCandidates = 2048;                         // that are sorted
constexpr int64_t kMostCols = int64_t(1) << 18;               // kPart * kMostParts
constexpr int kMostStrips = int(kMostCols / kStrip);
constexpr int kBins = 256, kReplicas = 4;        // a lane adds to one of the replicas of a bin: fewer collisions
constexpr float kOne = float(int64_t(1) << 44);  // of weights as integers: the sum of kMostCols fits

static_assert(kPart == 4 * kThreads && kPart == kMostCandidates);

__device__ __forceinline__ bool is_finite(float value) {
  return (bit_cast<uint32_t>(value) & 0x7f800000) != 0x7f800000;
}

// What a row's values are read through: the bitmask, and for a report, what makes log probabilities of logits.
struct Values {
  const float* row;
  int size;
  bool aligned;
  const uint32_t* mask;  // null: everything is allowed
  bool are_logprobs = false;
  float peak = 0.0f, log_sum = 0.0f;

  __device__ __forceinline__ Vector<float, 4> four(int first) const {
    Vector<float, 4> values = load_four(row, first, size, aligned);
    if (mask != nullptr && first < size) {
      const uint32_t bits = mask[first / 32] >> (first % 32);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(bits >> i & 1)) values[i] = value_of(kOrderOfMinusInfinity);
    }
    return values;
  }
  __device__ __forceinline__ float logprob(float value) const { return value - peak - log_sum; }
  // Of a stored order: it grows with it.
  __device__ __forceinline__ uint32_t order(uint32_t stored) const {
    return are_logprobs ? order_of(logprob(value_of(stored))) : stored;
  }
};

// What sample_scan writes of one row.
struct Scanned {
  Ranked* best;      // [parts]
  double* sum;       // [parts], of exponentials relative to the best
  uint32_t* strips;  // [strips]: order of the largest value
};
__device__ __forceinline__ Scanned scanned(uint64_t* scratch, int64_t num_rows, int64_t row, int parts, int strips,
                                           bool of_raw, bool both) {
  const int64_t all = (both ? 2 : 1) * num_rows, i = (of_raw ? num_rows : 0) + row;
  auto* sums = reinterpret_cast<double*>(scratch + all * parts);
  auto* tops = reinterpret_cast<uint32_t*>(scratch + 2 * all * parts);
  return {scratch + i * parts, sums + i * parts, tops + i * strips};
}

__device__ __forceinline__ bool filters_by_k(const SampleRow& row, int size) {
  return row.top_k > 0 && row.top_k < size;
}
// A float to divide by: not zero.
__device__ __forceinline__ float scale_of(double temperature) {
  return temperature < 1e-37 ? 1e-37f : float(temperature);
}

// -- Block-wide words. Every thread calls them; `scratch` [kWarps] words may be used again when they return.

template <class T>
__device__ __forceinline__ T warp_total(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <int kNumWarps, class T>
__device__ __forceinline__ T block_total(T value, const Shared<uint64_t>& scratch) {
  value = warp_total(value);
  if (lane_index() == 0) scratch[warp_index()] = bit_cast<uint64_t>(value);
  sync_threads();
  T total = 0;
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) total += bit_cast<T>(uint64_t(scratch[warp]));
  sync_threads();
  return total;
}

template <class T>
__device__ __forceinline__ T warp_before(T value, T* total) {
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T other = shuffle(sum, (lane_index() - distance) & (kWarpSize - 1));
    if (lane_index() >= distance) sum += other;
  }
  *total = shuffle(sum, kWarpSize - 1);
  const T before = shuffle(sum, (lane_index() - 1) & (kWarpSize - 1));
  return lane_index() == 0 ? T(0) : before;
}

// The sum over the threads before this one.
template <class T>
__device__ __forceinline__ T block_before(T value, T* total, const Shared<uint64_t>& scratch) {
  T of_warp;
  T before = warp_before(value, &of_warp);
  if (lane_index() == 0) scratch[warp_index()] = bit_cast<uint64_t>(of_warp);
  sync_threads();
  T sum = 0, mine = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == warp_index()) mine = sum;
    sum += bit_cast<T>(uint64_t(scratch[warp]));
  }
  sync_threads();
  *total = sum;
  return mine + before;
}

// The first of [0, size) for which `holds`, which then holds for all behind it; size if none does.
template <class Holds>
__device__ __forceinline__ int first_where(int size, Holds holds) {
  int low = 0;
  while (low < size) {
    const int middle = (low + size) / 2;
    if (holds(middle))
      size = middle;
    else
      low = middle + 1;
  }
  return low;
}

// -- The kernels before the choice

__global__ void __launch_bounds__(kScanThreads)
    sample_adjust(const SampleRow* rows, const SampleEntry* entries, int64_t size, float* logits) {
  const SampleRow& row = rows[blockIdx.x];
  logits += blockIdx.x * size;
  // Tokens differ within a list; one that is in two meets them in order.
  const auto each = [&](int list, auto&& change) {
    if (row.lists[list] == row.lists[list + 1]) return;
    for (int i = row.lists[list] + int(threadIdx.x); i < row.lists[list + 1]; i += kScanThreads) {
      const SampleEntry entry = entries[i];
      if (entry.id >= 0 && entry.id < size) logits[entry.id] = change(logits[entry.id], entry.value);
    }
    sync_threads();
  };
  each(0, [&](float logit, float bias) { return logit + bias; });
  each(1, [&](float logit, float) {
    return logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  });
  each(2, [&](float logit, float count) { return logit - (count * row.frequency_penalty + row.presence_penalty); });
  each(3, [&](float, float) { return value_of(kOrderOfMinusInfinity); });
}

// Grid [parts, rows, 1 or 2]; the second layer reads the raw logits of rows that want log probabilities.
__global__ void __launch_bounds__(kScanThreads)
    sample_scan(const SampleRow* rows, const float* logits, const float* raw, const uint32_t* mask, int64_t mask_words,
                int size, int strips, bool aligned, uint64_t* memory) {
  constexpr int kScanWarps = kScanThreads / kWarpSize, kFours = kPart / 4 / kScanThreads;
  SharedArena arena;
  const auto scratch = arena.take<uint64_t>(kScanWarps);
  const bool of_raw = blockIdx.z == 1;
  const SampleRow& row = rows[blockIdx.y];
  if (of_raw ? row.num_logprobs < 0 : row.forced >= 0) return;
  const Scanned out = scanned(memory, gridDim.y, blockIdx.y, int(gridDim.x), strips, of_raw, gridDim.z == 2);
  const bool masked = !of_raw && row.mask_row >= 0;
  const Values values{(of_raw ? raw : logits) + int64_t(blockIdx.y) * size, size, aligned,
                      masked ? mask + row.mask_row * mask_words : nullptr};

  Vector<float, 4> fours[kFours];
  const int strip = int(blockIdx.x) * (kPart / kStrip) + warp_index();
#pragma unroll
  for (int i = 0; i < kFours; ++i) fours[i] = values.four((strip + i * kScanWarps) * kStrip + lane_index() * 4);
  Ranked best = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int first = (strip + i * kScanWarps) * kStrip + lane_index() * 4;
    Ranked mine = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Ranked other = ranked(order_of(fours[i][j]), first + j);
      mine = other > mine ? other : mine;
    }
    mine = warp_largest(mine);
    if (lane_index() == 0 && strip + i * kScanWarps < strips) out.strips[strip + i * kScanWarps] = order_of(mine);
    best = mine > best ? mine : best;
  }
  best = block_largest<kScanWarps>(best, scratch);
  if (threadIdx.x == 0) out.best[blockIdx.x] = best;
  const bool sums = row.temperature > 0.0 && !filters_by_k(row, size) && (row.top_p < 1.0 || row.min_p == 0.0);
  if (!of_raw && !sums) return;
  const float peak = value_of(order_of(best)), scale = of_raw ? 1.0f : scale_of(row.temperature);
  double sum = 0.0;
  if (is_finite(peak)) {
#pragma unroll
    for (int i = 0; i < kFours; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += double(expf((fours[i][j] - peak) / scale));
  }
  sync_threads();  // everyone has read the best from `scratch`
  sum = block_total<kScanWarps>(sum, scratch);
  if (threadIdx.x == 0) out.sum[blockIdx.x] = sum;
}

// -- The choice

using Weight = unsigned long long;  // what CUDA has an atomic sum of

struct Workspace {
  Shared<Ranked> candidates;  // [kMostCandidates]
  Shared<double> sums;        // [kMostCandidates]
  Shared<Weight> bins;        // [kBins * kReplicas]
  Shared<uint64_t> scratch;   // [kWarps]
  Shared<uint32_t> tops;      // [kMostStrips]: of the strips
  Shared<uint16_t> chosen;    // [kMostStrips]: strips with candidates
  Shared<int> counts;         // [2]: of them, and of the candidates
};
constexpr size_t kWorkspaceBytes = kMostCandidates * (sizeof(Ranked) + sizeof(double)) + kBins * kReplicas * 8 +
                                   kWarps * 8 + kMostStrips * (4 + 2) + 16;

// sums[i] becomes the sum of the first i + 1.
__device__ __forceinline__ void sum_up(const Workspace& w, int size) {
  double values[4], total, all;
  const int first = int(threadIdx.x) * 4;
  total = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = first + i < size ? double(w.sums[first + i]) : 0.0;
    total += values[i];
  }
  double before = block_before(total, &all, w.scratch);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    before += values[i];
    if (first + i < size) w.sums[first + i] = before;
  }
  sync_threads();
}

// The sum of exponentials over a row, relative to its largest value; `sums` [parts] are those up to each part.
__device__ __forceinline__ double total_of(const Workspace& w, const Scanned& row, int parts, float peak,
                                           double temperature) {
  for (int i = int(threadIdx.x); i < parts; i += kThreads) {
    const double distance = double(value_of(order_of(row.best[i]))) - double(peak);
    w.sums[i] = row.sum[i] * exp(distance / temperature);
  }
  sync_threads();
  sum_up(w, parts);
  const double total = w.sums[parts - 1];
  return total;
}

struct Found {
  uint32_t order;
  Weight before;  // weight of all that is larger
};

// Where the weights, largest order first, add up to more than `target`, which their sum exceeds. `for_each` gives each
// element's order and weight to a function; its threads share the elements.
template <class ForEach>
__device__ __forceinline__ Found descend(const Workspace& w, Weight target, ForEach for_each) {
  uint32_t prefix = 0;
  Weight before = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = int(threadIdx.x); i < kBins * kReplicas; i += kThreads) w.bins[i] = 0;
    sync_threads();
    for_each([&](uint32_t order, Weight weight) {
      if (uint64_t(order) >> (shift + 8) == prefix)
        add_atomic(w.bins, (order >> shift & 255) * kReplicas + (threadIdx.x & (kReplicas - 1)), weight);
    });
    sync_threads();
    const uint32_t digit = kBins - 1 - threadIdx.x;  // the first threads have one each, the largest first
    Weight mine = 0, all;
    if (threadIdx.x < kBins)
      for (int replica = 0; replica < kReplicas; ++replica) mine += w.bins[digit * kReplicas + replica];
    const Weight sum = before + block_before(mine, &all, w.scratch);
    if (sum <= target && target < sum + mine) {
      w.scratch[0] = digit;
      w.scratch[1] = sum;
    }
    sync_threads();
    prefix = prefix << 8 | uint32_t(w.scratch[0]);
    before = w.scratch[1];
  }
  sync_threads();
  return {prefix, before};
}

// The `count`-th largest of the strips' largest values, at most as large as the `count`-th largest value; 0 if there
// are fewer.
__device__ __forceinline__ uint32_t bound_of(const Workspace& w, int strips, int count) {
  if (count > strips) return 0;
  return descend(w, Weight(count - 1),
                 [&](auto&& take) {
                   for (int i = int(threadIdx.x); i < strips; i += kThreads) take(w.tops[i], Weight(1));
                 })
      .order;
}

__device__ __forceinline__ void load_tops(const Workspace& w, const Scanned& row, int strips) {
  for (int i = int(threadIdx.x); i < strips; i += kThreads) w.tops[i] = row.strips[i];
  sync_threads();
}

// Calls take(order, place) for each value of at least `bound` in the chosen strips. A warp keeps several strips on
// their way.
template <class Take>
__device__ __forceinline__ void each_candidate(const Workspace& w, const Values& values, uint32_t bound, Take take) {
  constexpr int kAhead = 2;
  const int num_chosen = w.counts[0];
  for (int at = warp_index() * kAhead; at < num_chosen; at += kWarps * kAhead) {
    Vector<float, 4> fours[kAhead];
    int first[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (at + i < num_chosen) {
        first[i] = int(w.chosen[at + i]) * kStrip + lane_index() * 4;
        fours[i] = values.four(first[i]);
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (at + i < num_chosen) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t order = values.order(order_of(fours[i][j]));
          if (order >= bound && first[i] + j < values.size) take(order, first[i] + j);
        }
      }
  }
}

// How many values are at least `bound`; as many of them as have room are put among the candidates, in no order.
__device__ __forceinline__ int gather(const Workspace& w, const Values& values, int strips, uint32_t bound) {
  if (threadIdx.x < 2) w.counts[threadIdx.x] = 0;
  sync_threads();
  for (int i = int(threadIdx.x); i < strips; i += kThreads)
    if (values.order(w.tops[i]) >= bound) w.chosen[add_atomic(w.counts, 0, 1)] = uint16_t(i);
  sync_threads();
  each_candidate(w, values, bound, [&](uint32_t order, int place) {
    const int at = add_atomic(w.counts, 1, 1);
    if (at < kMostCandidates) w.candidates[at] = ranked(order, place);
  });
  sync_threads();
  return w.counts[1];
}

// The candidates, best first.
__device__ __forceinline__ void sort_candidates(const Workspace& w, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + int(threadIdx.x); i < size; i += kThreads) w.candidates[i] = 0;
  sync_threads();
  for (int run = 2; run <= size; run *= 2)
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = int(threadIdx.x); i < size / 2; i += kThreads) {
        const int left = 2 * i - (i & (distance - 1)), right = left + distance;
        const Ranked a = w.candidates[left], b = w.candidates[right];
        if ((a < b) == ((left & run) == 0)) {
          w.candidates[left] = b;
          w.candidates[right] = a;
        }
      }
      sync_threads();
    }
}

// The place of the value number `number` among those of this order, by their places.
__device__ __forceinline__ int place_among_equals(const Workspace& w, const Values& values, uint32_t order,
                                                  uint64_t number) {
  for (int part = 0; part < values.size; part += kPart) {
    const int first = part + int(threadIdx.x) * 4;
    const Vector<float, 4> four = values.four(first);
    bool equal[4];
    uint64_t count = 0, all;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      equal[i] = first + i < values.size && values.order(order_of(four[i])) == order;
      count += equal[i];
    }
    uint64_t before = block_before(count, &all, w.scratch);
    if (number >= all) {
      number -= all;
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (equal[i] && before == number) w.scratch[0] = uint64_t(first + i);
      before += equal[i];
    }
    sync_threads();
    const int place = int(uint64_t(w.scratch[0]));
    sync_threads();
    return place;
  }
  return 0;
}

// What is drawn from: the rows' settings, and its largest value.
struct Draw {
  const SampleRow& row;
  const Values& values;
  float peak;
  bool by_k;
  double total;  // of all exponentials, where there is no top_k
  __device__ __forceinline__ double weight(uint32_t order) const {
    return exp((double(value_of(order)) - double(peak)) / row.temperature);
  }
};

// Without filters in the order of places: first the part, then the place in it.
__device__ __forceinline__ int draw_by_place(const Workspace& w, const Draw& d, const Scanned& row, int parts) {
  const double target = d.row.uniform * d.total;
  int part = first_where(parts, [&](int i) { return w.sums[i] > target; });
  if (part == parts) part = parts - 1;
  const double left = part == 0 ? target : target - w.sums[part - 1];
  sync_threads();
  const Vector<float, 4> four = d.values.four(part * kPart + int(threadIdx.x) * 4);
  const float scale = scale_of(d.row.temperature);
#pragma unroll
  for (int i = 0; i < 4; ++i) w.sums[int(threadIdx.x) * 4 + i] = double(expf((four[i] - d.peak) / scale));
  sync_threads();
  sum_up(w, kPart);
  const int place = first_where(kPart, [&](int i) { return w.sums[i] > left; });
  // The two sums of a part may differ in their last bits.
  return place < kPart ? part * kPart + place : int(place_of(row.best[part]));
}

// From `count` candidates, all that can be kept.
__device__ __forceinline__ int draw_sorted(const Workspace& w, const Draw& d, int count) {
  sort_candidates(w, count);
  for (int i = int(threadIdx.x); i < count; i += kThreads) w.sums[i] = d.weight(order_of(Ranked(w.candidates[i])));
  sync_threads();
  sum_up(w, count);
  int kept = d.by_k && d.row.top_k < count ? d.row.top_k : count;
  if (d.row.top_p < 1.0) {
    const double wanted = d.row.top_p * (d.by_k ? double(w.sums[kept - 1]) : d.total);
    const int last = first_where(kept, [&](int i) { return w.sums[i] >= wanted; });
    kept = last < kept ? last + 1 : kept;
  }
  if (d.row.min_p > 0.0)
    kept = first_where(kept, [&](int i) { return d.weight(order_of(Ranked(w.candidates[i]))) < d.row.min_p; });
  const double target = d.row.uniform * w.sums[kept - 1];
  const int place = first_where(kept - 1, [&](int i) { return w.sums[i] > target; });
  return int(place_of(Ranked(w.candidates[place])));
}

// The same from any number of them, unsorted: what is kept ends at an order, and with how many of that order.
__device__ __forceinline__ int draw_unsorted(const Workspace& w, const Draw& d, int count, uint32_t bound) {
  const float factor = 1.0f / scale_of(d.row.temperature);
  const auto weight = [&](uint32_t order) { return Weight(expf((value_of(order) - d.peak) * factor) * kOne); };
  const auto weighed = [&](auto&& take) {
    each_candidate(w, d.values, bound, [&](uint32_t order, int) { take(order, weight(order)); });
  };
  uint32_t last = bound;
  Weight equals = ~Weight(0);
  const auto kept_weight = [&] {
    Weight above = 0, same = 0;
    each_candidate(w, d.values, bound, [&](uint32_t order, int) {
      if (order > last) above += weight(order);
      same += order == last;
    });
    above = block_total<kWarps>(above, w.scratch), same = block_total<kWarps>(same, w.scratch);
    return above + (same < equals ? same : equals) * weight(last);
  };
  if (d.by_k && d.row.top_k < count) {
    const Found found = descend(w, Weight(d.row.top_k - 1), [&](auto&& take) {
      each_candidate(w, d.values, bound, [&](uint32_t order, int) { take(order, Weight(1)); });
    });
    last = found.order, equals = Weight(d.row.top_k) - found.before;
  }
  Weight kept = kept_weight();
  if (d.row.top_p < 1.0) {
    const double wanted = ceil(d.row.top_p * (d.by_k ? double(kept) : d.total * double(kOne)));
    if (wanted < double(kept)) {
      const Weight target = wanted > 1.0 ? Weight(wanted) - 1 : 0;
      const Found found = descend(w, target, weighed);
      last = found.order, equals = (target - found.before) / weight(last) + 1;
      kept = kept_weight();
    }
  }
  if (d.row.min_p > 0.0 && d.weight(last) < d.row.min_p) {
    uint32_t low = last, high = order_of(d.peak);  // the least that is likely enough is above `low`
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (d.weight(middle) < d.row.min_p ? low : high) = middle;
    }
    last = high, equals = ~Weight(0);
    kept = kept_weight();
  }
  const double drawn = d.row.uniform * double(kept);
  const Weight target = drawn < double(kept) && Weight(drawn) < kept ? Weight(drawn) : kept - 1;
  const Found found = descend(w, target, weighed);
  return place_among_equals(w, d.values, found.order, (target - found.before) / weight(found.order));
}

__device__ __forceinline__ int draw(const Workspace& w, const SampleRow& row, const Values& values,
                                    const Scanned& scanned_row, int parts, int strips, float peak) {
  Draw d{row, values, peak, filters_by_k(row, values.size), 0.0};
  const bool by_place = !d.by_k && row.top_p >= 1.0 && row.min_p <= 0.0;
  if (by_place || (!d.by_k && row.top_p < 1.0)) d.total = total_of(w, scanned_row, parts, peak, row.temperature);
  if (by_place) return draw_by_place(w, d, scanned_row, parts);
  load_tops(w, scanned_row, strips);
  uint32_t bound = kOrderOfMinusInfinity + 1;
  if (d.by_k) {
    const uint32_t kth = bound_of(w, strips, row.top_k);
    bound = kth > bound ? kth : bound;
  } else {
    // What top_p drops has (1 - top_p) of the total, so a value whose equals would not reach that all together is
    // dropped.
    double floor = -double(INFINITY);
    const double slack = 1e-3;  // the exact tests decide
    if (row.top_p < 1.0) floor = log((1.0 - row.top_p) * d.total / double(values.size)) - slack;
    if (row.min_p > 0.0) {
      const double least = log(row.min_p) - slack;
      floor = least > floor ? least : floor;
    }
    const uint32_t lowest = order_of(float(double(peak) + row.temperature * floor));
    bound = lowest > bound ? lowest : bound;
  }
  const int count = gather(w, values, strips, bound);
  return count <= kMostCandidates ? draw_sorted(w, d, count) : draw_unsorted(w, d, count, bound);
}

// The likeliest `count` tokens, into every `stride`-th word of `out`.
__device__ __forceinline__ void report_top(const Workspace& w, const Values& values, const Scanned& scanned_row,
                                           int strips, int count, int64_t* out, int64_t stride) {
  load_tops(w, scanned_row, strips);
  uint32_t bound = values.order(bound_of(w, strips, count)), equal = 0;
  if (count > strips) bound = 0;
  int found = gather(w, values, strips, bound);
  if (found > kMostCandidates) {  // nearly all are equal
    equal = descend(w, Weight(count - 1), [&](auto&& take) {
              each_candidate(w, values, bound, [&](uint32_t order, int) { take(order, Weight(1)); });
            }).order;
    found = gather(w, values, strips, equal + 1);
  }
  sort_candidates(w, found);
  for (int i = 0; i < count; ++i) {
    const Ranked best =
        i < found ? Ranked(w.candidates[i]) : ranked(equal, place_among_equals(w, values, equal, uint64_t(i - found)));
    const uint64_t bits = bit_cast<uint32_t>(value_of(order_of(best)));
    if (threadIdx.x == 0) out[i * stride] = int64_t(bits << 32 | uint64_t(place_of(best)));
  }
}

__device__ __forceinline__ Ranked best_of(const Scanned& row, int parts, const Shared<uint64_t>& scratch) {
  Ranked best = 0;
  for (int i = int(threadIdx.x); i < parts; i += kThreads) best = row.best[i] > best ? row.best[i] : best;
  best = block_largest<kWarps>(best, scratch);
  sync_threads();
  return best;
}

__global__ void __launch_bounds__(kThreads)
    sample_choose(const SampleRow* rows, const float* logits, const float* raw, const uint32_t* mask,
                  int64_t mask_words, int size, int parts, int strips, bool aligned, bool reports, uint64_t* memory,
                  int64_t* out) {
  SharedArena arena;
  Workspace w;
  w.candidates = arena.take<Ranked>(kMostCandidates);
  w.sums = arena.take<double>(kMostCandidates);
  w.bins = arena.take<Weight>(kBins * kReplicas);
  w.scratch = arena.take<uint64_t>(kWarps);
  w.tops = arena.take<uint32_t>(kMostStrips);
  w.chosen = arena.take<uint16_t>(kMostStrips);
  w.counts = arena.take<int>(2);
  const int64_t num_rows = gridDim.x, number = blockIdx.x;
  const SampleRow& row = rows[number];
  const bool reported = reports && row.num_logprobs >= 0;
  const Scanned adjusted = scanned(memory, num_rows, number, parts, strips, false, reports);
  const Scanned before = scanned(memory, num_rows, number, parts, strips, true, reports);
  float peak = 0.0f;
  int token = 0;
  const float raw_peak = reported ? value_of(order_of(best_of(before, parts, w.scratch))) : 0.0f;
  if (!is_finite(raw_peak)) {
    peak = raw_peak;
  } else if (row.forced >= 0) {
    token = row.forced;
  } else {
    const Ranked best = best_of(adjusted, parts, w.scratch);
    peak = value_of(order_of(best));
    const Values values{logits + number * size, size, aligned,
                        row.mask_row >= 0 ? mask + row.mask_row * mask_words : nullptr};
    if (is_finite(peak))
      token = row.temperature == 0.0 ? int(place_of(best)) : draw(w, row, values, adjusted, parts, strips, peak);
  }
  const int status = is_finite(peak) ? 0 : order_of(peak) == kOrderOfMinusInfinity ? 2 : 1;
  if (threadIdx.x == 0) {
    out[number] = token;
    out[num_rows + number] = int64_t(uint64_t(bit_cast<uint32_t>(peak)) << 32 | uint64_t(status));
  }
  if (!reported || status != 0) return;
  sync_threads();
  Values values{raw + number * size, size, aligned, nullptr, true, raw_peak, 0.0f};
  values.log_sum = float(log(total_of(w, before, parts, raw_peak, 1.0)));
  if (threadIdx.x == 0)
    out[2 * num_rows + number] = int64_t(uint64_t(bit_cast<uint32_t>(values.logprob(values.row[token]))));
  const int count = row.num_logprobs < size ? row.num_logprobs : size;
  if (count > 0) report_top(w, values, before, strips, count, out + 3 * num_rows + number, num_rows);
}

int parts_of(int64_t cols) { return int((cols + kPart - 1) / kPart); }
int strips_of(int64_t cols) { return int((cols + kStrip - 1) / kStrip); }

}  // namespace

int64_t sample_scratch_words(int64_t rows, int64_t cols, bool logprobs) {
  const int64_t all = rows * (logprobs ? 2 : 1);
  return 2 * all * parts_of(cols) + (all * strips_of(cols) + 1) / 2;
}

void sample(const void* table, int64_t row_bytes, int64_t rows, int64_t cols, float* logits, const float* raw,
            const uint32_t* mask, int64_t mask_words, bool adjusts, int64_t num_top, uint64_t* scratch, int64_t* out,
            Stream stream) {
  constexpr const char* f = "sample";
  if (row_bytes != int64_t(sizeof(SampleRow)))
    fail(f, "row_bytes", std::to_string(sizeof(SampleRow)), std::to_string(row_bytes));
  check(rows >= 0 && rows <= 65535, f, "rows", "0 to 65535", rows);
  check(cols >= 1 && cols <= kMostCols, f, "cols", "1 to 262144", cols);
  check(num_top >= -1 && num_top <= kMostCandidates, f, "num_top", "-1 to 2048", num_top);
  check(mask == nullptr || mask_words * 32 >= cols, f, "mask_words", "a bit for each column", mask_words);
  if (rows == 0) return;
  const auto* settings = static_cast<const SampleRow*>(table);
  const auto* entries = reinterpret_cast<const SampleEntry*>(settings + rows);
  const int parts = parts_of(cols), strips = strips_of(cols);
  const bool reports = num_top >= 0;
  const bool aligned =
      cols % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0 && reinterpret_cast<uintptr_t>(raw) % 16 == 0;
  if (adjusts) launch<sample_adjust>(f, dim3(unsigned(rows)), kScanThreads, 0, stream, settings, entries, cols, logits);
  const auto* adjusted = static_cast<const float*>(logits);
  launch<sample_scan>(f, dim3(unsigned(parts), unsigned(rows), reports ? 2 : 1), kScanThreads,
                      kScanThreads / kWarpSize * sizeof(uint64_t), stream, settings, adjusted, raw, mask, mask_words,
                      int(cols), strips, aligned, scratch);
  launch<sample_choose>(f, dim3(unsigned(rows)), kThreads, kWorkspaceBytes, stream, settings, adjusted, raw, mask,
                        mask_words, int(cols), parts, strips, aligned, reports, scratch, out);
}

}  // namespace helexa::cuda
