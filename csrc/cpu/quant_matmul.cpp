#include "quant_matmul.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "check.h"
#include "quant_dot.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr int kMatvecRows = 8;                    // up to here weights are unpacked in registers as they stream by
constexpr int64_t kActivationBudget = 512 << 10;  // bytes of activations kept in a core's L2 cache while weights pass
constexpr int kMaxPassRows = 252, kPassStep = 6;  // rows a pass, a multiple of a register block

// Grow-only 64-byte aligned memory.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

struct ThreadScratch {
  Scratch sums, tile_a, tile_b;
};

// Two row groups that are computed together: neighbours of one part, or a gate and its up.
struct Job {
  const PackedMatrix *part_a, *part_b;  // part_b null: one group
  int64_t group_a, group_b;
  int64_t column_a, column_b;  // where their results go
};

struct State {
  std::mutex mutex;
  Scratch int8_activations, float_activations;
  std::vector<ThreadScratch> threads;
  std::vector<Job> jobs;
};

State& state() {
  static State* s = new State;  // never destroyed: worker threads may outlive static destructors
  return *s;
}

int lanes_of(const PackedMatrix& part, int64_t group) {
  return static_cast<int>(std::min<int64_t>(kLanes, part.rows() - group * kLanes));
}

void list_jobs(const QuantMatmul& call, std::vector<Job>& jobs) {
  jobs.clear();
  int64_t column = 0;
  if (call.activation == Activation::kSiluMul) {
    const size_t half = call.parts.size() / 2;
    for (size_t p = 0; p < half; ++p) {
      for (int64_t g = 0; g < call.parts[p]->groups(); ++g)
        jobs.push_back({call.parts[p], call.parts[p + half], g, g, column + g * kLanes, 0});
      column += call.parts[p]->rows();
    }
    return;
  }
  for (const PackedMatrix* part : call.parts) {
    for (int64_t g = 0; g < part->groups(); g += 2) {
      const bool pair = g + 1 < part->groups();
      jobs.push_back({part, pair ? part : nullptr, g, g + 1, column + g * kLanes, column + (g + 1) * kLanes});
    }
    column += part->rows();
  }
}

// Rows [0, rows) of a pass: `int8` and `floats` hold them chunk by chunk, whichever the weights need.
struct Pass {
  const ActivationChunk* int8;
  const float* floats;
  int64_t cols, rows;
  bool matvec() const { return rows <= kMatvecRows; }
};

void code_sums(const Pass& pass, const Job& job, ThreadScratch& scratch, float* sums) {
  const Kernels& k = kernels();
  const CodeKernels* a = k.codes(job.part_a->type());
  const CodeKernels* b = job.part_b ? k.codes(job.part_b->type()) : nullptr;
  const uint8_t* group_a = job.part_a->group(job.group_a);
  const uint8_t* group_b = b ? job.part_b->group(job.group_b) : nullptr;
  const int rows = static_cast<int>(pass.rows);
  if (pass.matvec()) {
    a->matvec(group_a, job.part_a->header_area(), pass.cols, pass.int8, pass.rows, rows, sums);
    if (b) b->matvec(group_b, job.part_b->header_area(), pass.cols, pass.int8, pass.rows, rows, sums + kLanes);
    return;
  }
  auto* tile_a = scratch.tile_a.get<UnpackedGroup>(kChunkGroups);
  auto* tile_b = scratch.tile_b.get<UnpackedGroup>(kChunkGroups);
  for (int64_t chunk = 0; chunk * kChunk < pass.cols; ++chunk) {
    const int groups = static_cast<int>(std::min<int64_t>(kChunkGroups, pass.cols / 32 - chunk * kChunkGroups));
    const ActivationChunk* x = pass.int8 + chunk * pass.rows;
    a->unpack(group_a, job.part_a->header_area(), chunk, groups, tile_a);
    if (b) b->unpack(group_b, job.part_b->header_area(), chunk, groups, tile_b);
    if (b && a->tile != b->tile) {
      a->tile(tile_a, nullptr, groups, x, rows, sums);
      b->tile(tile_b, nullptr, groups, x, rows, sums + kLanes);
    } else {
      a->tile(tile_a, b ? tile_b : nullptr, groups, x, rows, sums);
    }
  }
}

