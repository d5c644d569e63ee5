// The experts' products for a few tokens: the weights are read once for each token that chose them, at the speed of
// memory, by as many blocks as fill a device even for one token.
//
// Products are integer (int8 activations, quantised_rows.cuh), or float32 where the weights are numbers. Every sum has
// one order, of a row's columns and of a token's experts (ascending, then the shared one), whatever is computed beside.
#include "common.cuh"
#include "moe_matmul.h"
#include "moe_router.h"
#include "quant_planes.cuh"
#include "quantised_rows.cuh"

namespace helexa::cuda {
namespace {

// A row of activations in both forms.
struct Inputs {
  const float* values;
  const uint8_t* codes;
  const float* scales;
  __device__ __forceinline__ Inputs from(int64_t value) const {
    return {values + value, codes + value, scales + value / 8};
  }
};

// Products of a unit of kRows weight rows with the same activations.
template <QuantType kType, bool = kIsNumber<kType>>
struct Dot {
  using U = Unit<kType>;
  using Raw = typename U::Raw;
  __device__ static int units(int cols) { return cols / (16 * U::kSegments); }
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return U::load(w, row, unit);
  }
  template <int kRows>
  __device__ __forceinline__ static void add(const Raw (&raw)[kRows], int unit, const Inputs& in,
                                             float (&sums)[kRows]) {
#pragma unroll
    for (int s = 0; s < U::kSegments; ++s) {
      const int segment = U::segment(unit, s);
      const Words codes = load_global<Words>(in.codes + 16 * segment);
      const auto scale = load_global<Vector<float, 2>>(in.scales + 2 * segment);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Segment weight = U::decode(raw[r], unit, s);
        int dot = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) dot = dp4a(int(weight.codes[i]), int(codes[i]), dot);
        sums[r] = fmaf(weight.scale * scale[0], float(dot), sums[r]);
        if constexpr (U::kMinimum) sums[r] = fmaf(-weight.minimum, scale[1], sums[r]);
      }
    }
  }
};

template <QuantType kType>
struct Dot<kType, true> {
  using U = NumberUnit<kType>;
  using Raw = Words;
  __device__ static int units(int cols) { return cols / U::kValues; }
  __device__ __forceinline__ static Raw load(const WeightPlanes& w, int64_t row, int unit) {
    return U::load(w, row, unit);
  }
  template <int kRows>
  __device__ __forceinline__ static void add(const Raw (&raw)[kRows], int unit, const Inputs& in,
                                             float (&sums)[kRows]) {
#pragma unroll
    for (int i = 0; i < U::kValues; i += 4) {
      const auto values = load_global<Vector<float, 4>>(in.values + unit * U::kValues + i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r] = fmaf(U::value(raw[r], i + j), values[j], sums[r]);
      }
    }
  }
};

// Stacks as kernels take them.
struct Stack {
  WeightPlanes planes;
  QuantType type;
  int rows, cols;
  const float* scales;
  __device__ __forceinline__ float scale(int expert) const { return scales ? scales[expert] : 1.0f; }
};
struct Stacks {
  Stack gate, up, down;
};
struct FewArguments {
  Stacks routed, shared;
  int rows, top_k;
  bool has_shared;
  const int32_t* chosen;
  const float* weights;
  Inputs y;
  float* hidden;
  uint8_t* hidden_codes;
  float* hidden_scales;
  float* x;
};

// Where the gated products of a token's experts begin: those of all tokens' chosen experts, then the shared one's.
__device__ __forceinline__ int64_t hidden_of(const FewArguments& call, int token, bool shared) {
  const int64_t routed = int64_t(call.top_k) * call.routed.down.cols;
  return shared ? call.rows * routed + int64_t(token) * call.shared.down.cols : token * routed;
}

constexpr int kGateUpWarps = 16, kGateUpRows = 2 * kGateUpWarps;  // rows of a block: one scale of what `down` reads

