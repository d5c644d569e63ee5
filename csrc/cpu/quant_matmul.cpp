#include "quant_matmul.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include "check.h"
#include "quant_sums.h"
#include "thread_pool.h"

namespace helexa {
namespace {

// Two row groups that are computed together: neighbours of one part, or a gate and its up.
struct Job {
  RowGroup a, b;
  int64_t column_a, column_b;  // where their results go
};

// The jobs of one part, or of a gate and its up: numbers from `first_job` on, results from `column` on.
struct Range {
  const PackedMatrix* part;
  const PackedMatrix* up;
  int64_t first_job, column;
};

struct State {
  std::mutex mutex;
  Scratch int8_activations, float_activations, rounded_activations;
  std::vector<ThreadScratch> threads;
  std::vector<Range> ranges;
};

State& state() {
  static State* s = new State;  // never destroyed: worker threads may outlive static destructors
  return *s;
}

RowGroup row_group(const PackedMatrix& part, int64_t group) {
  return {&part, part.group(group), part.lanes(group), part.scale()};
}

// Returns how many jobs there are.
int64_t list_ranges(const QuantMatmul& call, std::vector<Range>& ranges) {
  ranges.clear();
  const bool gated = call.activation == Activation::kSiluMul;
  const size_t count = gated ? call.parts.size() / 2 : call.parts.size();
  int64_t jobs = 0, column = 0;
  for (size_t p = 0; p < count; ++p) {
    const PackedMatrix* part = call.parts[p];
    ranges.push_back({part, gated ? call.parts[p + count] : nullptr, jobs, column});
    jobs += gated ? part->groups() : (part->groups() + 1) / 2;
    column += part->rows();
  }
  return jobs;
}

Job job_at(const std::vector<Range>& ranges, int64_t number) {
  size_t i = 0;
  while (i + 1 < ranges.size() && ranges[i + 1].first_job <= number) ++i;
  const Range& range = ranges[i];
  const int64_t n = number - range.first_job;
  if (range.up) return {row_group(*range.part, n), row_group(*range.up, n), range.column + n * kLanes, 0};
  const bool pair = 2 * n + 1 < range.part->groups();
  return {row_group(*range.part, 2 * n), pair ? row_group(*range.part, 2 * n + 1) : RowGroup{},
          range.column + 2 * n * kLanes, range.column + (2 * n + 1) * kLanes};
}

void code_sums(const Pass& pass, const RowGroup& group_a, const RowGroup& group_b, ThreadScratch& scratch,
               float* sums) {
  const Kernels& k = kernels();
  const CodeKernels* a = k.codes(group_a.matrix->type());
  const CodeKernels* b = group_b ? k.codes(group_b.matrix->type()) : nullptr;
  const int64_t header_a = group_a.matrix->header_area(), header_b = b ? group_b.matrix->header_area() : 0;
  const int rows = static_cast<int>(pass.rows);
  if (pass.matvec()) {
    a->matvec(group_a.data, header_a, pass.cols, pass.int8, pass.stride, rows, sums);
    if (b) b->matvec(group_b.data, header_b, pass.cols, pass.int8, pass.stride, rows, sums + kLanes);
    return;
  }
  auto* tile_a = scratch.tile_a.get<UnpackedGroup>(kChunkGroups);
  auto* tile_b = scratch.tile_b.get<UnpackedGroup>(kChunkGroups);
  for (int64_t chunk = 0; chunk * kChunk < pass.cols; ++chunk) {
    const int groups = static_cast<int>(std::min<int64_t>(kChunkGroups, pass.cols / 32 - chunk * kChunkGroups));
    const ActivationChunk* x = pass.int8 + chunk * pass.stride;
    a->unpack(group_a.data, header_a, chunk, groups, tile_a);
    if (b) b->unpack(group_b.data, header_b, chunk, groups, tile_b);
    if (b && a->tile != b->tile) {
      a->tile(tile_a, nullptr, groups, x, rows, sums);
      b->tile(tile_b, nullptr, groups, x, rows, sums + kLanes);
    } else {
      a->tile(tile_a, b ? tile_b : nullptr, groups, x, rows, sums);
    }
  }
}

// Columns [k0, k0 + depth) of a row group as [depth][16] floats; `scratch` may be left unused.
const float* float_weights(const RowGroup& group, int64_t k0, int depth, float* scratch) {
  const PackedMatrix& part = *group.matrix;
  const TypeTraits& traits = part.traits();
  if (part.storage() == Storage::kFloats) {
    const uint8_t* from = group.data + k0 * kLanes * traits.block_bytes;
    if (part.type() == QuantType::F32) return reinterpret_cast<const float*>(from);
    kernels().widen(part.type(), from, depth, scratch);
    return scratch;
  }
  float row[kChunk];
  const int64_t row_bytes = part.cols() / traits.block_size * traits.block_bytes;
  std::memset(scratch, 0, size_t(depth) * kLanes * sizeof(float));
  for (int r = 0; r < group.lanes; ++r) {
    dequantize_row(traits, group.data + r * row_bytes + k0 / traits.block_size * traits.block_bytes, depth, row);
    for (int i = 0; i < depth; ++i) scratch[i * kLanes + r] = row[i];
  }
  return scratch;
}

void bfloat16_sums(const Pass& pass, const RowGroup& group_a, const RowGroup& group_b, float* sums) {
  const Kernels& k = kernels();
  const int rows = static_cast<int>(pass.rows);
  const uint8_t *a = group_a.data, *b = group_b.data;
  if (pass.matvec()) return k.bfloat16_matvec(a, b, pass.cols, pass.rounded, pass.stride, rows, sums);
  const int64_t chunk_bytes = kChunk * kLanes * int64_t(sizeof(uint16_t)), group_bytes = group_a.matrix->group_bytes();
  // Neighbours are followed by the two groups behind them, a gate and its up by the next of each.
  const int64_t step = b == a + group_bytes ? 2 * group_bytes : group_bytes;
  for (int64_t k0 = 0; k0 < pass.cols; k0 += kChunk) {
    const bool last = k0 + kChunk >= pass.cols;
    const int64_t at = k0 / kChunk * chunk_bytes, ahead = last ? step : at + chunk_bytes;
    const uint8_t* next[2] = {a + ahead, b ? b + ahead : nullptr};
    k.bfloat16_tile(a + at, b ? b + at : nullptr, next, int(std::min<int64_t>(kChunk, pass.cols - k0)),
                    pass.rounded + k0 / kChunk * pass.stride, rows, sums);
  }
}

void float_sums(const Pass& pass, const RowGroup& group_a, const RowGroup& group_b, ThreadScratch& scratch,
                float* sums) {
  const Kernels& k = kernels();
  const int rows = static_cast<int>(pass.rows);
  const auto meets_rounded = [&](const RowGroup& g) { return g.matrix->type() == QuantType::BF16 && pass.rounded; };
  const bool bfloat16 = meets_rounded(group_a);
  if (group_b && bfloat16 != meets_rounded(group_b)) {
    float_sums(pass, group_a, {}, scratch, sums);
    float_sums(pass, group_b, {}, scratch, sums + kLanes);
    return;
  }
  if (bfloat16) return bfloat16_sums(pass, group_a, group_b, sums);
  const bool widens = group_a.matrix->type() == QuantType::BF16;
  if (pass.matvec() && !widens && group_a.matrix->storage() == Storage::kFloats &&
      (!group_b || group_b.matrix->type() == group_a.matrix->type())) {
    k.float_matvec(group_a.matrix->type(), group_a.data, group_b.data, pass.cols, pass.floats, pass.stride, rows, sums);
    return;
  }
  auto* tile_a = scratch.tile_a.get<float>(kChunk * kLanes);
  auto* tile_b = scratch.tile_b.get<float>(kChunk * kLanes);
  for (int64_t k0 = 0; k0 < pass.cols; k0 += kChunk) {
    const int depth = static_cast<int>(std::min<int64_t>(kChunk, pass.cols - k0));
    const FloatChunk* x = pass.floats + k0 / kChunk * pass.stride;
    const float* a = float_weights(group_a, k0, depth, tile_a);
    const float* b = group_b ? float_weights(group_b, k0, depth, tile_b) : nullptr;
    k.float_tile(a, b, depth, x, rows, sums);
  }
}

void scale_lanes(float scale, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int l = 0; l < kLanes; ++l) sums[r * kSumStride + l] *= scale;
}

inline void add_lanes(const float* sums, int lanes, const float* residual, float* out) {
  if (residual) {
    for (int l = 0; l < lanes; ++l) out[l] = residual[l] + sums[l];
  } else {
    for (int l = 0; l < lanes; ++l) out[l] = sums[l];
  }
}

void write_lanes(const float* sums, int lanes, const float* residual, float* out) {
  if (lanes == kLanes) {  // of a known number the compiler makes vectors
    add_lanes(sums, kLanes, residual, out);
  } else {
    add_lanes(sums, lanes, residual, out);
  }
}

void write_results(const QuantMatmul& call, const Job& job, const float* sums, int64_t first_row, int64_t rows,
                   int64_t width) {
  for (int64_t r = 0; r < rows; ++r, sums += kSumStride) {
    const int64_t at = (first_row + r) * width;
    if (call.activation == Activation::kSiluMul) {
      float product[kLanes];
      kernels().silu_mul(sums, sums + kLanes, product);
      write_lanes(product, job.a.lanes, nullptr, call.out + at + job.column_a);
      continue;
    }
    const auto residual = [&](int64_t column) { return call.residual ? call.residual + at + column : nullptr; };
    write_lanes(sums, job.a.lanes, residual(job.column_a), call.out + at + job.column_a);
    if (job.b) write_lanes(sums + kLanes, job.b.lanes, residual(job.column_b), call.out + at + job.column_b);
  }
}

void check_call(const QuantMatmul& call) {
  constexpr const char* kName = "quant_matmul";
  check(!call.parts.empty(), kName, "parts", "at least one matrix", 0);
  check(call.rows >= 0, kName, "num_rows", "0 or more", call.rows);
  for (const PackedMatrix* part : call.parts) {
    check(part->stack() == 1, kName, "parts", "single matrices, not a stack", part->stack());
    if (part->cols() != call.parts[0]->cols())
      fail(kName, "parts", "one number of columns, " + std::to_string(call.parts[0]->cols()),
           std::to_string(part->cols()));
  }
  if (call.activation != Activation::kSiluMul) return;
  check(call.parts.size() % 2 == 0, kName, "parts", "gates and as many ups for silu_mul", int64_t(call.parts.size()));
  if (call.residual) fail(kName, "residual", "none with silu_mul", "a pointer");
  const size_t half = call.parts.size() / 2;
  for (size_t p = 0; p < half; ++p)
    if (call.parts[p]->rows() != call.parts[p + half]->rows())
      fail(kName, "parts", "each up as tall as its gate, " + std::to_string(call.parts[p]->rows()),
           std::to_string(call.parts[p + half]->rows()));
}

}  // namespace

