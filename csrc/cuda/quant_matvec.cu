// Few rows of activations times quantised matrices: decoding. The time is that of reading the weights once, so all here
// is there to keep 16-byte loads of weights in flight.
//
// Every block holds the activations in shared memory, quantised, and each warp walks over pairs of weight rows (a gate
// and its up, or two neighbours), its lanes over a pair's units (quant_planes.cuh): unit `32 i + lane` at step i. Loads
// run a few steps ahead, across the borders of pairs. A lane's sums meet in the warp at the end of a pair.
//
// Order of sums: in a lane by steps and segments, then over the lanes by halves. It depends on the number of columns
// alone, so a row's result does not depend on its company, on the grid or on whether all columns fit in shared memory.
//
// Activations are normalised and quantised by every block on its own where they are few: that costs a block one pass
// over x in the second cache, less than another launch. More are prepared once by a small kernel and copied. Where the
// columns of all rows do not fit, blocks walk over chunks of columns in step.
#include <algorithm>

#include "quant_matvec.h"
#include "quant_planes.cuh"
#include "quantised_rows.cuh"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kMaxParts = 8;
constexpr int kBlocksPerProcessor = 2;
constexpr int64_t kPreparedFrom = 8192;               // activations: from here on they are prepared once
constexpr int64_t kResidentBytes = 95 << 10;          // of shared memory for all columns; above, chunks of
constexpr int64_t kChunkBytes = 48 << 10;             // this, so that two blocks share a multiprocessor
constexpr int kCodesStep = 2048, kNumbersStep = 512;  // columns of a chunk: multiples of 32 of the largest units

// How activations are handed to the weights.
enum class Form { kCodes, kNumbers, kRounded };

// Two weight rows at a time: of `a` and `b` the same one (a gate and its up), or 2 i and 2 i + 1 of one matrix.
struct Part {
  WeightPlanes a, b;
  float scale_a, scale_b;
  int type, rows, pairs, column;
};

struct Call {
  Part parts[kMaxParts];
  int num_parts, pairs;
  bool gated, add, resident;
  Form form;
  int rows, places, cols, chunk;  // activations, and those there is place for; columns in shared memory at a time
  int64_t width;                  // of out
  const float *x, *norm_weight;
  float norm_eps;
  const unsigned char* prepared;  // null: from x
  float* out;
};

// -- Where activations lie, in shared memory and prepared: `places` rows (1, 4 or 8) side by side, so that a kernel
// finds those of one column at fixed distances. As codes: 16-byte pieces [cols / 16][places] of int8, then scales [cols
// / 32] [places] and totals [cols / 16][places], which are the scale times the sum of 16 codes. As numbers: pieces
// [cols / 4] [places] of float32. Rows that are not there are 0, and so are numbers behind the last column.
//
// Pieces are permuted so that eight neighbouring units of any type read eight different groups of four banks at once:
// columns among eight of them, rows among themselves.

__host__ __device__ __forceinline__ int padded(Form form, int cols) {
  return form == Form::kCodes ? (cols + 127) / 128 * 128 : (cols + 31) / 32 * 32;
}
__device__ __forceinline__ int swizzled(int piece) {
  const int eight = piece >> 3 & 3;
  return piece ^ ((eight & 1) * 7 ^ (eight & 2));
}
// In pieces; `column` is swizzled().
__device__ __forceinline__ int place_of(int column, int row, int places) {
  return column * places + (row ^ (places == 8 ? column & 7 : places == 4 ? column >> 1 & 3 : 0));
}
__host__ __device__ __forceinline__ int64_t scales_offset(int64_t columns, int places) { return columns * places; }
__host__ __device__ __forceinline__ int64_t totals_offset(int64_t columns, int places) {
  return columns * places / 8 * 9;
}
__host__ __device__ __forceinline__ int64_t activation_bytes(Form form, int64_t columns, int places) {
  return form == Form::kCodes ? columns * places / 8 * 11 : columns * places * 4;
}

struct Activations {
  Shared<uint32_t> codes;
  Shared<float> scales, totals, numbers;
};

