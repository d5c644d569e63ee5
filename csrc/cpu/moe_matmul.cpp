#include "moe_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "quant_sums.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr const char* kName = "moe_matmul";
constexpr int64_t kSliceRows = 512;  // tokens computed together: bounds the memory, and feeds each expert enough rows
constexpr int64_t kRouterRows = 64;

struct MoeThreadScratch {
  ThreadScratch sums;
  Scratch mapped_a, mapped_b;
};

// Rows [first, first + rows) of the sorted (token, expert) pairs, all of one expert; `hidden_chunk` is where their
// activations for the down projection begin.
struct Segment {
  const Experts* experts;
  int64_t member, first, rows, hidden_chunk;
  Pass in;
};

struct Job {
  int32_t segment;
  int32_t group;  // of gate and up, or the first of two of down
};

struct State {
  std::mutex mutex;
  Scratch int8, floats;                    // activations of every token
  Scratch gathered_int8, gathered_floats;  // the same in the pairs' order
  Scratch hidden, hidden_int8, hidden_floats, products;
  Scratch logits, weights, chosen, place;
  std::vector<int64_t> count, token;
  std::vector<Segment> segments;
  std::vector<Job> jobs;
  std::vector<MoeThreadScratch> threads;
};

State& state() {
  static State* s = new State;  // never destroyed: worker threads may outlive static destructors
  return *s;
}

int64_t chunks_of(int64_t cols) { return (cols + kChunk - 1) / kChunk; }
bool codes(const PackedMatrix& matrix) { return matrix.storage() == Storage::kCodes; }

// Which forms of activations a gate and an up, or a down, read.
struct Needs {
  bool int8 = false, floats = false;
  void add(const PackedMatrix* matrix) { (codes(*matrix) ? int8 : floats) = true; }
};

RowGroup row_group(const PackedMatrix& matrix, int64_t group, int64_t member, Scratch& scratch) {
  const float scale = matrix.scale(member);
  if (!matrix.mapped()) return {&matrix, matrix.group(group, member), matrix.lanes(group), scale};
  auto* packed = scratch.get<uint8_t>(matrix.group_bytes());
  matrix.pack_mapped_group(group, member, packed);
  return {&matrix, packed, matrix.lanes(group), scale};
}

