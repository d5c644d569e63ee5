// The whole native surface of helexa_engine._native on one page. The core knows no torch: pointers arrive as integers.
#include <pybind11/pybind11.h>

#include "check.h"
#include "cpu_features.h"
#include "paged_attention.h"
#include "thread_pool.h"

namespace py = pybind11;
using namespace helexa;

namespace {

template <class T>
T* pointer(uintptr_t address, const char* function, const char* argument) {
  check_pointer(address, function, argument);
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "helexa's compiled core";

  module.def("num_threads", &num_threads, "Threads that a kernel uses, the calling one among them.");
  module.def("set_num_threads", &set_num_threads, py::arg("n"), "0 restores the default: the physical cores allowed.");

  module.def("cpu_isa", [] { return name(cpu_isa()); }, "The instruction-set level in use.");
  module.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "generic, avx2 or avx512; ValueError where it cannot run.");

  module.def(
      "paged_attention",
      [](uintptr_t qkv, uintptr_t q_norm, uintptr_t k_norm, double eps, uintptr_t cos_sin, int64_t max_positions,
         uintptr_t positions, uintptr_t slot_mapping, uintptr_t page_tables, int64_t pages_per_sequence,
         uintptr_t cu_seqlens, uintptr_t seq_lens, int64_t num_sequences, uintptr_t k_cache, uintptr_t v_cache,
         int64_t num_pages, bool half_cache, int num_heads, int num_kv_heads, int head_dim, double scale, uintptr_t ctx,
         int64_t num_tokens) {
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
        p.half_cache = half_cache, p.eps = eps, p.scale = static_cast<float>(scale);
        py::gil_scoped_release release;
        paged_attention(p);
      },
      "Writes keys and values of the new tokens into their pages, then attends. Shapes: ops/paged_attention.");
}