// -- Preparing them

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// 1 / sqrt(mean(x^2) + eps) of a row, in every thread of the block. `scratch` [kWarps].
__device__ __forceinline__ float inverse_rms(const float* x, int cols, float eps, const Shared<float>& scratch) {
  float sum = 0.0f;
  if (cols % 4 == 0) {
    for (int i = int(threadIdx.x) * 4; i < cols; i += kThreads * 4) {
      const auto four = load_global<Vector<float, 4>>(x + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += multiply_rounded(four[j], four[j]);
    }
  } else {
    for (int i = int(threadIdx.x); i < cols; i += kThreads) sum += multiply_rounded(x[i], x[i]);
  }
  sync_threads();  // scratch may still be read for the row before
  sum = block_sum<kWarps>(sum, scratch);
  return 1.0f / sqrtf(sum / float(cols) + eps);
}

// Four values of a row; 0 behind its end, and of rows that are not there.
__device__ __forceinline__ Vector<float, 4> normalised(const Call& call, int row, int column, float factor) {
  Vector<float, 4> four = {};
  if (row >= call.rows || column >= call.cols) return four;
  const float* const x = call.x + int64_t(row) * call.cols + column;
  if (call.cols % 4 == 0) {
    four = load_global<Vector<float, 4>>(x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = column + j < call.cols ? x[j] : 0.0f;
  }
  if (call.norm_weight) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (column + j < call.cols) four[j] = call.norm_weight[column + j] * (four[j] * factor);
  }
  return four;
}

// All columns of row `row` from x through `store_codes(column, QuantisedFour)` or `store_numbers(column, four)`, by the
// whole block, no lane of which is missing.
template <class StoreCodes, class StoreNumbers>
__device__ __forceinline__ void prepare_row(const Call& call, int row, const Shared<float>& scratch,
                                            StoreCodes store_codes, StoreNumbers store_numbers) {
  float factor = 1.0f;
  if (call.norm_weight && row < call.rows)
    factor = inverse_rms(call.x + int64_t(row) * call.cols, call.cols, call.norm_eps, scratch);
  const int end = padded(call.form, call.cols);
  for (int first = 0; first < end; first += kThreads * 4) {
    const int column = first + int(threadIdx.x) * 4;
    Vector<float, 4> four = normalised(call, row, column, factor);
    if (call.form == Form::kCodes) {
      const QuantisedFour codes = quantised(four);
      if (column < end) store_codes(column, codes);
    } else if (column < end) {
      if (call.form == Form::kRounded) {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = float_from_bfloat16(bfloat16_from_float(four[j]));
      }
      store_numbers(column, four);
    }
  }
}

// One block a row.
__global__ void __launch_bounds__(kThreads) prepare_activations(__grid_constant__ const Call call, unsigned char* out) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kWarps);
  const int row = int(blockIdx.x), places = call.places;
  const int64_t columns = padded(call.form, call.cols);
  float* const scales = reinterpret_cast<float*>(out + scales_offset(columns, places));
  float* const totals = reinterpret_cast<float*>(out + totals_offset(columns, places));
  prepare_row(
      call, row, scratch,
      [&](int column, const QuantisedFour& four) {
        const int64_t place = place_of(swizzled(column / 16), row, places);
        reinterpret_cast<uint32_t*>(out)[place * 4 + column / 4 % 4] = four.codes;
        if (column % 32 == 0) scales[column / 32 * places + row] = four.scale;
        if (column % 16 == 0) totals[column / 16 * places + row] = four.total;
      },
      [&](int column, const Vector<float, 4>& four) {
        const int64_t place = place_of(swizzled(column / 4), row, places);
        store_global(reinterpret_cast<float*>(out) + place * 4, four);
      });
}

template <class T>
__device__ __forceinline__ void copy_bytes(const Shared<T>& to, const unsigned char* from, int bytes) {
  for (int i = int(threadIdx.x) * 16; i < bytes; i += kThreads * 16)
    copy_async<Words>(to, i / int(sizeof(T)), from + i);
}