// Columns [k0, k0 + depth) of a row group as [depth][16] floats; `scratch` may be left unused.
const float* float_weights(const PackedMatrix& part, int64_t group, int64_t k0, int depth, float* scratch) {
  const uint8_t* data = part.group(group);
  const TypeTraits& traits = part.traits();
  if (part.storage() == Storage::kFloats) {
    const uint8_t* from = data + k0 * kLanes * traits.block_bytes;
    if (part.type() == QuantType::F32) return reinterpret_cast<const float*>(from);
    kernels().widen(part.type(), from, depth, scratch);
    return scratch;
  }
  float row[kChunk];
  const int64_t row_bytes = part.cols() / traits.block_size * traits.block_bytes;
  std::memset(scratch, 0, size_t(depth) * kLanes * sizeof(float));
  for (int r = 0; r < lanes_of(part, group); ++r) {
    dequantize_row(traits, data + r * row_bytes + k0 / traits.block_size * traits.block_bytes, depth, row);
    for (int i = 0; i < depth; ++i) scratch[i * kLanes + r] = row[i];
  }
  return scratch;
}

void float_sums(const Pass& pass, const Job& job, ThreadScratch& scratch, float* sums) {
  const Kernels& k = kernels();
  const int rows = static_cast<int>(pass.rows);
  const bool pair = job.part_b != nullptr;
  const int64_t stride = pass.rows * kChunk;
  if (pass.matvec() && job.part_a->storage() == Storage::kFloats &&
      (!pair || job.part_b->type() == job.part_a->type())) {
    k.float_matvec(job.part_a->type(), job.part_a->group(job.group_a), pair ? job.part_b->group(job.group_b) : nullptr,
                   pass.cols, pass.floats, stride, rows, sums);
    return;
  }
  auto* tile_a = scratch.tile_a.get<float>(kChunk * kLanes);
  auto* tile_b = scratch.tile_b.get<float>(kChunk * kLanes);
  for (int64_t k0 = 0; k0 < pass.cols; k0 += kChunk) {
    const int depth = static_cast<int>(std::min<int64_t>(kChunk, pass.cols - k0));
    const float* a = float_weights(*job.part_a, job.group_a, k0, depth, tile_a);
    const float* b = pair ? float_weights(*job.part_b, job.group_b, k0, depth, tile_b) : nullptr;
    k.float_tile(a, b, depth, pass.floats + k0 / kChunk * stride, kChunk, rows, sums);
  }
}

// sums[32 * row + lane] of the first group, 16 further of the second.
void sums_of(const Pass& pass, const Job& job, ThreadScratch& scratch, float* sums) {
  std::memset(sums, 0, size_t(pass.rows) * kSumStride * sizeof(float));  // tiles add to what is there
  const bool a_codes = job.part_a->storage() == Storage::kCodes;
  const bool b_codes = job.part_b ? job.part_b->storage() == Storage::kCodes : a_codes;
  if (a_codes == b_codes) return a_codes ? code_sums(pass, job, scratch, sums) : float_sums(pass, job, scratch, sums);
  // A gate and an up of different kinds.
  const Job first{job.part_a, nullptr, job.group_a, 0, 0, 0}, second{job.part_b, nullptr, job.group_b, 0, 0, 0};
  a_codes ? code_sums(pass, first, scratch, sums) : float_sums(pass, first, scratch, sums);
  b_codes ? code_sums(pass, second, scratch, sums + kLanes) : float_sums(pass, second, scratch, sums + kLanes);
}

void write_lanes(const float* sums, int lanes, const float* residual, float* out) {
  if (residual) {
    for (int l = 0; l < lanes; ++l) out[l] = residual[l] + sums[l];
  } else {
    for (int l = 0; l < lanes; ++l) out[l] = sums[l];
  }
}