int64_t pass_rows(int64_t rows, int64_t cols, size_t chunk_bytes) {
  if (rows <= kMatvecRows) return rows;
  const int64_t row_bytes = (cols + kChunk - 1) / kChunk * int64_t(chunk_bytes);
  const int64_t most = std::clamp<int64_t>(kActivationBudget / row_bytes, 48, kMaxPassRows);
  const int64_t passes = (rows + most - 1) / most;
  return ((rows + passes - 1) / passes + kPassStep - 1) / kPassStep * kPassStep;
}

void sums_of(const Pass& pass, const RowGroup& a, const RowGroup& b, ThreadScratch& scratch, float* sums) {
  std::memset(sums, 0, size_t(pass.rows) * kSumStride * sizeof(float));  // tiles add to what is there
  const bool a_codes = a.matrix->storage() == Storage::kCodes;
  const bool b_codes = b ? b.matrix->storage() == Storage::kCodes : a_codes;
  if (a_codes == b_codes) {
    a_codes ? code_sums(pass, a, b, scratch, sums) : float_sums(pass, a, b, scratch, sums);
  } else {  // a gate and an up of different kinds
    a_codes ? code_sums(pass, a, {}, scratch, sums) : float_sums(pass, a, {}, scratch, sums);
    b_codes ? code_sums(pass, b, {}, scratch, sums + kLanes) : float_sums(pass, b, {}, scratch, sums + kLanes);
  }
  if (a.scale != 1.0f) scale_lanes(a.scale, pass.rows, sums);
  if (b.scale != 1.0f) scale_lanes(b.scale, pass.rows, sums + kLanes);
}