// Columns [first, first + chunk) of prepared activations into shared memory, by the whole block.
template <int kRows>
__device__ __forceinline__ void copy_activations(const Call& call, const Activations& x, int first) {
  const int64_t all = padded(call.form, call.cols), at = int64_t(first) * kRows;
  const int columns = smaller(call.chunk, int(all) - first);
  if (call.form == Form::kCodes) {
    copy_bytes(x.codes, call.prepared + at, columns * kRows);
    copy_bytes(x.scales, call.prepared + scales_offset(all, kRows) + at / 8, columns * kRows / 8);
    copy_bytes(x.totals, call.prepared + totals_offset(all, kRows) + at / 4, columns * kRows / 4);
  } else {
    copy_bytes(x.numbers, call.prepared + at * 4, columns * kRows * 4);
  }
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
}

// All columns, from x.
template <int kRows>
__device__ __forceinline__ void load_activations(const Call& call, const Activations& x, const Shared<float>& scratch) {
#pragma unroll 1
  for (int row = 0; row < kRows; ++row)
    prepare_row(
        call, row, scratch,
        [&](int column, const QuantisedFour& four) {
          x.codes[place_of(swizzled(column / 16), row, kRows) * 4 + column / 4 % 4] = four.codes;
          if (column % 32 == 0) x.scales[column / 32 * kRows + row] = four.scale;
          if (column % 16 == 0) x.totals[column / 16 * kRows + row] = four.total;
        },
        [&](int column, const Vector<float, 4>& four) {
          store_shared(x.numbers, place_of(swizzled(column / 4), row, kRows) * 4, four);
        });
  sync_threads();
}

// -- Products of one unit of weights with kRows activations, added to `sums`. Units are counted from the row's
// beginning to decode them and from the chunk's to find the activations.

__device__ __forceinline__ int dot(const Words& a, const Words& b, int sum) {
#pragma unroll
  for (int j = 0; j < 4; ++j) sum = dp4a(int(a[j]), int(b[j]), sum);
  return sum;
}

// One number of every row.
template <int kRows>
__device__ __forceinline__ void load_rows(const Shared<float>& from, int index, float (&out)[kRows]) {
  if constexpr (kRows == 1) {
    out[0] = from[index];
  } else {
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const auto four = load_shared<Vector<float, 4>>(from, index * kRows + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = four[j];
    }
  }
}

// kCount weight rows at once; sums [weight row][activation row].
template <int kRows, int kCount>
__device__ __forceinline__ void add_segments(const Activations& x, int place, const Segment (&segments)[kCount],
                                             bool minimums, float (&sums)[kCount * kRows]) {
  const int piece = swizzled(place);
  float scales[kRows], totals[kRows];
  load_rows<kRows>(x.scales, place / 2, scales);
  if (minimums) load_rows<kRows>(x.totals, place, totals);
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    const auto codes = load_shared<Words>(x.codes, place_of(piece, t, kRows) * 4);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float& sum = sums[r * kRows + t];
      sum = multiply_add(float(dot(segments[r].codes, codes, 0)) * segments[r].scale, scales[t], sum);
      if (minimums) sum = multiply_add(-segments[r].minimum, totals[t], sum);
    }
  }
}

// The same of both halves of 32 columns, whose scale and minimum are one.
template <int kRows, int kCount>
__device__ __forceinline__ void add_groups(const Activations& x, int group, const Segment (&segments)[kCount][2],
                                           bool minimums, float (&sums)[kCount * kRows]) {
  const int front = swizzled(2 * group), back = swizzled(2 * group + 1);
  float scales[kRows], first[kRows], second[kRows];
  load_rows<kRows>(x.scales, group, scales);
  if (minimums) load_rows<kRows>(x.totals, 2 * group, first), load_rows<kRows>(x.totals, 2 * group + 1, second);
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    const auto front_codes = load_shared<Words>(x.codes, place_of(front, t, kRows) * 4);
    const auto back_codes = load_shared<Words>(x.codes, place_of(back, t, kRows) * 4);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float& sum = sums[r * kRows + t];
      const int products = dot(segments[r][1].codes, back_codes, dot(segments[r][0].codes, front_codes, 0));
      sum = multiply_add(float(products) * segments[r][0].scale, scales[t], sum);
      if (minimums) sum = multiply_add(-segments[r][0].minimum, first[t] + second[t], sum);
    }
  }
}

