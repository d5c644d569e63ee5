// The whole native surface of helexa_engine._native on one page. The core knows no torch: pointers arrive as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "argmax.h"
#include "causal_conv1d.h"
#include "check.h"
#include "cpu_features.h"
#include "dequantize.h"
#include "gated_delta_rule.h"
#include "moe_matmul.h"
#include "packed_matrix.h"
#include "paged_attention.h"
#include "probes.h"
#include "quant_matmul.h"
#include "quantize.h"
#include "thread_count.h"
#include "thread_pool.h"
#include "weight_memory.h"
#ifdef HELEXA_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace helexa;

namespace {

template <class T>
T* pointer(uintptr_t address, const char* function, const char* argument) {
  check_pointer(address, function, argument);
  return reinterpret_cast<T*>(address);
}

struct ZeroedMemory {
  std::shared_ptr<uint8_t> data;
  size_t nbytes;
};

std::atomic<int64_t> kernel_nanoseconds{0};

class KernelTimer {
 public:
  ~KernelTimer() {
    const auto passed = std::chrono::steady_clock::now() - start_;
    kernel_nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The calls of a step with all their arguments, to be made again as they are.
class Recording {
 public:
  void begin() {
    if (active) fail("Recording", "begin", "no recording under way on this thread", "one");
    calls_.clear();
    active = this;
  }
  void end() {
    if (active == this) active = nullptr;
  }
  void replay() const {
    KernelTimer timer;
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }
  ~Recording() { end(); }

  // Makes a kernel call without the GIL, and keeps it where this thread is recording.
  template <class Call>
  static void launch(Call call) {
    if (active) active->calls_.emplace_back(call);
    py::gil_scoped_release release;
    KernelTimer timer;
    call();
  }

 private:
  static thread_local Recording* active;
  std::vector<std::function<void()>> calls_;
};
thread_local Recording* Recording::active = nullptr;

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "helexa's compiled core";
#ifdef HELEXA_CUDA
  py::module_ cuda_module =
      module.def_submodule("cuda", "The kernels for CUDA devices; absent from a build without nvcc");
  cuda::bind(cuda_module);
#endif

  module.def("num_threads", &num_threads, "Threads that a kernel uses, the calling one among them.");
  module.def("set_num_threads", &set_num_threads, py::arg("n"), "0 restores the default: the physical cores allowed.");
  module.def("pin_threads", &pin_threads, py::arg("pinned"), "Whether each worker stays on a core of its own.");
  module.def(
      "threads_for", &threads_for, py::arg("root"), py::arg("allowed"),
      "The default number of threads where `root` holds /sys and /proc and the processors `allowed` may be used.");

  module.def("cpu_isa", [] { return name(cpu_isa()); }, "The instruction-set level in use.");
  module.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
             "generic, avx2, avx512_vnni or avx512; ValueError where it cannot run.");

  py::class_<Recording>(module, "Recording",
                        "Model calls (matmuls, embedding, attention, convolution, delta rule) that this thread makes "
                        "between begin and end are also kept; replay makes them again with the same addresses. Whoever "
                        "records keeps that memory, and the matrices, alive.")
      .def(py::init<>())
      .def("begin", &Recording::begin, "Forgets what was recorded. ValueError while this thread records already.")
      .def("end", &Recording::end)
      .def("replay", &Recording::replay, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Recording::size);
  module.def(
      "kernel_seconds", [] { return double(kernel_nanoseconds.load()) * 1e-9; },
      "Time that all threads together have spent inside model calls; what else a step takes is the binding's and "
      "Python's.");

  py::class_<ZeroedMemory>(module, "ZeroedMemory", py::buffer_protocol(),
                           "Resident zeros, writable by the buffer protocol.")
      .def(py::init([](size_t nbytes) {
             py::gil_scoped_release release;
             return std::make_unique<ZeroedMemory>(ZeroedMemory{allocate_zeroed(nbytes), nbytes});
           }),
           py::arg("nbytes"))
      .def_buffer([](const ZeroedMemory& m) {
        return py::buffer_info(m.data.get(), 1, py::format_descriptor<uint8_t>::format(), 1, {m.nbytes}, {1});
      });

