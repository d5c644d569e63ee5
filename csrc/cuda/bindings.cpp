#include "bindings.h"

#include <pybind11/stl.h>

#include <tuple>

#include "../check.h"
#include "causal_conv1d.h"
#include "cuda_error.h"
#include "gated_delta_rule.h"
#include "moe_grouped.h"
#include "moe_matmul.h"
#include "moe_router.h"
#include "paged_attention.h"
#include "sample.h"
#ifndef HELEXA_SIMT
#include "devices.h"
#endif
#include "quant_embedding.h"
#include "quant_matmul.h"
#include "quant_matvec.h"
#include "repack.h"
#include "rms_norm.h"

namespace py = pybind11;

namespace helexa::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address, const char* function, const char* argument) {
  check_pointer(address, function, argument);
  return reinterpret_cast<T*>(address);
}

// Of an argument that may be left out.
template <class T>
T* optional(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// ExpertStack as a tuple: number of the type, addresses of the planes and of the scales, rows, cols.
using StackTuple = std::tuple<int, uintptr_t, uintptr_t, int64_t, int64_t>;
using StacksTuple = std::tuple<StackTuple, StackTuple, StackTuple>;  // gate, up, down

ExpertStack expert_stack(const StackTuple& stack) {
  const auto [type, planes, scales, rows, cols] = stack;
  return {type, optional<const void>(planes), rows, cols, optional<const float>(scales)};
}
ExpertStacks expert_stacks(const StacksTuple& stacks) {
  return {expert_stack(std::get<0>(stacks)), expert_stack(std::get<1>(stacks)), expert_stack(std::get<2>(stacks))};
}

// CudaError in Python: a RuntimeError with the attribute `code`. Each of the two modules has one of its own.
void bind_error(py::module_& module) {
  static PyObject* type = py::exception<CudaError>(module, "CudaError", PyExc_RuntimeError).release().ptr();
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const CudaError& error) {
      py::object raised = py::reinterpret_borrow<py::object>(type)(error.what());
      raised.attr("code") = error.code();
      PyErr_SetObject(type, raised.ptr());
    }
  });
}

#ifndef HELEXA_SIMT
// What helexa_engine/runtime/cuda_device.py judges by.
void bind_facts(py::module_& module) {
  module.attr("architectures") = HELEXA_CUDA_ARCHITECTURES;  // "80 86 89 90a 120"
  module.def("driver_version", &driver_version, "The newest CUDA of the driver, 13000 for 13.0; 0 without a driver.");
  module.def("runtime_version", &runtime_version, "The CUDA that this module was built with.");
  module.def(
      "devices",
      [] {
        py::list found;
        for (const Device& device : devices())
          found.append(py::make_tuple(device.name, device.major, device.minor, device.memory_bytes));
        return found;
      },
      "(name, major, minor, memory in bytes) of each device that this process may use. Makes no context.");
}
#endif

}  // namespace