// A block computes 32 values of one expert's gated product for one token, a warp two of them: two rows of gate and two
// of up, which share the activations.
__global__ void __launch_bounds__(kGateUpWarps* kWarpSize) moe_gate_up(const __grid_constant__ FewArguments call) {
  SharedArena arena;
  const Shared<float> products = arena.take<float>(kGateUpRows);
  const int per_token = call.top_k + call.has_shared;
  const int token = int(blockIdx.y) / per_token, rank = int(blockIdx.y) % per_token;
  const bool shared = rank == call.top_k;
  const Stacks& stacks = shared ? call.shared : call.routed;
  const int first = int(blockIdx.x) * kGateUpRows, width = stacks.gate.rows;
  if (first >= width) return;
  const int expert = shared ? 0 : call.chosen[token * call.top_k + rank];
  const int64_t row = int64_t(expert) * width + first + 2 * warp_index();
  const Inputs in = call.y.from(int64_t(token) * stacks.gate.cols);
  float gates[2], ups[2];
  const bool alike = stacks.gate.type == stacks.up.type;
  // Of two types one comes after the other, each twice as if it were both.
  for (int pass = alike ? 1 : 0; pass < 2; ++pass) {
    const Stack& a = alike || pass == 0 ? stacks.gate : stacks.up;
    const Stack& b = pass == 0 ? stacks.gate : stacks.up;
    float sums[4] = {};
    visit_type_here(a.type, [&](auto type) {
      using D = Dot<decltype(type)::value>;
      using Raw = typename D::Raw;
      const int units = D::units(a.cols);
      if constexpr (sizeof(Raw) <= 32) {
#pragma unroll 1
        for (int unit = lane_index(); unit < units; unit += kWarpSize) {
          const Raw raw[4] = {D::load(a.planes, row, unit), D::load(a.planes, row + 1, unit),
                              D::load(b.planes, row, unit), D::load(b.planes, row + 1, unit)};
          D::add(raw, unit, in, sums);
        }
      } else {  // registers have no room for four at once
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const Stack& stack = half ? b : a;
          float parts[2] = {};
          for (int unit = lane_index(); unit < units; unit += kWarpSize) {
            const Raw raw[2] = {D::load(stack.planes, row, unit), D::load(stack.planes, row + 1, unit)};
            D::add(raw, unit, in, parts);
          }
          if (half == 0) sums[0] = parts[0], sums[1] = parts[1];
          sums[2] = parts[0], sums[3] = parts[1];
        }
      }
    });
    if (alike || pass == 0) gates[0] = sums[0], gates[1] = sums[1];
    ups[0] = sums[2], ups[1] = sums[3];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float gate = warp_sum(gates[i]) * stacks.gate.scale(expert), up = warp_sum(ups[i]) * stacks.up.scale(expert);
    if (lane_index() == 0) products[2 * warp_index() + i] = gate / (1.0f + expf(-gate)) * up;
  }
  sync_threads();
  if (warp_index() > 0) return;
  const bool holds = lane_index() < kGateUpRows / 4;
  const int64_t at = hidden_of(call, token, shared) + (shared ? 0 : int64_t(rank) * width) + first + 4 * lane_index();
  Vector<float, 4> four = {};
  if (holds) {
    four = load_shared<Vector<float, 4>>(products, 4 * lane_index());
    store_global(call.hidden + at, four);
  }
  store_quantised(four, holds, call.hidden_codes, call.hidden_scales, at);
}

constexpr int kDownWarps = 4, kDownRows = 2;  // rows of a warp

// sums += weight * (rows [row, row + kDownRows) of `down` of an expert) . (its activations), for `experts` experts
// whose activations lie one behind the other. Lane l holds expert l and its weight. Units of all experts are dealt out
// together, so that no lane waits for a narrow row's end.
__device__ __forceinline__ void add_experts(const Stack& down, int experts, int row, const Inputs& in, int lane_expert,
                                            float lane_weight, float (&sums)[kDownRows]) {
  visit_type_here(down.type, [&](auto type) {
    using D = Dot<decltype(type)::value>;
    const int units = D::units(down.cols), all = experts * units;
#pragma unroll 2
    for (int from = 0; from < all; from += kWarpSize) {
      const int at = from + lane_index(), rank = at < all ? at / units : experts - 1;
      const int expert = shuffle(lane_expert, rank);
      const float weight = shuffle(lane_weight, rank);
      if (at >= all) continue;
      const int unit = at - rank * units;
      const int64_t first = int64_t(expert) * down.rows + row;
      const typename D::Raw raw[kDownRows] = {D::load(down.planes, first, unit), D::load(down.planes, first + 1, unit)};
      float parts[kDownRows] = {};
      D::add(raw, unit, in.from(int64_t(rank) * down.cols), parts);
#pragma unroll
      for (int r = 0; r < kDownRows; ++r) sums[r] = fmaf(weight, parts[r], sums[r]);
    }
  });
}