template <int kRows, class U>
__device__ __forceinline__ void add_codes(const Activations& x, const typename U::Raw (&raw)[2], int unit,
                                          int unit_in_chunk, float (&sums)[2 * kRows]) {
  if constexpr (U::kGroup) {
    const Segment segments[2][2] = {{U::decode(raw[0], unit, 0), U::decode(raw[0], unit, 1)},
                                    {U::decode(raw[1], unit, 0), U::decode(raw[1], unit, 1)}};
    add_groups<kRows, 2>(x, unit_in_chunk, segments, U::kMinimum, sums);
  } else {
#pragma unroll
    for (int s = 0; s < U::kSegments; ++s) {
      const Segment segments[2] = {U::decode(raw[0], unit, s), U::decode(raw[1], unit, s)};
      add_segments<kRows, 2>(x, U::segment(unit_in_chunk, s), segments, U::kMinimum, sums);
    }
  }
}

template <int kRows, class U>
__device__ __forceinline__ void add_numbers(const Activations& x, const Words (&raw)[2], int unit_in_chunk,
                                            float (&sums)[2 * kRows]) {
#pragma unroll
  for (int four = 0; four < U::kValues / 4; ++four) {
    const int piece = swizzled(unit_in_chunk * (U::kValues / 4) + four);
    float weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[0][i] = U::value(raw[0], 4 * four + i), weights[1][i] = U::value(raw[1], 4 * four + i);
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      const auto numbers = load_shared<Vector<float, 4>>(x.numbers, place_of(piece, t, kRows) * 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r * kRows + t] = multiply_add(weights[r][i], numbers[i], sums[r * kRows + t]);
      }
    }
  }
}

// The sums of kCount values over the warp, in as few exchanges as they are halved in: lane l gets that of value
// l / (32 / kCount).
template <int kCount>
__device__ __forceinline__ float sums_over_lanes(const float (&values)[kCount], int mask = kWarpSize / 2) {
  if constexpr (kCount == 1) {
    float sum = values[0];
    for (; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  } else {
    const bool upper = lane_index() & mask;
    float half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float kept = upper ? values[i + kCount / 2] : values[i];
      half[i] = kept + shuffle_xor(upper ? values[i] : values[i + kCount / 2], mask);
    }
    return sums_over_lanes<kCount / 2>(half, mask / 2);
  }
}

// Writes the products of a pair of weight rows: `value` is a lane's sum, of the second row in the warp's upper half, of
// activation t in the t-th part of each half. All lanes call it.
template <int kRows>
__device__ __forceinline__ void write_pair(const Call& call, const Part& part, int pair, float value) {
  constexpr int kLanesEach = kWarpSize / (2 * kRows);
  const int lane = lane_index(), second = lane / (kWarpSize / 2), t = lane / kLanesEach % kRows;
  value *= second ? part.scale_b : part.scale_a;
  if (call.gated) {
    const float up = shuffle_xor(value, kWarpSize / 2);
    value = value / (1.0f + expf(-value)) * up;
  }
  const int row = call.gated ? pair : 2 * pair + second;
  if (lane % kLanesEach || t >= call.rows || row >= part.rows || (call.gated && second)) return;
  float* const at = call.out + t * call.width + part.column + row;
  *at = call.add ? *at + value : value;
}

// Rows of a pair: of one matrix the last may be missing, then it is taken for the first.
__device__ __forceinline__ int row_of(const Call& call, const Part& part, int pair, int second) {
  return call.gated ? pair : smaller(2 * pair + second, part.rows - 1);
}

// How far the pairs of a part take this warp: `first`, then every `stride`-th. Where activations come chunk by chunk
// all warps take as many steps, some of them for nothing.
struct Share {
  int first, stride, count;
};
__device__ __forceinline__ Share share_of(const Call& call, const Part& part, int first, int stride) {
  const int mine = first < part.pairs ? (part.pairs - first + stride - 1) / stride : 0;
  return {first, stride, call.resident ? mine : (part.pairs + stride - 1) / stride};
}