// The top_k largest logits, largest first, of equal ones the lowest index first, and their softmax over all experts.
void route(const float* logits, int64_t experts, int top_k, bool norm_topk_prob, int32_t* chosen, float* weights) {
  int kept = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (kept == top_k && !(logits[e] > logits[chosen[top_k - 1]])) continue;
    int at = kept < top_k ? kept++ : top_k - 1;
    for (; at > 0 && logits[e] > logits[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<int32_t>(e);
  }
  // A NaN hides from comparisons but not from the sum.
  const float largest = logits[chosen[0]];
  float total = 0;
  for (int r = 0; r < top_k; ++r) weights[r] = std::exp(logits[chosen[r]] - largest);
  if (norm_topk_prob) {
    for (int r = 0; r < top_k; ++r) total += weights[r];
    for (int64_t e = 0; e < experts; ++e)
      if (std::isnan(logits[e])) total = std::numeric_limits<float>::quiet_NaN();
  } else {
    for (int64_t e = 0; e < experts; ++e) total += std::exp(logits[e] - largest);
  }
  for (int r = 0; r < top_k; ++r) weights[r] /= total;
}

// One slice of the call's tokens, step by step.
class Slice {
 public:
  Slice(const MoeMatmul& call, State& s, float* x, int64_t rows)
      : call_(call),
        s_(s),
        x_(x),
        rows_(rows),
        cols_(call.router->cols()),
        num_experts_(call.experts.gate->stack()),
        pairs_(rows * call.top_k),
        all_pairs_(pairs_ + (call.shared.gate ? rows : 0)),
        hidden_cols_(std::max(call.experts.gate->rows(), call.shared.gate ? call.shared.gate->rows() : 0)) {}

  void run() {
    normalise();
    route_tokens();
    make_segments();
    gate_and_up();
    down();
    add_weighted();
  }

 private:
  void normalise() {
    needs_.floats = true;  // the router's
    for (const Experts* e : {&call_.experts, &call_.shared})
      if (e->gate) needs_.add(e->gate), needs_.add(e->up), hidden_needs_.add(e->down);
    const int64_t chunks = chunks_of(cols_);
    auto* int8 = needs_.int8 ? s_.int8.get<ActivationChunk>(chunks * rows_) : nullptr;
    auto* floats = s_.floats.get<FloatChunk>(chunks * rows_);
    // Nothing is rounded for bfloat16 weights: that would decide which experts the next layer's tokens go to.
    all_ = {int8, floats, nullptr, cols_, rows_, rows_};
    const Kernels& k = kernels();
    parallel_for(rows_, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = x_ + r * cols_;
        if (int8) k.quantize_row(x, cols_, call_.norm_weight, call_.norm_eps, int8 + r, rows_);
        k.normalize_row(x, cols_, call_.norm_weight, call_.norm_eps, floats + r, rows_);
      }
    });
  }

  void route_tokens() {
    const PackedMatrix& router = *call_.router;
    const int64_t width = router.rows(), passes = (rows_ + kRouterRows - 1) / kRouterRows;
    auto* logits = s_.logits.get<float>(rows_ * width);
    parallel_for(passes * router.groups(), 1, [&](int64_t begin, int64_t end, int thread) {
      MoeThreadScratch& scratch = s_.threads[size_t(thread)];
      float* sums = scratch.sums.sums.get<float>(kRouterRows * kSumStride);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = j / router.groups() * kRouterRows, g = j % router.groups();
        const Pass pass = part(all_, first, std::min(kRouterRows, rows_ - first));
        const RowGroup group{&router, router.group(g), router.lanes(g)};
        sums_of(pass, group, {}, scratch.sums, sums);
        for (int64_t r = 0; r < pass.rows; ++r)
          std::memcpy(logits + (first + r) * width + g * kLanes, sums + r * kSumStride, size_t(group.lanes) * 4);
      }
    });
    weights_per_row_ = call_.top_k + (call_.shared.gate ? 1 : 0);
    chosen_ = s_.chosen.get<int32_t>(pairs_);
    weights_ = s_.weights.get<float>(rows_ * weights_per_row_);
    parallel_for(rows_, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        float* weights = weights_ + r * weights_per_row_;
        route(logits + r * width, num_experts_, call_.top_k, call_.norm_topk_prob, chosen_ + r * call_.top_k, weights);
        if (call_.shared.gate) weights[call_.top_k] = 1.0f / (1.0f + std::exp(-logits[r * width + num_experts_]));
      }
    });
  }

  // Sorts the pairs by expert and cuts each expert's into passes.
  void make_segments() {
    s_.count.assign(size_t(num_experts_) + 1, 0);
    for (int64_t p = 0; p < pairs_; ++p) ++s_.count[size_t(chosen_[p]) + 1];
    for (int64_t e = 0; e < num_experts_; ++e) s_.count[size_t(e) + 1] += s_.count[size_t(e)];
    s_.segments.clear();
    hidden_chunks_ = 0;
    for (int64_t e = 0; e < num_experts_; ++e)
      cut(call_.experts, e, s_.count[size_t(e)], s_.count[size_t(e) + 1] - s_.count[size_t(e)]);
    if (call_.shared.gate) cut(call_.shared, 0, pairs_, rows_);
    place_ = s_.place.get<int64_t>(pairs_);
    s_.token.resize(size_t(pairs_));
    for (int64_t p = 0; p < pairs_; ++p) {
      place_[p] = s_.count[size_t(chosen_[p])]++;
      s_.token[size_t(place_[p])] = p / call_.top_k;
    }
    gather();
  }

  void cut(const Experts& experts, int64_t member, int64_t first, int64_t count) {
    if (count == 0) return;
    const bool floats = !codes(*experts.gate) || !codes(*experts.up);
    const int64_t most = pass_rows(count, cols_, floats ? sizeof(FloatChunk) : sizeof(ActivationChunk));
    const int64_t chunks = chunks_of(experts.gate->rows());
    for (int64_t at = 0; at < count; at += most) {
      const int64_t rows = std::min(most, count - at);
      s_.segments.push_back({&experts, member, first + at, rows, hidden_chunks_, {}});
      hidden_chunks_ += rows * chunks;
    }
  }

  // Gives each segment its tokens' activations side by side. A single token is read where it is.
  void gather() {
    const int64_t chunks = chunks_of(cols_);
    auto* int8 = needs_.int8 ? s_.gathered_int8.get<ActivationChunk>(chunks * pairs_) : nullptr;
    Needs expert_needs;
    expert_needs.add(call_.experts.gate), expert_needs.add(call_.experts.up);
    auto* floats = expert_needs.floats ? s_.gathered_floats.get<FloatChunk>(chunks * pairs_) : nullptr;
    parallel_for(int64_t(s_.segments.size()), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        Segment& segment = s_.segments[size_t(i)];
        if (segment.experts == &call_.shared) {
          segment.in = part(all_, segment.first - pairs_, segment.rows);
          continue;
        }
        const int64_t* token = s_.token.data() + segment.first;
        if (segment.rows == 1) {
          segment.in = part(all_, token[0], 1);
          continue;
        }
        ActivationChunk* int8_out = expert_needs.int8 ? int8 + segment.first * chunks : nullptr;
        FloatChunk* floats_out = floats ? floats + segment.first * chunks : nullptr;
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t r = 0; r < segment.rows; ++r) {
            const int64_t to = c * segment.rows + r, from = c * rows_ + token[r];
            if (int8_out) int8_out[to] = all_.int8[from];
            if (floats_out) floats_out[to] = all_.floats[from];
          }
        segment.in = {int8_out, floats_out, nullptr, cols_, segment.rows, segment.rows};
      }
    });
  }

  // hidden[pair] = silu(gate x) * (up x)
  void gate_and_up() {
    auto* hidden = s_.hidden.get<float>(all_pairs_ * hidden_cols_);
    list_jobs([](const Experts& e) { return e.gate->groups(); }, 1);
    for_each_job([&](const Segment& segment, int64_t group, MoeThreadScratch& scratch, float* sums) {
      const RowGroup gate = row_group(*segment.experts->gate, group, segment.member, scratch.mapped_a);
      const RowGroup up = row_group(*segment.experts->up, group, segment.member, scratch.mapped_b);
      sums_of(segment.in, gate, up, scratch.sums, sums);
      for (int64_t r = 0; r < segment.rows; ++r) {
        float product[kLanes];
        kernels().silu_mul(sums + r * kSumStride, sums + r * kSumStride + kLanes, product);
        float* out = hidden + (segment.first + r) * hidden_cols_ + group * kLanes;
        std::memcpy(out, product, size_t(gate.lanes) * sizeof(float));
      }
    });
  }

  // products[pair] = down hidden[pair]
  void down() {
    const auto* hidden = s_.hidden.get<float>(all_pairs_ * hidden_cols_);
    auto* int8 = hidden_needs_.int8 ? s_.hidden_int8.get<ActivationChunk>(hidden_chunks_) : nullptr;
    auto* floats = hidden_needs_.floats ? s_.hidden_floats.get<FloatChunk>(hidden_chunks_) : nullptr;
    const Kernels& k = kernels();
    // Of a few tokens this is less work than waking the other threads.
    parallel_for(int64_t(s_.segments.size()), rows_ == 1 ? 16 : 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Segment& segment = s_.segments[size_t(i)];
        const int64_t cols = segment.experts->down->cols();
        const bool as_int8 = codes(*segment.experts->down);
        for (int64_t r = 0; r < segment.rows; ++r) {
          const float* row = hidden + (segment.first + r) * hidden_cols_;
          const int64_t to = segment.hidden_chunk + r;
          if (as_int8) k.quantize_row(row, cols, nullptr, 0, int8 + to, segment.rows);
          if (!as_int8) k.normalize_row(row, cols, nullptr, 0, floats + to, segment.rows);
        }
      }
    });
    products_ = s_.products.get<float>(all_pairs_ * cols_);
    list_jobs([](const Experts& e) { return e.down->groups(); }, 2);
    for_each_job([&](const Segment& segment, int64_t group, MoeThreadScratch& scratch, float* sums) {
      const PackedMatrix& matrix = *segment.experts->down;
      const bool as_int8 = codes(matrix), pair = group + 1 < matrix.groups();
      const Pass pass{as_int8 ? int8 + segment.hidden_chunk : nullptr,
                      as_int8 ? nullptr : floats + segment.hidden_chunk,
                      nullptr,
                      matrix.cols(),
                      segment.rows,
                      segment.rows};
      const RowGroup a = row_group(matrix, group, segment.member, scratch.mapped_a);
      const RowGroup b = pair ? row_group(matrix, group + 1, segment.member, scratch.mapped_b) : RowGroup{};
      sums_of(pass, a, b, scratch.sums, sums);
      for (int64_t r = 0; r < segment.rows; ++r)
        std::memcpy(products_ + (segment.first + r) * cols_ + group * kLanes, sums + r * kSumStride,
                    size_t(a.lanes + b.lanes) * sizeof(float));
    });
  }

  // x += weighted sum of a token's products: the chosen experts in their order, then the shared one.
  void add_weighted() {
    const int64_t blocks = (cols_ + kChunk - 1) / kChunk;
    parallel_for(rows_ * blocks, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / blocks, from = i % blocks * kChunk;
        const int depth = static_cast<int>(std::min<int64_t>(kChunk, cols_ - from));
        float total[kChunk] = {};
        for (int64_t n = 0; n < weights_per_row_; ++n) {
          const int64_t at = n < call_.top_k ? place_[r * call_.top_k + n] : pairs_ + r;
          const float weight = weights_[r * weights_per_row_ + n];
          const float* product = products_ + at * cols_ + from;
          for (int c = 0; c < depth; ++c) total[c] += weight * product[c];
        }
        float* out = x_ + r * cols_ + from;
        for (int c = 0; c < depth; ++c) out[c] += total[c];
      }
    });
  }

  static Pass part(const Pass& pass, int64_t first, int64_t rows) {
    return {pass.int8 ? pass.int8 + first : nullptr, pass.floats + first, nullptr, pass.cols, rows, pass.stride};
  }

  template <class Groups>
  void list_jobs(Groups groups, int64_t step) {
    s_.jobs.clear();
    most_rows_ = 0;
    for (size_t i = 0; i < s_.segments.size(); ++i) {
      const int64_t count = groups(*s_.segments[i].experts);
      for (int64_t g = 0; g < count; g += step) s_.jobs.push_back({int32_t(i), int32_t(g)});
      most_rows_ = std::max(most_rows_, s_.segments[i].rows);
    }
  }

  template <class Function>
  void for_each_job(Function function) {
    parallel_for(int64_t(s_.jobs.size()), 1, [&](int64_t begin, int64_t end, int thread) {
      MoeThreadScratch& scratch = s_.threads[size_t(thread)];
      float* sums = scratch.sums.sums.get<float>(std::max(most_rows_, kRouterRows) * kSumStride);
      for (int64_t j = begin; j < end; ++j) {
        const Job& job = s_.jobs[size_t(j)];
        function(s_.segments[size_t(job.segment)], job.group, scratch, sums);
      }
    });
  }

  const MoeMatmul& call_;
  State& s_;
  float* x_;
  const int64_t rows_, cols_, num_experts_, pairs_, all_pairs_, hidden_cols_;
  Needs needs_, hidden_needs_;
  Pass all_{};
  int64_t weights_per_row_ = 0, hidden_chunks_ = 0, most_rows_ = 0;
  int32_t* chosen_ = nullptr;
  int64_t* place_ = nullptr;
  float *weights_ = nullptr, *products_ = nullptr;
};

