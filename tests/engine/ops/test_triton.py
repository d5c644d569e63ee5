"""The Triton kernels: their tests run under Triton's interpreter in a process of their own, and the kernels compile for cards
that are not here without spilling a register. They are for cards alone: a CPU never chooses them, nor needs Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine.errors import BackendUnavailable
from helexa_engine.ops.gated_delta_rule import gated_delta_rule

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
import re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from helexa_engine.ops.gated_delta_rule import triton as rule
from helexa_engine.ops.gated_delta_rule.tuning import tuning_for

MOST_SHARED = (227 if sys.argv[1] == "90" else 99) << 10  # bytes that a block may take
tuning = tuning_for("sm_" + sys.argv[1], 128, 128)
heads = dict(K=16, V=32, DK=128, TILED=True, CHUNK=tuning.chunk, CHUNK_FROM=rule.CHUNK_FROM)
columns = dict(DV=128, BLOCK_V=tuning.block_v)
kernels = [
    (rule._solve_chunks, heads, rule._options(tuning.solve)),
    (rule._advance_chunks, heads | columns, rule._options(tuning.advance)),
    (rule._recurrent, heads | columns, dict(BLOCK_K=128, num_warps=4)),
]
if sys.argv[1] == "80":
    kernels.append((rule._gated_norm, dict(V=32, DV=128, BLOCK=128), dict(num_warps=1)))
for kernel, constants, tile in kernels:
    constants = constants | {name: value for name, value in tile.items() if name.isupper()}
    options = {name: value for name, value in tile.items() if not name.isupper()}
    integers = ("channels", "num_sequences")
    types = {name: "i32" if name.endswith("stride") or name in integers else "*fp32" for name in kernel.arg_names}
    types.update(eps="fp32", state_slots="*i32", cu_seqlens="*i32", **{name: "constexpr" for name in constants})
    # As at run time: addresses and strides are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name][0] in "i*" and name != "num_sequences"
    }
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    cubin = compiled.asm["cubin"]
    assert compiled.metadata.shared <= MOST_SHARED, f"{kernel.__name__}: {compiled.metadata.shared} bytes of shared memory"
    with open(sys.argv[2], "wb") as file:
        file.write(cubin)
    code = subprocess.run([triton.knobs.nvidia.nvdisasm.path, sys.argv[2]], check=True, capture_output=True, text=True).stdout
    spills = len(re.findall(r"\\b(?:STL|LDL)\\b", code))
    assert "EXIT" in code and spills == 0, f"{kernel.__name__}: {spills} instructions reach for local memory"
    # Triton's own code is the same for these; what is left is to assign registers.
    for other in sys.argv[3:]:
        assert tuning_for("sm_" + other, 128, 128) == tuning, "a row of its own: compile for it separately"
        with open(sys.argv[2], "w") as file:
            file.write(compiled.asm["ptx"].replace(".target sm_80", ".target sm_" + other))
        done = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_" + other, sys.argv[2], "-o", "/dev/null"],
            check=True, capture_output=True, text=True,
        )
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
"""


def run(*arguments: str, interpret: bool, cache: Path) -> None:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@needs_triton
def test_the_kernels_under_the_interpreter(tmp_path: Path) -> None:
    file = Path(__file__).with_name("triton_interpreted.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), interpret=True, cache=tmp_path)


@needs_triton
@pytest.mark.parametrize("capabilities", ["80 86 89", "90", "120"])
def test_the_kernels_compile_without_spills_for_cards_that_are_not_here(tmp_path: Path, capabilities: str) -> None:
    first, *others = capabilities.split()
    run("-c", COMPILE, first, str(tmp_path / "kernel"), *others, interpret=False, cache=tmp_path)


def test_a_cpu_neither_imports_triton_nor_needs_it() -> None:
    code = """
import sys
from helexa_engine.ops.gated_delta_rule import gated_delta_rule
for _ in range(2):
    assert "triton" not in gated_delta_rule.choose("cpu", head_k_dim=128, head_v_dim=128).__name__
    assert sys.modules.get("triton") is None
    sys.modules["triton"] = None  # as on a machine without it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_forcing_it_where_it_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    op = gated_delta_rule
    monkeypatch.setenv("HELEXA_OPS", f"{op.name}=triton")
    with pytest.raises(BackendUnavailable, match="triton: it runs on cuda, not cpu"):
        op.choose("cpu", head_k_dim=128, head_v_dim=128)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailable, match="triton: the package triton is not installed"):
        op.choose("cuda", head_k_dim=128, head_v_dim=128)