// A type's units: what they are, how many of a pair are loaded ahead, and the columns of one.
template <int kRows, QuantType kType>
struct CodesWalker {
  using U = Unit<kType>;
  using Raw = typename U::Raw;
  // So many that nothing spills: eight rows' sums and products leave less room.
  static constexpr int kDepth = kRows == 1 && sizeof(Raw) <= 24 ? 4 : kRows == 8 && sizeof(Raw) > 32 ? 1 : 2;
  static constexpr int kColumns = 16 * U::kSegments;
  __device__ __forceinline__ static void add(const Activations& x, const Raw (&raw)[2], int unit, int unit_in_chunk,
                                             float (&sums)[2 * kRows]) {
    add_codes<kRows, U>(x, raw, unit, unit_in_chunk, sums);
  }
};
template <int kRows, QuantType kType>
struct NumbersWalker {
  using U = NumberUnit<kType>;
  using Raw = Words;
  static constexpr int kDepth = kRows == 1 ? 4 : 2, kColumns = U::kValues;
  __device__ __forceinline__ static void add(const Activations& x, const Raw (&raw)[2], int, int unit_in_chunk,
                                             float (&sums)[2 * kRows]) {
    add_numbers<kRows, U>(x, raw, unit_in_chunk, sums);
  }
};

template <int kRows, class W>
__device__ __forceinline__ void walk_units(const Call& call, const Part& part, const Activations& x, int first,
                                           int stride) {
  constexpr int kDepth = W::kDepth;
  const int lane = lane_index();
  const int units = (call.cols + W::kColumns - 1) / W::kColumns, steps = (units + kWarpSize - 1) / kWarpSize;
  const Share share = share_of(call, part, first, stride);
  // Steps for which the activations are there: all of all pairs, or a chunk's of one pair.
  const int total = share.count * steps;
  const int chunk_steps = call.resident ? total : call.chunk / (W::kColumns * kWarpSize);

  float sums[2 * kRows] = {};
  int pair = first, step = 0;
#pragma unroll 1
  for (int done = 0; done < total;) {
    const int chunk_first = call.resident ? 0 : step;
    const int end = call.resident ? total : done + smaller(chunk_steps, steps - step);
    typename W::Raw raw[kDepth][2];
    int loading_pair = pair, loading_step = step;
    const auto load = [&](typename W::Raw(&into)[2]) {
      const int clamped = smaller(loading_pair, part.pairs - 1);
      const int unit = smaller(loading_step * kWarpSize + lane, units - 1);
      into[0] = W::U::load(part.a, row_of(call, part, clamped, 0), unit);
      into[1] = W::U::load(part.b, row_of(call, part, clamped, 1), unit);
      if (++loading_step == steps) loading_step = 0, loading_pair += stride;
    };
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
      if (done + d < end) load(raw[d]);
    if (!call.resident) {
      sync_threads();  // the chunk before has been read
      copy_activations<kRows>(call, x, chunk_first / chunk_steps * call.chunk);
    }
#pragma unroll 1
    while (done < end) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (done == end) break;
        const int unit = step * kWarpSize + lane;
        if (unit < units) W::add(x, raw[d], unit, (step - chunk_first) * kWarpSize + lane, sums);
        if (done + kDepth < end) load(raw[d]);
        ++done;
        if (++step == steps) {
          const float value = sums_over_lanes<2 * kRows>(sums);
          if (pair < part.pairs) write_pair<kRows>(call, part, pair, value);
#pragma unroll
          for (int i = 0; i < 2 * kRows; ++i) sums[i] = 0.0f;
          step = 0, pair += stride;
        }
      }
    }
  }
}

// 32 values of a type that few models use: one way for all of them, which is slower.
__device__ __forceinline__ Group load_any_group(int type, const WeightPlanes& w, int64_t row, int group) {
  switch (QuantType(type)) {
#define HELEXA_LOAD(name) \
  case QuantType::name:   \
    return load_group<QuantType::name>(w, row, group);
    HELEXA_LOAD(Q4_1)
    HELEXA_LOAD(Q5_1)
    HELEXA_LOAD(Q1_0)
    HELEXA_LOAD(Q2_K)
    HELEXA_LOAD(TQ1_0)
    HELEXA_LOAD(TQ2_0)
    HELEXA_LOAD(IQ3_S)
    HELEXA_LOAD(IQ3_XXS)
    HELEXA_LOAD(IQ2_S)
    HELEXA_LOAD(IQ2_XS)
    HELEXA_LOAD(IQ2_XXS)
    HELEXA_LOAD(IQ1_S)
#undef HELEXA_LOAD
    default:
      return load_group<QuantType::IQ1_M>(w, row, group);
  }
}