  py::class_<PackedMatrix>(module, "PackedMatrix", "Weights in the kernels' own order; see csrc/cpu/packed_matrix.h.")
      .def_property_readonly("quant_type", [](const PackedMatrix& m) { return static_cast<int>(m.type()); })
      .def_property_readonly("rows", &PackedMatrix::rows)
      .def_property_readonly("cols", &PackedMatrix::cols)
      .def_property_readonly("stack", &PackedMatrix::stack)
      .def_property_readonly("nbytes", &PackedMatrix::nbytes, "Bytes held, padding of the rows to 16 included.")
      .def(
          "unpack",
          [](const PackedMatrix& m, uintptr_t out) {
            auto* destination = pointer<void>(out, "unpack", "out");
            py::gil_scoped_release release;
            m.unpack(destination);
          },
          py::arg("out"), "Writes the bytes that were packed.");
  module.def(
      "pack",
      [](int quant_type, uintptr_t source, int64_t rows, int64_t cols, int64_t stack, int64_t stack_stride,
         std::vector<float> scales) {
        const auto* bytes = pointer<const void>(source, "pack", "source");
        py::gil_scoped_release release;
        return std::make_unique<PackedMatrix>(quant_type, bytes, rows, cols, stack, stack_stride, false,
                                              std::move(scales));
      },
      py::arg("quant_type"), py::arg("source"), py::arg("rows"), py::arg("cols"), py::arg("stack") = 1,
      py::arg("stack_stride") = 0, py::arg("scales") = std::vector<float>{},
      "Packs `stack` matrices of rows x cols weights stored as in a GGUF file (quant_type: ggml's number). `scales`, "
      "one a "
      "matrix or none, multiply the products.");
  module.def(
      "packed_bytes",
      [](int quant_type, int64_t rows, int64_t cols, int64_t stack) {
        return PackedMatrix(quant_type, nullptr, rows, cols, stack, 0, true).packed_bytes();
      },
      py::arg("quant_type"), py::arg("rows"), py::arg("cols"), py::arg("stack") = 1,
      "What `pack` would hold, in bytes; packs nothing.");
  module.def(
      "map_stack",
      [](int quant_type, uintptr_t source, int64_t rows, int64_t cols, int64_t stack, int64_t stack_stride,
         const py::object&, std::vector<float> scales) {
        const auto* bytes = pointer<const void>(source, "map_stack", "source");
        return std::make_unique<PackedMatrix>(quant_type, bytes, rows, cols, stack, stack_stride, true,
                                              std::move(scales));
      },
      py::arg("quant_type"), py::arg("source"), py::arg("rows"), py::arg("cols"), py::arg("stack"),
      py::arg("stack_stride"), py::arg("owner"), py::arg("scales") = std::vector<float>{}, py::keep_alive<0, 7>(),
      "As pack, but row groups are packed as they are used; `owner` keeps the source's memory alive.");
  module.def(
      "quant_matmul",
      [](const std::vector<const PackedMatrix*>& parts, uintptr_t x, int64_t num_rows, uintptr_t out,
         uintptr_t norm_weight, double norm_eps, bool silu_mul, bool add_to_out, bool exact) {
        constexpr const char* f = "quant_matmul";
        QuantMatmul call;
        for (const PackedMatrix* part : parts)
          if (!part) fail(f, "parts", "PackedMatrix", "None");
        call.parts = parts, call.rows = num_rows;
        call.x = num_rows ? pointer<const float>(x, f, "x") : nullptr;
        call.out = num_rows ? pointer<float>(out, f, "out") : nullptr;
        call.norm_weight = reinterpret_cast<const float*>(norm_weight);
        call.norm_eps = static_cast<float>(norm_eps);
        call.activation = silu_mul ? Activation::kSiluMul : Activation::kNone;
        call.residual = add_to_out ? call.out : nullptr;
        call.exact = exact;
        Recording::launch([call] { quant_matmul(call); });
      },
      "x [T, K], the parts' rows side by side -> out; shapes: ops/quant_matmul. norm_weight 0: no norm in front.");
  module.def(
      "moe_matmul",
      [](uintptr_t x, int64_t num_rows, uintptr_t norm_weight, double norm_eps, const PackedMatrix* router,
         const std::array<const PackedMatrix*, 3>& experts, const std::array<const PackedMatrix*, 3>& shared, int top_k,
         bool norm_topk_prob) {
        MoeMatmul call;
        call.x = num_rows ? pointer<float>(x, "moe_matmul", "x") : nullptr;
        call.rows = num_rows;
        call.norm_weight = reinterpret_cast<const float*>(norm_weight);
        call.norm_eps = static_cast<float>(norm_eps);
        call.router = router;
        call.experts = {experts[0], experts[1], experts[2]};
        call.shared = {shared[0], shared[1], shared[2]};
        call.top_k = top_k, call.norm_topk_prob = norm_topk_prob;
        Recording::launch([call] { moe_matmul(call); });
      },
      "Adds a sparse block to x [T, H] in place; shapes: ops/moe_matmul. (gate, up, down) each; shared: three None.");
  module.def(
      "quant_embedding",
      [](const PackedMatrix& matrix, uintptr_t ids, int64_t n, uintptr_t out) {
        const auto* i = n ? pointer<const int64_t>(ids, "quant_embedding", "ids") : nullptr;
        auto* o = n ? pointer<float>(out, "quant_embedding", "out") : nullptr;
        Recording::launch([matrix = &matrix, i, n, o] { quant_embedding(*matrix, i, n, o); });
      },
      "Rows ids [n] int64 of the matrix as float32 [n, cols].");
  module.def(
      "argmax",
      [](uintptr_t values, int64_t rows, int64_t cols, uintptr_t out) {
        const auto* v = rows ? pointer<const float>(values, "argmax", "values") : nullptr;
        auto* o = rows ? pointer<int64_t>(out, "argmax", "out") : nullptr;
        Recording::launch([=] { argmax(v, rows, cols, o); });
      },
      "The first place of the largest value of each row of values [rows, cols], or of its first NaN, as int64 [rows].");
  module.def(
      "dequantize",
      [](int quant_type, uintptr_t source, int64_t n, uintptr_t out) {
        const auto* s = pointer<const void>(source, "dequantize", "source");
        auto* o = pointer<float>(out, "dequantize", "out");
        py::gil_scoped_release release;
        dequantize(quant_type, s, n, o);
      },
      py::arg("quant_type"), py::arg("source"), py::arg("n"), py::arg("out"), "n values as float32.");
  module.def(
      "quantize",
      [](int quant_type, uintptr_t source, int64_t rows, int64_t cols, uintptr_t weights, uintptr_t out) {
        const auto* s = pointer<const float>(source, "quantize", "source");
        auto* o = pointer<void>(out, "quantize", "out");
        py::gil_scoped_release release;
        quantize(quant_type, s, rows, cols, reinterpret_cast<const float*>(weights), o);
      },
      py::arg("quant_type"), py::arg("source"), py::arg("rows"), py::arg("cols"), py::arg("weights"), py::arg("out"),
      "rows x cols float32 as blocks; weights [cols] float32 of the squared errors, or 0: all 1.");