void check_experts(const Experts& experts, const char* name, int64_t stack, int64_t cols) {
  if (!experts.gate || !experts.up || !experts.down) fail(kName, name, "a gate, an up and a down", "None");
  const auto expect = [&](const PackedMatrix& matrix, int64_t rows, int64_t columns) {
    if (matrix.stack() != stack || matrix.rows() != rows || matrix.cols() != columns)
      fail(kName, name, std::to_string(stack) + " of [" + std::to_string(rows) + ", " + std::to_string(columns) + "]",
           std::to_string(matrix.stack()) + " of [" + std::to_string(matrix.rows()) + ", " +
               std::to_string(matrix.cols()) + "]");
  };
  expect(*experts.gate, experts.gate->rows(), cols);
  expect(*experts.up, experts.gate->rows(), cols);
  expect(*experts.down, cols, experts.gate->rows());
}

void check_call(const MoeMatmul& call) {
  check(call.rows >= 0, kName, "num_rows", "0 or more", call.rows);
  if (!call.router || call.router->type() != QuantType::F32 || call.router->stack() != 1 || call.router->mapped())
    fail(kName, "router", "one packed F32 matrix", "another");
  if (!call.experts.gate) fail(kName, "experts", "a gate, an up and a down", "None");
  const int64_t experts = call.experts.gate->stack(), cols = call.router->cols();
  check_experts(call.experts, "experts", experts, cols);
  if (call.shared.gate) check_experts(call.shared, "shared", 1, cols);
  const int64_t expected = experts + (call.shared.gate ? 1 : 0);
  if (call.router->rows() != expected)
    fail(kName, "router", std::to_string(expected) + " rows", std::to_string(call.router->rows()));
  if (call.top_k < 1 || call.top_k > experts)
    fail(kName, "top_k", "1 to " + std::to_string(experts), std::to_string(call.top_k));
}

}  // namespace

void moe_matmul(const MoeMatmul& call) {
  check_call(call);
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.threads.resize(std::max<size_t>(s.threads.size(), size_t(num_threads())));
  for (int64_t first = 0; first < call.rows; first += kSliceRows)
    Slice(call, s, call.x + first * call.router->cols(), std::min(kSliceRows, call.rows - first)).run();
}

}  // namespace helexa