template <int kRows>
__device__ __forceinline__ void walk_groups(const Call& call, const Part& part, const Activations& x, int first,
                                            int stride) {
  const int lane = lane_index(), groups = call.cols / 32, steps = (groups + kWarpSize - 1) / kWarpSize;
  const int chunk_steps = call.resident ? steps : call.chunk / (32 * kWarpSize);
  const Share share = share_of(call, part, first, stride);
#pragma unroll 1
  for (int i = 0; i < share.count; ++i) {
    const int pair = first + i * stride, clamped = smaller(pair, part.pairs - 1);
    float value = 0.0f;
#pragma unroll 1
    for (int second = 0; second < 2; ++second) {
      const WeightPlanes& planes = second ? part.b : part.a;
      float sums[kRows] = {};
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        if (step % chunk_steps == 0 && !call.resident) {
          sync_threads();
          copy_activations<kRows>(call, x, step / chunk_steps * call.chunk);
        }
        const int group = step * kWarpSize + lane;
        if (group >= groups) continue;
        const Group loaded = load_any_group(part.type, planes, row_of(call, part, clamped, second), group);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const Segment segments[1] = {loaded.half[s]};
          add_segments<kRows, 1>(x, 2 * (step % chunk_steps * kWarpSize + lane) + s, segments, true, sums);
        }
      }
      // In the order of sums_over_lanes, each half of the warp having all of it.
      float both[2 * kRows];
#pragma unroll
      for (int t = 0; t < kRows; ++t) both[t] = both[kRows + t] = sums[t];
      const float sum = sums_over_lanes<2 * kRows>(both);
      if (second == lane / (kWarpSize / 2)) value = sum;
    }
    if (pair < part.pairs) write_pair<kRows>(call, part, pair, value);
  }
}

// Asks for the beginning of the rows that this warp begins with: weights depend on nothing, so they come while the
// activations are prepared.
__device__ __forceinline__ void prefetch_rows(const Call& call, int first) {
  const int offset = lane_index() * 128;
#pragma unroll 1
  for (int p = 0; p < call.num_parts; ++p) {
    const Part& part = call.parts[p];
    if (first < part.pairs) {
#pragma unroll
      for (int plane = 0; plane < kMaxPlanes; ++plane) {
        const int64_t pitch = part.a.pitch[plane];
        if (offset >= pitch) continue;
        prefetch_global(part.a.plane[plane] + row_of(call, part, first, 0) * pitch + offset);
        prefetch_global(part.b.plane[plane] + row_of(call, part, first, 1) * pitch + offset);
      }
      return;
    }
    first -= part.pairs;
  }
}

// What a launch is of: parts of one type, or of any types that have no kernel of their own. (One kernel for several
// types would take the registers of all of them.)
template <QuantType kType>
struct OfType {
  static constexpr bool kNumbers = kIsNumber<kType>, kHasFour = true;
  template <int kRows>
  __device__ __forceinline__ static void walk(const Call& call, const Part& part, const Activations& x, int first,
                                              int stride) {
    using W = std::conditional_t<kNumbers, NumbersWalker<kRows, kType>, CodesWalker<kRows, kType>>;
    walk_units<kRows, W>(call, part, x, first, stride);
  }
};
struct OfOthers {
  static constexpr bool kNumbers = false, kHasFour = false;
  template <int kRows>
  __device__ __forceinline__ static void walk(const Call& call, const Part& part, const Activations& x, int first,
                                              int stride) {
    walk_groups<kRows>(call, part, x, first, stride);
  }
};