// Every function takes addresses of device memory and a CUDA stream (0: the default one), and returns when its kernels
// are queued.
void bind(py::module_& module) {
  bind_error(module);
#ifndef HELEXA_SIMT
  bind_facts(module);
#endif
  module.def(
      "moe_router",
      [](uintptr_t x, int64_t rows, int64_t cols, uintptr_t norm_weight, float norm_eps, uintptr_t weight,
         int num_experts, bool shared, int top_k, bool norm_topk_prob, uintptr_t ticket, uintptr_t logits,
         uintptr_t normed, uintptr_t normed_bf16, uintptr_t normed_remainder, uintptr_t codes, uintptr_t scales,
         uintptr_t chosen, uintptr_t weights, Stream stream) {
        constexpr const char* f = "moe_router";
        MoeRouter call;
        call.x = pointer<const float>(x, f, "x"), call.rows = rows, call.cols = cols;
        call.norm_weight = optional<const float>(norm_weight), call.norm_eps = norm_eps;
        call.weight = pointer<const float>(weight, f, "weight");
        call.num_experts = num_experts, call.shared = shared;
        call.top_k = top_k, call.norm_topk_prob = norm_topk_prob;
        call.ticket = pointer<uint32_t>(ticket, f, "ticket");
        call.logits = pointer<float>(logits, f, "logits");
        call.normed = pointer<float>(normed, f, "normed");
        call.normed_bf16 = optional<uint16_t>(normed_bf16);
        call.normed_remainder = optional<uint16_t>(normed_remainder);
        call.codes = optional<uint8_t>(codes), call.scales = codes ? pointer<float>(scales, f, "scales") : nullptr;
        call.chosen = pointer<int32_t>(chosen, f, "chosen");
        call.weights = pointer<float>(weights, f, "weights");
        moe_router(call, stream);
      },
      py::arg("x"), py::arg("rows"), py::arg("cols"), py::arg("norm_weight"), py::arg("norm_eps"), py::arg("weight"),
      py::arg("num_experts"), py::arg("shared"), py::arg("top_k"), py::arg("norm_topk_prob"), py::arg("ticket"),
      py::arg("logits"), py::arg("normed"), py::arg("normed_bf16"), py::arg("normed_remainder"), py::arg("codes"),
      py::arg("scales"), py::arg("chosen"), py::arg("weights"), py::arg("stream") = 0,
      "Each row's experts, ascending, and their weights; norm_weight, normed_bf16, normed_remainder and codes may be "
      "0.");
  module.def(
      "moe_group",
      [](uintptr_t chosen, int64_t pairs, int num_experts, int tile_rows, uintptr_t pair, uintptr_t place,
         uintptr_t tiles, uintptr_t num_tiles, Stream stream) {
        constexpr const char* f = "moe_group";
        MoeGroups call;
        call.chosen = pointer<const int32_t>(chosen, f, "chosen");
        call.pairs = pairs, call.num_experts = num_experts, call.tile_rows = tile_rows;
        call.pair = pointer<int32_t>(pair, f, "pair"), call.place = pointer<int32_t>(place, f, "place");
        call.tiles = pointer<MoeTile>(tiles, f, "tiles"), call.num_tiles = pointer<int32_t>(num_tiles, f, "num_tiles");
        moe_group(call, stream);
      },
      py::arg("chosen"), py::arg("pairs"), py::arg("num_experts"), py::arg("tile_rows"), py::arg("pair"),
      py::arg("place"), py::arg("tiles"), py::arg("num_tiles"), py::arg("stream") = 0,
      "Pairs sorted by expert, where each stands, and tiles (expert, first place, rows) of one expert each.");

  module.def("quant_matvec_workspace", &quant_matvec_workspace, py::arg("rows"), py::arg("cols"),
             "Bytes of quant_matvec's workspace; 0 where it needs none.");
  module.def(
      "quant_matvec",
      [](const std::vector<std::tuple<int, uintptr_t, int64_t, float>>& parts, int64_t cols, uintptr_t x, int64_t rows,
         uintptr_t norm_weight, float norm_eps, bool silu_mul, bool add, bool exact, uintptr_t out, uintptr_t workspace,
         Stream stream) {
        constexpr const char* f = "quant_matvec";
        QuantMatvec call;
        for (const auto& [quant_type, planes, part_rows, scale] : parts)
          call.parts.push_back({quant_type, pointer<const void>(planes, f, "parts"), part_rows, scale});
        call.cols = cols, call.x = pointer<const float>(x, f, "x"), call.rows = rows;
        call.norm_weight = optional<const float>(norm_weight), call.norm_eps = norm_eps;
        call.silu_mul = silu_mul, call.add = add, call.exact = exact;
        call.out = pointer<float>(out, f, "out"), call.workspace = optional<void>(workspace);
        quant_matvec(call, stream);
      },
      py::arg("parts"), py::arg("cols"), py::arg("x"), py::arg("rows"), py::arg("norm_weight"), py::arg("norm_eps"),
      py::arg("silu_mul"), py::arg("add"), py::arg("exact"), py::arg("out"), py::arg("workspace"),
      py::arg("stream") = 0,
      "x [rows <= 8, cols] times parts (quant_type, planes, rows, scale) side by side; norm_weight and workspace may "
      "be "
      "0.");

  module.def("planes_bytes", &planes_bytes, py::arg("quant_type"), py::arg("rows"), py::arg("cols"),
             "Bytes of the planes of a matrix.");
  module.def(
      "repack_planes",
      [](int quant_type, uintptr_t source, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
         uintptr_t planes, Stream stream) {
        constexpr const char* f = "repack_planes";
        repack_planes(quant_type, pointer<const void>(source, f, "source"), first_row, num_rows, rows, cols,
                      pointer<void>(planes, f, "planes"), stream);
      },
      py::arg("quant_type"), py::arg("source"), py::arg("first_row"), py::arg("num_rows"), py::arg("rows"),
      py::arg("cols"), py::arg("planes"), py::arg("stream") = 0,
      "Rows [first_row, first_row + num_rows) of a matrix [rows, cols], blocks of a file, into its planes.");
  module.def(
      "unpack_planes",
      [](int quant_type, uintptr_t planes, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
         uintptr_t out, Stream stream) {
        constexpr const char* f = "unpack_planes";
        unpack_planes(quant_type, pointer<const void>(planes, f, "planes"), first_row, num_rows, rows, cols,
                      pointer<void>(out, f, "out"), stream);
      },
      py::arg("quant_type"), py::arg("planes"), py::arg("first_row"), py::arg("num_rows"), py::arg("rows"),
      py::arg("cols"), py::arg("out"), py::arg("stream") = 0, "The inverse.");

  module.def(
      "rms_norm",
      [](uintptr_t x, int64_t rows, int64_t cols, uintptr_t weight, float eps, uintptr_t out, uintptr_t remainder,
         Stream stream) {
        constexpr const char* f = "rms_norm";
        rms_norm({pointer<const float>(x, f, "x"), rows, cols, optional<const float>(weight), eps,
                  pointer<uint16_t>(out, f, "out"), optional<uint16_t>(remainder)},
                 stream);
      },
      py::arg("x"), py::arg("rows"), py::arg("cols"), py::arg("weight"), py::arg("eps"), py::arg("out"),
      py::arg("remainder"), py::arg("stream") = 0,
      "x [rows, cols] float32, normalised unless weight is 0, as bfloat16; remainder: what that leaves, or 0.");
  module.def("quant_matmul_splits", &quant_matmul_splits, py::arg("part_rows"), py::arg("cols"), py::arg("rows"),
             py::arg("silu_mul"), py::arg("multiprocessors"), "Splits of the columns that fill a device.");
  module.def(
      "quant_matmul",
      [](const std::vector<std::tuple<int, uintptr_t, int64_t, float>>& parts, int64_t cols, uintptr_t x,
         uintptr_t remainder, int64_t rows, bool silu_mul, bool exact, bool add, uintptr_t out, int splits,
         uintptr_t partial, Stream stream) {
        constexpr const char* f = "quant_matmul";
        QuantMatmul call;
        for (const auto& [quant_type, planes, part_rows, scale] : parts)
          call.parts.push_back({quant_type, pointer<const void>(planes, f, "parts"), part_rows, scale});
        call.cols = cols, call.x = pointer<const uint16_t>(x, f, "x");
        call.remainder = optional<const uint16_t>(remainder), call.rows = rows;
        call.silu_mul = silu_mul, call.exact = exact, call.add = add, call.out = pointer<float>(out, f, "out");
        call.splits = splits, call.partial = optional<float>(partial);
        quant_matmul(call, stream);
      },
      py::arg("parts"), py::arg("cols"), py::arg("x"), py::arg("remainder"), py::arg("rows"), py::arg("silu_mul"),
      py::arg("exact"), py::arg("add"), py::arg("out"), py::arg("splits"), py::arg("partial"), py::arg("stream") = 0,
      "x [rows, cols] bfloat16 times parts (quant_type, planes, rows, scale) side by side, float32; remainder and "
      "partial [splits, rows, products] may be 0.");
  module.def(
      "dequantize_planes",
      [](int quant_type, uintptr_t planes, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
         uintptr_t out, Stream stream) {
        constexpr const char* f = "dequantize_planes";
        dequantize_planes(quant_type, pointer<const void>(planes, f, "planes"), first_row, num_rows, rows, cols,
                          pointer<uint16_t>(out, f, "out"), stream);
      },
      py::arg("quant_type"), py::arg("planes"), py::arg("first_row"), py::arg("num_rows"), py::arg("rows"),
      py::arg("cols"), py::arg("out"), py::arg("stream") = 0,
      "Rows of a matrix in planes, rounded to bfloat16 [num_rows, cols].");
  module.def(
      "finish_products",
      [](uintptr_t products, int splits, int64_t rows, int64_t width, float first_scale, float second_scale,
         bool silu_mul, bool add, uintptr_t out, int64_t pitch, int64_t column, Stream stream) {
        constexpr const char* f = "finish_products";
        finish_products({pointer<const float>(products, f, "products"), splits, rows, width, first_scale, second_scale,
                         silu_mul, add, pointer<float>(out, f, "out"), pitch, column},
                        stream);
      },
      py::arg("products"), py::arg("splits"), py::arg("rows"), py::arg("width"), py::arg("first_scale"),
      py::arg("second_scale"), py::arg("silu_mul"), py::arg("add"), py::arg("out"), py::arg("pitch"), py::arg("column"),
      py::arg("stream") = 0, "Products [splits, rows, width] summed and scaled; out [rows, pitch] from column on.");
  module.def(
      "quant_embedding",
      [](int quant_type, uintptr_t planes, int64_t rows, int64_t cols, float scale, uintptr_t ids, int64_t n,
         uintptr_t out, Stream stream) {
        constexpr const char* f = "quant_embedding";
        quant_embedding(quant_type, pointer<const void>(planes, f, "planes"), rows, cols, scale,
                        pointer<const int64_t>(ids, f, "ids"), n, pointer<float>(out, f, "out"), stream);
      },
      py::arg("quant_type"), py::arg("planes"), py::arg("rows"), py::arg("cols"), py::arg("scale"), py::arg("ids"),
      py::arg("n"), py::arg("out"), py::arg("stream") = 0,
      "Rows ids [n] int64 of planes, times scale, as float32 [n, cols]; NaN for an id outside of the table.");
  module.def(
      "causal_conv1d",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, int channels, int taps, uintptr_t conv_state,
         uintptr_t state_slots, uintptr_t cu_seqlens, int num_sequences, uintptr_t out, int64_t num_tokens,
         Stream stream) {
        constexpr const char* f = "causal_conv1d";
        CausalConv1d call;
        call.x = pointer<const float>(x, f, "x"), call.x_stride = x_stride;
        call.weight = pointer<const float>(weight, f, "weight");
        call.channels = channels, call.taps = taps;
        call.conv_state = pointer<float>(conv_state, f, "conv_state");
        call.state_slots = pointer<const int32_t>(state_slots, f, "state_slots");
        call.cu_seqlens = pointer<const int32_t>(cu_seqlens, f, "cu_seqlens");
        call.num_sequences = num_sequences;
        call.out = pointer<float>(out, f, "out"), call.num_tokens = num_tokens;
        causal_conv1d(call, stream);
      },
      py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("channels"), py::arg("taps"), py::arg("conv_state"),
      py::arg("state_slots"), py::arg("cu_seqlens"), py::arg("num_sequences"), py::arg("out"), py::arg("num_tokens"),
      py::arg("stream") = 0,
      "Convolution of packed sequences with their states, then SiLU; shapes: ops/causal_conv1d.");
  module.def(
      "gated_delta_rule",
      [](uintptr_t qkv, int64_t qkv_stride, uintptr_t z, int64_t z_stride, uintptr_t b, int64_t b_stride, uintptr_t a,
         int64_t a_stride, uintptr_t a_coefficient, uintptr_t dt_bias, uintptr_t norm_weight, double eps,
         uintptr_t state, uintptr_t state_slots, uintptr_t cu_seqlens, int num_sequences, int num_k_heads,
         int num_v_heads, int head_k_dim, int head_v_dim, bool tiled, uintptr_t out, int chunk, int chunk_from,
         uintptr_t conv_weight, int taps, uintptr_t conv_state, uintptr_t arrivals, Stream stream) {
        constexpr const char* f = "gated_delta_rule";
        GatedDeltaRule call;
        call.qkv = pointer<const float>(qkv, f, "qkv"), call.qkv_stride = qkv_stride;
        call.z = pointer<const float>(z, f, "z"), call.z_stride = z_stride;
        call.b = pointer<const float>(b, f, "b"), call.b_stride = b_stride;
        call.a = pointer<const float>(a, f, "a"), call.a_stride = a_stride;
        call.a_coefficient = pointer<const float>(a_coefficient, f, "a_coefficient");
        call.dt_bias = pointer<const float>(dt_bias, f, "dt_bias");
        call.norm_weight = pointer<const float>(norm_weight, f, "norm_weight");
        call.eps = static_cast<float>(eps);
        call.state = pointer<float>(state, f, "state");
        call.state_slots = pointer<const int32_t>(state_slots, f, "state_slots");
        call.cu_seqlens = pointer<const int32_t>(cu_seqlens, f, "cu_seqlens");
        call.num_sequences = num_sequences;
        call.num_k_heads = num_k_heads, call.num_v_heads = num_v_heads;
        call.head_k_dim = head_k_dim, call.head_v_dim = head_v_dim;
        call.tiled = tiled;
        call.out = pointer<float>(out, f, "out");
        call.chunk = chunk, call.chunk_from = chunk_from;
        call.conv_weight = optional<const float>(conv_weight);
        call.taps = taps;
        call.conv_state = conv_weight ? pointer<float>(conv_state, f, "conv_state") : nullptr;
        call.arrivals = conv_weight ? pointer<int32_t>(arrivals, f, "arrivals") : nullptr;
        gated_delta_rule(call, stream);
      },
      py::arg("qkv"), py::arg("qkv_stride"), py::arg("z"), py::arg("z_stride"), py::arg("b"), py::arg("b_stride"),
      py::arg("a"), py::arg("a_stride"), py::arg("a_coefficient"), py::arg("dt_bias"), py::arg("norm_weight"),
      py::arg("eps"), py::arg("state"), py::arg("state_slots"), py::arg("cu_seqlens"), py::arg("num_sequences"),
      py::arg("num_k_heads"), py::arg("num_v_heads"), py::arg("head_k_dim"), py::arg("head_v_dim"), py::arg("tiled"),
      py::arg("out"), py::arg("chunk") = 0, py::arg("chunk_from") = 0, py::arg("conv_weight") = 0, py::arg("taps") = 0,
      py::arg("conv_state") = 0, py::arg("arrivals") = 0, py::arg("stream") = 0,
      "The delta rule with its norms and gates token by token; shapes: ops/gated_delta_rule. conv_weight not 0: with "
      "the "
      "convolution in front.");

  module.def("sample_scratch_words", &sample_scratch_words, py::arg("rows"), py::arg("cols"), py::arg("logprobs"),
             "Words of eight bytes that sample needs as scratch memory.");
  module.def(
      "sample",
      [](uintptr_t table, int64_t row_bytes, int64_t rows, int64_t cols, uintptr_t logits, uintptr_t raw,
         uintptr_t mask, int64_t mask_words, bool adjusts, int64_t num_top, uintptr_t scratch, uintptr_t out,
         Stream stream) {
        constexpr const char* f = "sample";
        sample(pointer<const void>(table, f, "table"), row_bytes, rows, cols, pointer<float>(logits, f, "logits"),
               pointer<const float>(raw, f, "raw"), reinterpret_cast<const uint32_t*>(mask), mask_words, adjusts,
               num_top, pointer<uint64_t>(scratch, f, "scratch"), pointer<int64_t>(out, f, "out"), stream);
      },
      py::arg("table"), py::arg("row_bytes"), py::arg("rows"), py::arg("cols"), py::arg("logits"), py::arg("raw"),
      py::arg("mask"), py::arg("mask_words"), py::arg("adjusts"), py::arg("num_top"), py::arg("scratch"),
      py::arg("out"), py::arg("stream") = 0, "A token for each row of logits [rows, cols]; see sample.h.");

  module.def(
      "paged_attention_workspace_bytes",
      [](int64_t num_tokens, int64_t num_sequences, int64_t pages_per_sequence, int num_heads, int num_kv_heads,
         int head_dim) {
        PagedAttention args{};
        args.num_tokens = num_tokens, args.num_sequences = num_sequences;
        args.pages_per_sequence = pages_per_sequence;
        args.num_heads = num_heads, args.num_kv_heads = num_kv_heads, args.head_dim = head_dim;
        return paged_attention_workspace_bytes(args);
      },
      py::arg("num_tokens"), py::arg("num_sequences"), py::arg("pages_per_sequence"), py::arg("num_heads"),
      py::arg("num_kv_heads"), py::arg("head_dim"), "Bytes of workspace that paged_attention needs for these shapes.");

  module.def(
      "paged_attention",
      [](uintptr_t qkv, uintptr_t q_norm, uintptr_t k_norm, double eps, uintptr_t cos_sin, int rotary_dim,
         uintptr_t positions, uintptr_t slot_mapping, uintptr_t page_tables, int64_t pages_per_sequence,
         uintptr_t cu_seqlens, uintptr_t seq_lens, int64_t num_sequences, uintptr_t k_cache, uintptr_t v_cache,
         bool quantised, bool gated, int num_heads, int num_kv_heads, int head_dim, float scale, uintptr_t ctx,
         int64_t num_tokens, uintptr_t workspace, Stream stream) {
        constexpr const char* f = "paged_attention";
        PagedAttention args{};
        args.qkv = pointer<const float>(qkv, f, "qkv");
        args.q_norm = pointer<const float>(q_norm, f, "q_norm");
        args.k_norm = pointer<const float>(k_norm, f, "k_norm");
        args.cos_sin = pointer<const float>(cos_sin, f, "cos_sin");
        args.positions = pointer<const int64_t>(positions, f, "positions");
        args.slot_mapping = pointer<const int64_t>(slot_mapping, f, "slot_mapping");
        args.page_tables = pointer<const int32_t>(page_tables, f, "page_tables");
        args.cu_seqlens = pointer<const int32_t>(cu_seqlens, f, "cu_seqlens");
        args.seq_lens = pointer<const int32_t>(seq_lens, f, "seq_lens");
        args.k_cache = pointer<void>(k_cache, f, "k_cache");
        args.v_cache = pointer<void>(v_cache, f, "v_cache");
        args.ctx = pointer<float>(ctx, f, "ctx");
        args.workspace = reinterpret_cast<void*>(workspace);
        args.num_tokens = num_tokens, args.num_sequences = num_sequences;
        args.pages_per_sequence = pages_per_sequence;
        args.num_heads = num_heads, args.num_kv_heads = num_kv_heads, args.head_dim = head_dim;
        args.rotary_dim = rotary_dim, args.gated = gated, args.quantised = quantised;
        args.eps = eps, args.scale = scale;
        paged_attention(args, stream);
      },
      py::arg("qkv"), py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"), py::arg("cos_sin"), py::arg("rotary_dim"),
      py::arg("positions"), py::arg("slot_mapping"), py::arg("page_tables"), py::arg("pages_per_sequence"),
      py::arg("cu_seqlens"), py::arg("seq_lens"), py::arg("num_sequences"), py::arg("k_cache"), py::arg("v_cache"),
      py::arg("quantised"), py::arg("gated"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
      py::arg("scale"), py::arg("ctx"), py::arg("num_tokens"), py::arg("workspace"), py::arg("stream") = 0,
      "See ops/paged_attention/cuda.py; a workspace of 0 bytes may have the address 0.");
  module.def(
      "moe_matmul_few",
      [](uintptr_t x, int64_t rows, int num_experts, int top_k, const StacksTuple& experts, const StacksTuple& shared,
         uintptr_t chosen, uintptr_t weights, uintptr_t normed, uintptr_t codes, uintptr_t scales, uintptr_t hidden,
         uintptr_t hidden_codes, uintptr_t hidden_scales, Stream stream) {
        constexpr const char* f = "moe_matmul_few";
        MoeFew call;
        call.moe.x = pointer<float>(x, f, "x"), call.moe.rows = rows;
        call.moe.num_experts = num_experts, call.moe.top_k = top_k;
        call.moe.routed = expert_stacks(experts), call.moe.shared = expert_stacks(shared);
        call.moe.chosen = pointer<const int32_t>(chosen, f, "chosen");
        call.moe.weights = pointer<const float>(weights, f, "weights");
        call.normed = pointer<const float>(normed, f, "normed");
        call.codes = pointer<const uint8_t>(codes, f, "codes");
        call.scales = pointer<const float>(scales, f, "scales");
        call.hidden = pointer<float>(hidden, f, "hidden");
        call.hidden_codes = pointer<uint8_t>(hidden_codes, f, "hidden_codes");
        call.hidden_scales = pointer<float>(hidden_scales, f, "hidden_scales");
        moe_matmul_few(call, stream);
      },
      py::arg("x"), py::arg("rows"), py::arg("num_experts"), py::arg("top_k"), py::arg("experts"), py::arg("shared"),
      py::arg("chosen"), py::arg("weights"), py::arg("normed"), py::arg("codes"), py::arg("scales"), py::arg("hidden"),
      py::arg("hidden_codes"), py::arg("hidden_scales"), py::arg("stream") = 0,
      "Adds to up to eight rows of x what their experts give; shared's addresses are 0 without a shared expert.");
  module.def(
      "moe_grouped",
      [](const StackTuple& a, const StackTuple& b, int num_experts, uintptr_t x, uintptr_t remainder, uintptr_t pair,
         int top_k, uintptr_t tiles, uintptr_t num_tiles, int64_t most_tiles, int64_t rows, int tile_rows,
         uintptr_t out, uintptr_t out_remainder, Stream stream) {
        constexpr const char* f = "moe_grouped";
        MoeGrouped call;
        call.a = expert_stack(a), call.b = expert_stack(b), call.num_experts = num_experts;
        call.x = pointer<const uint16_t>(x, f, "x"), call.remainder = optional<const uint16_t>(remainder);
        call.pair = optional<const int32_t>(pair), call.top_k = top_k;
        call.tiles = optional<const MoeTile>(tiles);
        call.num_tiles = tiles ? pointer<const int32_t>(num_tiles, f, "num_tiles") : nullptr;
        call.most_tiles = most_tiles, call.rows = rows, call.tile_rows = tile_rows;
        if (call.b.planes)
          call.gated = pointer<uint16_t>(out, f, "out"), call.gated_remainder = optional<uint16_t>(out_remainder);
        else
          call.out = pointer<float>(out, f, "out");
        moe_grouped(call, stream);
      },
      py::arg("a"), py::arg("b"), py::arg("num_experts"), py::arg("x"), py::arg("remainder"), py::arg("pair"),
      py::arg("top_k"), py::arg("tiles"), py::arg("num_tiles"), py::arg("most_tiles"), py::arg("rows"),
      py::arg("tile_rows"), py::arg("out"), py::arg("out_remainder"), py::arg("stream") = 0,
      "Grouped rows times their experts' gate and up, as bfloat16, or (b's addresses 0) down, as float32.");
  module.def(
      "moe_sum",
      [](uintptr_t x, int64_t rows, int64_t hidden, int top_k, uintptr_t weights, uintptr_t place, uintptr_t products,
         uintptr_t shared_products, Stream stream) {
        constexpr const char* f = "moe_sum";
        MoeSum call;
        call.x = pointer<float>(x, f, "x"), call.rows = rows, call.hidden = hidden, call.top_k = top_k;
        call.weights = pointer<const float>(weights, f, "weights");
        call.place = pointer<const int32_t>(place, f, "place");
        call.products = pointer<const float>(products, f, "products");
        call.shared_products = optional<const float>(shared_products);
        moe_sum(call, stream);
      },
      py::arg("x"), py::arg("rows"), py::arg("hidden"), py::arg("top_k"), py::arg("weights"), py::arg("place"),
      py::arg("products"), py::arg("shared_products"), py::arg("stream") = 0,
      "Adds to each row of x its experts' weighted products.");
}

}  // namespace helexa::cuda