  module.def("read_bandwidth", &read_bandwidth, py::arg("nbytes") = 256 << 20, py::arg("threads") = 0,
             py::arg("repeats") = 5, py::call_guard<py::gil_scoped_release>(), "Best of some reads, bytes a second.");
  module.def("int8_rate", &int8_rate, py::call_guard<py::gil_scoped_release>(), "Int8 operations a second.");
  module.def("bfloat16_rate", &bfloat16_rate, py::call_guard<py::gil_scoped_release>(), "The same of bfloat16.");
  module.def("float_rate", &float_rate, py::call_guard<py::gil_scoped_release>(), "Float32 operations a second.");

  module.def(
      "paged_attention",
      [](uintptr_t qkv, uintptr_t q_norm, uintptr_t k_norm, double eps, uintptr_t cos_sin, int64_t max_positions,
         int rotary_dim, uintptr_t positions, uintptr_t slot_mapping, uintptr_t page_tables, int64_t pages_per_sequence,
         uintptr_t cu_seqlens, uintptr_t seq_lens, int64_t num_sequences, uintptr_t k_cache, uintptr_t v_cache,
         int64_t num_pages, int kv_type, bool gated, int num_heads, int num_kv_heads, int head_dim, double scale,
         uintptr_t ctx, int64_t num_tokens) {
        constexpr const char* f = "paged_attention";
        PagedAttention p;
        p.qkv = pointer<const float>(qkv, f, "qkv");
        p.q_norm = pointer<const float>(q_norm, f, "q_norm");
        p.k_norm = pointer<const float>(k_norm, f, "k_norm");
        p.cos_sin = pointer<const float>(cos_sin, f, "cos_sin");
        p.positions = pointer<const int64_t>(positions, f, "positions");
        p.slot_mapping = pointer<const int64_t>(slot_mapping, f, "slot_mapping");
        p.page_tables = pointer<const int32_t>(page_tables, f, "page_tables");
        p.cu_seqlens = pointer<const int32_t>(cu_seqlens, f, "cu_seqlens");
        p.seq_lens = pointer<const int32_t>(seq_lens, f, "seq_lens");
        p.k_cache = pointer<void>(k_cache, f, "k_cache");
        p.v_cache = pointer<void>(v_cache, f, "v_cache");
        p.ctx = pointer<float>(ctx, f, "ctx");
        p.num_tokens = num_tokens, p.num_sequences = num_sequences, p.pages_per_sequence = pages_per_sequence;
        p.num_pages = num_pages, p.max_positions = max_positions;
        p.num_heads = num_heads, p.num_kv_heads = num_kv_heads, p.head_dim = head_dim;
        p.rotary_dim = rotary_dim, p.gated = gated;
        p.kv_type = static_cast<QuantType>(kv_type), p.eps = eps, p.scale = static_cast<float>(scale);
        Recording::launch([p] { paged_attention(p); });
      },
      "Writes keys and values of the new tokens into their pages, then attends. Shapes: ops/paged_attention.");