template <int kRows, class Of>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) matvec(__grid_constant__ const Call call) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kWarps);
  Activations x;
  if constexpr (Of::kNumbers) {
    x.numbers = arena.take<float>(call.chunk * kRows);
  } else {
    x.codes = arena.take<uint32_t>(call.chunk / 4 * kRows);
    x.scales = arena.take<float>(call.chunk / 32 * kRows);
    x.totals = arena.take<float>(call.chunk / 16 * kRows);
  }
  // Neighbouring pairs go to different multiprocessors, so that what is left over is spread.
  const int stride = int(gridDim.x) * kWarps;
  int first = warp_index() * int(gridDim.x) + int(blockIdx.x);
  prefetch_rows(call, first);
  if (!call.prepared)
    load_activations<kRows>(call, x, scratch);
  else if (call.resident)
    copy_activations<kRows>(call, x, 0);
#pragma unroll 1
  for (int p = 0; p < call.num_parts; ++p) {
    const Part& part = call.parts[p];
    Of::template walk<kRows>(call, part, x, first, stride);
    // The next part's pairs are counted on from here.
    first = (first - part.pairs % stride + stride) % stride;
  }
}

// -- The launcher

constexpr const char* kName = "quant_matvec";

// Types that have kernels of their own.
template <class Visit>
void visit_kernel(QuantType type, const Visit& visit) {
  switch (type) {
#define HELEXA_KERNEL(name) \
  case QuantType::name:     \
    return visit(OfType<QuantType::name>());
    HELEXA_KERNEL(F32)
    HELEXA_KERNEL(F16)
    HELEXA_KERNEL(BF16)
    HELEXA_KERNEL(I8)
    HELEXA_KERNEL(Q8_0)
    HELEXA_KERNEL(Q4_0)
    HELEXA_KERNEL(Q5_0)
    HELEXA_KERNEL(Q3_K)
    HELEXA_KERNEL(Q4_K)
    HELEXA_KERNEL(Q5_K)
    HELEXA_KERNEL(Q6_K)
    HELEXA_KERNEL(IQ4_NL)
    HELEXA_KERNEL(IQ4_XS)
    HELEXA_KERNEL(MXFP4)
    HELEXA_KERNEL(NVFP4)
#undef HELEXA_KERNEL
    default:
      return visit(OfOthers());
  }
}

// Parts of equal keys go into one launch.
int launch_key(QuantType type) {
  int key = -1;
  visit_kernel(type, [&](auto of) {
    if constexpr (!std::is_same_v<decltype(of), OfOthers>) key = int(type);
  });
  return key;
}

Form form_of(QuantType type, bool exact) {
  Form form = Form::kCodes;
  visit_kernel(type, [&](auto of) {
    if (decltype(of)::kNumbers) form = type == QuantType::BF16 && !exact ? Form::kRounded : Form::kNumbers;
  });
  return form;
}

// Rows that a kernel has place for.
template <class Of>
int places_for(int rows) {
  return rows == 1 ? 1 : rows <= 4 && Of::kHasFour ? 4 : kMatvecRows;
}

void launch_call(Call& call, QuantType type, void* workspace, Stream stream) {
  visit_kernel(type, [&](auto of) { call.places = places_for<decltype(of)>(call.rows); });
  const int columns = padded(call.form, call.cols), step = call.form == Form::kCodes ? kCodesStep : kNumbersStep;
  call.resident = activation_bytes(call.form, columns, call.places) <= kResidentBytes;
  call.chunk = call.resident ? columns : int(kChunkBytes / activation_bytes(call.form, step, call.places)) * step;
  call.prepared = nullptr;
  if (int64_t(call.rows) * call.cols > kPreparedFrom) {
    if (!workspace) fail(kName, "workspace", "the address of quant_matvec_workspace() bytes", "0");
    launch<prepare_activations>(kName, dim3(unsigned(call.places)), kThreads, kWarps * sizeof(float), stream, call,
                                static_cast<unsigned char*>(workspace));
    call.prepared = static_cast<const unsigned char*>(workspace);
  }
  const int processors = multiprocessor_count();
  const int full = std::clamp((call.pairs + kWarps * processors - 1) / (kWarps * processors), 1, kBlocksPerProcessor);
  const dim3 grid(unsigned(std::min(call.pairs, full * processors)));
  const size_t shared_bytes = kWarps * sizeof(float) + size_t(activation_bytes(call.form, call.chunk, call.places));
  visit_kernel(type, [&](auto of) {
    using Of = decltype(of);
    if (call.places == 1) return launch<matvec<1, Of>>(kName, grid, kThreads, shared_bytes, stream, call);
    if constexpr (Of::kHasFour)
      if (call.places == 4) return launch<matvec<4, Of>>(kName, grid, kThreads, shared_bytes, stream, call);
    launch<matvec<8, Of>>(kName, grid, kThreads, shared_bytes, stream, call);
  });
}

