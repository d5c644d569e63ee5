"""The instruction-set levels that tests of native ops run at."""

from __future__ import annotations

from helexa_engine.ops.registry import native_core

#: Those with kernels of their own in most ops.
MAIN_LEVELS = ("generic", "avx2", "avx512")
#: Those that differ in the quantised matmul.
MATMUL_LEVELS = ("generic", "avx2", "avx2_vnni", "avx512_vnni", "avx512")


def levels_here(names: tuple[str, ...] = MAIN_LEVELS) -> list[str]:
    """Those of ``names`` that this processor has; none without the native core."""
    native = native_core()
    if native is None:
        return []
    before, found = native.cpu_isa(), []
    for name in names:
        try:
            native.set_cpu_isa(name)
        except ValueError:
            continue
        found.append(name)
    native.set_cpu_isa(before)
    return found