__global__ void __launch_bounds__(kDownWarps* kWarpSize) moe_down(const __grid_constant__ FewArguments call) {
  const int token = int(blockIdx.y), row = (int(blockIdx.x) * kDownWarps + warp_index()) * kDownRows;
  const int lane = lane_index(), per_token = call.top_k + call.has_shared;
  const bool takes = lane < call.top_k;
  const Inputs hidden = {call.hidden, call.hidden_codes, call.hidden_scales};
  const int expert = takes ? call.chosen[token * call.top_k + lane] : 0;
  const float weight = takes ? call.weights[token * per_token + lane] * call.routed.down.scale(expert) : 0.0f;
  float sums[kDownRows] = {};
  add_experts(call.routed.down, call.top_k, row, hidden.from(hidden_of(call, token, false)), expert, weight, sums);
  if (call.has_shared)
    add_experts(call.shared.down, 1, row, hidden.from(hidden_of(call, token, true)), 0,
                call.weights[token * per_token + call.top_k] * call.shared.down.scale(0), sums);
#pragma unroll
  for (int r = 0; r < kDownRows; ++r) {
    const float sum = warp_sum(sums[r]);
    if (lane == 0) call.x[int64_t(token) * call.routed.down.rows + row + r] += sum;
  }
}

constexpr const char* kName = "moe_matmul";

Stack stack_of(const ExpertStack& stack, int experts) {
  const auto type = static_cast<QuantType>(stack.quant_type);
  return {weight_planes(type, stack.planes, experts * stack.rows, stack.cols), type, int(stack.rows), int(stack.cols),
          stack.scales};
}
Stacks stacks_of(const ExpertStacks& stacks, int experts) {
  return {stack_of(stacks.gate, experts), stack_of(stacks.up, experts), stack_of(stacks.down, experts)};
}

void check_stack(const ExpertStack& stack, const char* name, int experts, int64_t rows, int64_t cols) {
  check_planes(kName, stack.quant_type, experts * rows, cols);
  if (!stack.planes || stack.rows != rows || stack.cols != cols)
    fail(kName, name, "planes of [" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
         "[" + std::to_string(stack.rows) + ", " + std::to_string(stack.cols) + "]");
}

void check_stacks(const ExpertStacks& stacks, const char* name, int experts, int64_t hidden) {
  const int64_t width = stacks.gate.rows;
  if (width <= 0 || width % 32 || hidden % 32 || width > INT32_MAX || hidden > INT32_MAX)
    fail(kName, name, "sizes that are multiples of 32", std::to_string(width) + " and " + std::to_string(hidden));
  check_stack(stacks.gate, name, experts, width, hidden);
  check_stack(stacks.up, name, experts, width, hidden);
  check_stack(stacks.down, name, experts, hidden, width);
}

void check_call(const MoeMatmul& call) {
  check(call.num_experts >= 1 && call.num_experts <= kMostExperts, kName, "num_experts", "1 to 512", call.num_experts);
  check(call.top_k >= 1 && call.top_k <= kMostTopK, kName, "top_k", "1 to 16", call.top_k);
  check_stacks(call.routed, "experts", call.num_experts, call.routed.gate.cols);
  if (call.shared.gate.planes) check_stacks(call.shared, "shared", 1, call.routed.gate.cols);
}

}  // namespace

void moe_matmul_few(const MoeFew& few, Stream stream) {
  const MoeMatmul& moe = few.moe;
  check_call(moe);
  check(moe.rows >= 0 && moe.rows <= kFewTokens, kName, "rows", "0 to 8", moe.rows);
  if (moe.rows == 0) return;
  FewArguments call = {};
  call.has_shared = moe.shared.gate.planes != nullptr;
  call.routed = stacks_of(moe.routed, moe.num_experts);
  if (call.has_shared) call.shared = stacks_of(moe.shared, 1);
  call.rows = int(moe.rows), call.top_k = moe.top_k, call.chosen = moe.chosen, call.weights = moe.weights;
  call.y = {few.normed, few.codes, few.scales};
  call.hidden = few.hidden, call.hidden_codes = few.hidden_codes, call.hidden_scales = few.hidden_scales;
  call.x = moe.x;
  const int64_t widest = moe.routed.gate.rows > moe.shared.gate.rows ? moe.routed.gate.rows : moe.shared.gate.rows;
  const unsigned slots = unsigned(moe.rows) * unsigned(moe.top_k + call.has_shared);
  launch<moe_gate_up>(kName, dim3(unsigned(widest / kGateUpRows), slots), kGateUpWarps * kWarpSize,
                      kGateUpRows * sizeof(float), stream, call);
  launch<moe_down>(kName, dim3(unsigned(call.routed.down.rows / (kDownWarps * kDownRows)), unsigned(moe.rows)),
                   kDownWarps * kWarpSize, 0, stream, call);
}

}  // namespace helexa::cuda