void check_call(const QuantMatvec& call) {
  check(!call.parts.empty(), kName, "parts", "at least one matrix", 0);
  check(call.rows >= 0 && call.rows <= kMatvecRows, kName, "rows", "0 to 8", call.rows);
  check(call.cols < (int64_t(1) << 24), kName, "cols", "less than 2^24", call.cols);
  for (const PlanarPart& part : call.parts) {
    check_planes(kName, part.quant_type, part.rows, call.cols);
    check(part.rows < (int64_t(1) << 30), kName, "parts", "less than 2^30 rows", part.rows);
  }
  if (call.cols % 4 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16)
    fail(kName, "x", "an address that is a multiple of 16", std::to_string(reinterpret_cast<uintptr_t>(call.x)));
  if (!call.silu_mul) return;
  if (call.add) fail(kName, "add", "false with silu_mul", "true");
  check(call.parts.size() % 2 == 0, kName, "parts", "gates and as many ups for silu_mul", int64_t(call.parts.size()));
  const size_t half = call.parts.size() / 2;
  for (size_t p = 0; p < half; ++p) {
    const PlanarPart &gate = call.parts[p], &up = call.parts[p + half];
    if (gate.rows != up.rows)
      fail(kName, "parts", "each up as tall as its gate, " + std::to_string(gate.rows), std::to_string(up.rows));
    if (gate.quant_type != up.quant_type)
      fail(kName, "parts", "each up of its gate's type, " + std::to_string(gate.quant_type),
           std::to_string(up.quant_type));
  }
}

}  // namespace

size_t quant_matvec_workspace(int64_t rows, int64_t cols) {
  if (rows * cols <= kPreparedFrom) return 0;
  return size_t(activation_bytes(Form::kNumbers, padded(Form::kCodes, int(cols)), rows == 1 ? 1 : kMatvecRows));
}

void quant_matvec(const QuantMatvec& given, Stream stream) {
  check_call(given);
  if (given.rows == 0) return;
  const size_t count = given.silu_mul ? given.parts.size() / 2 : given.parts.size();
  Call call = {};
  call.gated = given.silu_mul, call.add = given.add, call.rows = int(given.rows), call.cols = int(given.cols);
  call.x = given.x, call.norm_weight = given.norm_weight, call.norm_eps = given.norm_eps, call.out = given.out;
  for (size_t p = 0; p < count; ++p) call.width += given.parts[p].rows;
  // Parts of one kernel go together, as many as a launch takes.
  std::vector<bool> done(count);
  for (size_t begin = 0; begin < count; ++begin) {
    if (done[begin]) continue;
    const auto first = static_cast<QuantType>(given.parts[begin].quant_type);
    call.form = form_of(first, given.exact);
    call.num_parts = call.pairs = 0;
    int64_t column = 0;
    for (size_t p = 0; p < count; column += given.parts[p].rows, ++p) {
      const PlanarPart &a = given.parts[p], &b = given.parts[given.silu_mul ? p + count : p];
      const auto type = static_cast<QuantType>(a.quant_type);
      if (done[p] || call.num_parts == kMaxParts || launch_key(type) != launch_key(first)) continue;
      done[p] = true;
      if (a.rows == 0) continue;
      Part& part = call.parts[call.num_parts++];
      part.a = weight_planes(type, a.planes, a.rows, given.cols);
      part.b = weight_planes(type, b.planes, b.rows, given.cols);
      part.scale_a = a.scale, part.scale_b = b.scale;
      part.type = a.quant_type, part.rows = int(a.rows), part.column = int(column);
      part.pairs = int(given.silu_mul ? a.rows : (a.rows + 1) / 2);
      call.pairs += part.pairs;
    }
    if (call.num_parts > 0) launch_call(call, first, given.workspace, stream);
  }
}

}  // namespace helexa::cuda