  module.def(
      "causal_conv1d",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t channels, int taps, uintptr_t conv_state,
         int64_t num_slots, uintptr_t state_slots, uintptr_t cu_seqlens, int64_t num_sequences, uintptr_t out,
         int64_t num_tokens) {
        constexpr const char* f = "causal_conv1d";
        CausalConv1d p;
        p.x = pointer<const float>(x, f, "x");
        p.weight = pointer<const float>(weight, f, "weight");
        p.conv_state = pointer<float>(conv_state, f, "conv_state");
        p.out = pointer<float>(out, f, "out");
        p.sequences = {pointer<const int32_t>(cu_seqlens, f, "cu_seqlens"),
                       pointer<const int32_t>(state_slots, f, "state_slots"), num_sequences, num_tokens, num_slots};
        p.x_stride = x_stride, p.channels = channels, p.taps = taps;
        Recording::launch([p] { causal_conv1d(p); });
      },
      "Convolves packed sequences, each with its state, then SiLU. Shapes: ops/causal_conv1d.");
  module.def(
      "gated_delta_rule",
      [](uintptr_t qkv, int64_t qkv_stride, uintptr_t z, int64_t z_stride, uintptr_t b, int64_t b_stride, uintptr_t a,
         int64_t a_stride, uintptr_t a_coefficient, uintptr_t dt_bias, uintptr_t norm_weight, double eps,
         uintptr_t recurrent_state, int64_t num_slots, uintptr_t state_slots, uintptr_t cu_seqlens,
         int64_t num_sequences, int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim, bool tiled,
         uintptr_t out, int64_t num_tokens) {
        constexpr const char* f = "gated_delta_rule";
        GatedDeltaRule p;
        p.qkv = pointer<const float>(qkv, f, "qkv");
        p.z = pointer<const float>(z, f, "z");
        p.b = pointer<const float>(b, f, "b");
        p.a = pointer<const float>(a, f, "a");
        p.a_coefficient = pointer<const float>(a_coefficient, f, "a_coefficient");
        p.dt_bias = pointer<const float>(dt_bias, f, "dt_bias");
        p.norm_weight = pointer<const float>(norm_weight, f, "norm_weight");
        p.state = pointer<float>(recurrent_state, f, "recurrent_state");
        p.out = pointer<float>(out, f, "out");
        p.sequences = {pointer<const int32_t>(cu_seqlens, f, "cu_seqlens"),
                       pointer<const int32_t>(state_slots, f, "state_slots"), num_sequences, num_tokens, num_slots};
        p.qkv_stride = qkv_stride, p.z_stride = z_stride, p.b_stride = b_stride, p.a_stride = a_stride;
        p.num_k_heads = num_k_heads, p.num_v_heads = num_v_heads;
        p.head_k_dim = head_k_dim, p.head_v_dim = head_v_dim, p.tiled = tiled, p.eps = eps;
        Recording::launch([p] { gated_delta_rule(p); });
      },
      "Advances the states of packed sequences by the gated delta rule. Shapes: ops/gated_delta_rule.");
}