void write_results(const QuantMatmul& call, const Job& job, const float* sums, int64_t first_row, int64_t rows,
                   int64_t width) {
  const int lanes_a = lanes_of(*job.part_a, job.group_a);
  const int lanes_b = job.part_b ? lanes_of(*job.part_b, job.group_b) : 0;
  for (int64_t r = 0; r < rows; ++r, sums += kSumStride) {
    const int64_t at = (first_row + r) * width;
    if (call.activation == Activation::kSiluMul) {
      float product[kLanes];
      kernels().silu_mul(sums, sums + kLanes, product);
      write_lanes(product, lanes_a, nullptr, call.out + at + job.column_a);
      continue;
    }
    const auto residual = [&](int64_t column) { return call.residual ? call.residual + at + column : nullptr; };
    write_lanes(sums, lanes_a, residual(job.column_a), call.out + at + job.column_a);
    if (lanes_b) write_lanes(sums + kLanes, lanes_b, residual(job.column_b), call.out + at + job.column_b);
  }
}

void check_call(const QuantMatmul& call) {
  constexpr const char* kName = "quant_matmul";
  check(!call.parts.empty(), kName, "parts", "at least one matrix", 0);
  check(call.rows >= 0, kName, "num_rows", "0 or more", call.rows);
  for (const PackedMatrix* part : call.parts)
    if (part->cols() != call.parts[0]->cols())
      fail(kName, "parts", "one number of columns, " + std::to_string(call.parts[0]->cols()),
           std::to_string(part->cols()));
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

void quant_matmul(const QuantMatmul& call) {
  check_call(call);
  if (call.rows == 0) return;
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  list_jobs(call, s.jobs);
  s.threads.resize(std::max<size_t>(s.threads.size(), size_t(num_threads())));

  const int64_t cols = call.parts[0]->cols(), chunks = (cols + kChunk - 1) / kChunk;
  int64_t width = 0;
  bool any_codes = false, any_floats = false;
  for (const PackedMatrix* part : call.parts) {
    width += part->rows();
    (part->storage() == Storage::kCodes ? any_codes : any_floats) = true;
  }
  if (call.activation == Activation::kSiluMul) width /= 2;

  const int64_t chunk_bytes = any_floats ? kChunk * sizeof(float) : sizeof(ActivationChunk);
  int64_t pass_rows = call.rows;
  if (call.rows > kMatvecRows) {
    const int64_t most = std::clamp<int64_t>(kActivationBudget / (chunks * chunk_bytes), 48, kMaxPassRows);
    const int64_t passes = (call.rows + most - 1) / most;
    pass_rows = ((call.rows + passes - 1) / passes + kPassStep - 1) / kPassStep * kPassStep;
  }
  const Kernels& k = kernels();
  for (int64_t first = 0; first < call.rows; first += pass_rows) {
    Pass pass{nullptr, nullptr, cols, std::min(pass_rows, call.rows - first)};
    ActivationChunk* int8 = any_codes ? s.int8_activations.get<ActivationChunk>(chunks * pass.rows) : nullptr;
    float* floats = any_floats ? s.float_activations.get<float>(chunks * pass.rows * kChunk) : nullptr;
    pass.int8 = int8, pass.floats = floats;
    const auto prepare = [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = call.x + (first + r) * cols;
        if (int8) k.quantize_row(x, cols, call.norm_weight, call.norm_eps, int8 + r, pass.rows);
        if (floats) k.normalize_row(x, cols, call.norm_weight, call.norm_eps, floats + r * kChunk, pass.rows * kChunk);
      }
    };
    parallel_for(pass.rows, 4, prepare);
    const auto compute = [&](int64_t begin, int64_t end, int thread) {
      ThreadScratch& scratch = s.threads[size_t(thread)];
      float* sums = scratch.sums.get<float>(pass.rows * kSumStride);
      for (int64_t j = begin; j < end; ++j) {
        sums_of(pass, s.jobs[size_t(j)], scratch, sums);
        write_results(call, s.jobs[size_t(j)], sums, first, pass.rows, width);
      }
    };
    parallel_for(int64_t(s.jobs.size()), 1, compute);
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