void quant_matmul(const QuantMatmul& call) {
  check_call(call);
  if (call.rows == 0) return;
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const int64_t jobs = list_ranges(call, s.ranges);
  s.threads.resize(std::max<size_t>(s.threads.size(), size_t(num_threads())));

  const int64_t cols = call.parts[0]->cols(), chunks = (cols + kChunk - 1) / kChunk;
  int64_t width = 0;
  bool any_codes = false, any_floats = false, any_rounded = false;
  for (const PackedMatrix* part : call.parts) {
    width += part->rows();
    const bool rounded = part->type() == QuantType::BF16 && !call.exact;
    (part->storage() == Storage::kCodes ? any_codes : rounded ? any_rounded : any_floats) = true;
  }
  if (call.activation == Activation::kSiluMul) width /= 2;

  const size_t chunk_bytes = any_floats  ? sizeof(FloatChunk)
                             : any_codes ? sizeof(ActivationChunk)
                                         : sizeof(RoundedChunk);
  const int64_t most_rows = pass_rows(call.rows, cols, chunk_bytes);
  const Kernels& k = kernels();
  for (int64_t first = 0; first < call.rows; first += most_rows) {
    const int64_t rows = std::min(most_rows, call.rows - first);
    ActivationChunk* int8 = any_codes ? s.int8_activations.get<ActivationChunk>(chunks * rows) : nullptr;
    FloatChunk* floats = any_floats ? s.float_activations.get<FloatChunk>(chunks * rows) : nullptr;
    RoundedChunk* rounded = any_rounded ? s.rounded_activations.get<RoundedChunk>(chunks * rows) : nullptr;
    const Pass pass{int8, floats, rounded, cols, rows, rows};
    const auto prepare = [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = call.x + (first + r) * cols;
        if (int8) k.quantize_row(x, cols, call.norm_weight, call.norm_eps, int8 + r, rows);
        if (floats) k.normalize_row(x, cols, call.norm_weight, call.norm_eps, floats + r, rows);
        if (rounded) k.round_row(x, cols, call.norm_weight, call.norm_eps, rounded + r, rows);
      }
    };
    parallel_for(pass.rows, 4, prepare);
    const auto compute = [&](int64_t begin, int64_t end, int thread) {
      ThreadScratch& scratch = s.threads[size_t(thread)];
      float* sums = scratch.sums.get<float>(pass.rows * kSumStride);
      for (int64_t j = begin; j < end; ++j) {
        const Job job = job_at(s.ranges, j);
        sums_of(pass, job.a, job.b, scratch, sums);
        write_results(call, job, sums, first, pass.rows, width);
      }
    };
    parallel_for(jobs, 1, compute);
  }
}

void quant_embedding(const PackedMatrix& matrix, const int64_t* ids, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= matrix.rows())
      fail("quant_embedding", "ids", "0 to " + std::to_string(matrix.rows() - 1), std::to_string(ids[i]));
  parallel_for(n, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) matrix.dequantize_row(ids[i], out + i * matrix.cols());
  });
}

}  // namespace helexa
