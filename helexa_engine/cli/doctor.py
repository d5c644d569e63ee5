"""``helexa doctor``: what this machine and this installation can do, and what to do about what they cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .. import env
from ..errors import HelexaError
from ..version import __version__
from . import machine

#: The oldest version of each package that helexa runs with; pyproject.toml says the same and a test compares them.
REQUIREMENTS = {
    "torch": "2.9",
    "numpy": "1.26",
    "tokenizers": "0.20",
    "safetensors": "0.4.3",
    "jinja2": "3.1",
    "msgspec": "0.19",
    "llguidance": "1.0",
    "starlette": "0.40",
    "uvicorn": "0.30",
    "rich": "13",
    "huggingface-hub": "2.4",
}
#: Instruction sets that the native core has kernels for, best first, with the flags each needs.
ISA_FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx2_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``missing`` means helexa cannot run, ``slow`` that it runs far below what the machine can do."""

    status: Literal["ok", "slow", "missing"]
    subject: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(arguments: argparse.Namespace) -> int:
    del arguments
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.status:>7}  {finding.subject:<14} {finding.text}", flush=True)
    missing = sum(finding.status == "missing" for finding in findings)
    slow = sum(finding.status == "slow" for finding in findings)
    if missing:
        print(f"\n{missing} thing(s) missing: helexa cannot run models here until they are mended.")
        return 1
    print("\nhelexa can run models here" + (f", with {slow} thing(s) that slow it down." if slow else "."))
    return 0


def examine() -> Iterator[Finding]:
    """Every check, in the order in which things depend on each other."""
    yield Finding("ok", "helexa", f"{__version__}, {machine.commit() or 'installed package'}, {machine.PACKAGE_ROOT}")
    new_enough = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if new_enough else "missing",
        "python",
        f"{platform.python_version()} ({sys.executable})" + ("" if new_enough else "; helexa needs 3.11 or newer"),
    )
    yield from _packages()
    yield from _torch()
    yield from _processor()
    yield from _native()
    yield from _cuda()
    from ..runtime.memory import available_bytes

    total = machine.memory_bytes()
    of_all = "" if total is None else f" of {total / 2**30:.1f} GiB"
    yield Finding("ok", "memory", f"{available_bytes() / 2**30:.1f} GiB{of_all} free for models")
    yield from _demo()
    yield from _quantised_models()


def _quantised_models() -> Iterator[Finding]:
    """What quantising on loading has left on the disk."""
    folder = env.cache_folder() / "quantized"
    sizes = [path.stat().st_size for path in folder.glob("*.gguf")]
    yield Finding(
        "ok", "quantised", f"{len(sizes)} model(s), {sum(sizes) / 1e9:.1f} GB in {folder}; delete what you do not need"
    )


def _packages() -> Iterator[Finding]:
    found = []
    for name, oldest in REQUIREMENTS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("missing", name, f"not installed; run: pip install '{name}>={oldest}'")
            continue
        if _numbers(version) < _numbers(oldest):
            yield Finding("missing", name, f"{version} is too old; run: pip install '{name}>={oldest}'")
        else:
            found.append(f"{name} {version}")
    yield Finding("ok", "packages", ", ".join(found))


def _numbers(version: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` as (2, 13, 0): the release part, as far as it is numbers."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits[0]))
    return tuple(numbers)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken install raises anything from ImportError to OSError
        yield Finding("missing", "torch", f"cannot be imported: {type(error).__name__}: {error}")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield Finding("ok", "torch", f"{torch.__version__}, built for {build}, {torch.get_num_threads()} threads")


def _processor() -> Iterator[Finding]:
    flags = machine.cpu_flags()
    text = f"{machine.cpu_model()}, {machine.usable_cpus()} CPUs for this process"
    if not flags:
        yield Finding("ok", "processor", text)
        return
    level = next((name for name, needed in ISA_FLAGS.items() if needed <= flags), None)
    if level == "avx512":
        yield Finding("ok", "processor", f"{text}, AVX-512 with VNNI")
    elif level is not None:
        lacking = ", ".join(sorted(ISA_FLAGS["avx512"] - flags))
        has = "AVX2 with VNNI" if level == "avx2_vnni" else "AVX2"
        yield Finding("ok", "processor", f"{text}, {has} (no {lacking}, so prompts are computed more slowly)")
    else:
        yield Finding(
            "slow", "processor", f"{text}: neither AVX-512 nor AVX2 with FMA and F16C; the generic kernels are slow"
        )


def _native() -> Iterator[Finding]:
    try:
        from .. import _native
    except ImportError as error:
        yield Finding(
            "slow",
            "native core",
            f"not usable ({error}): models run on plain PyTorch, about a hundred times slower. Install a C++17 compiler and "
            "CMake 3.21 or newer and install helexa again; HELEXA_BUILD_NATIVE=1 makes a failed build an error",
        )
        return
    try:
        forced = env.cpu_isa()
        threads = env.num_threads()
        if forced is not None:
            _native.set_cpu_isa(forced)
        if threads is not None:
            _native.set_num_threads(threads)
        level = _native.cpu_isa()
        why = "HELEXA_CPU_ISA" if forced else "the best this processor has"
        yield Finding("ok", "native core", f"built; instruction set {level} ({why})")
        bandwidth = _native.read_bandwidth()
        yield Finding(
            "ok",
            "bandwidth",
            f"memory reads at {bandwidth / 1e9:.1f} GB/s: a model of 1 GB decodes at no more than {bandwidth / 1e9:.0f} tokens/s",
        )
    except AttributeError as error:
        yield Finding("missing", "native core", f"was built from an older helexa ({error}); build it again")
    except (HelexaError, ValueError, RuntimeError) as error:
        yield Finding("missing", "native core", f"{error}")


def _cuda() -> Iterator[Finding]:
    """The devices, what of this build serves them, and what is in the way of models on them."""
    from ..runtime import nvml
    from ..runtime.cuda_device import diagnose
    from ..runtime.cuda_facts import gather, serving, version_text

    facts = gather()
    try:
        driver, cards = nvml.read()
    except nvml.NoDriver:
        driver, cards = None, []
    if driver is not None:
        yield Finding("ok", "cuda driver", f"{driver.version}, for CUDA up to {version_text(driver.cuda)}")
    for card in cards:
        major, minor = card.capability
        memory = f"{card.free_bytes / 2**30:.1f} GiB of {card.memory_bytes / 2**30:.1f} GiB free"
        code = serving(card.capability, facts.architectures)
        served = f"kernels for sm_{code}" if code is not None else "no kernels for it in this build"
        yield Finding(
            "ok", f"cuda card {card.index}", f"{card.name}, {memory}, compute capability {major}.{minor}, {served}"
        )
    if facts.kernels:
        built = f"for compute capabilities {' '.join(facts.architectures)}, with CUDA {version_text(facts.runtime)}"
        yield Finding("ok", "cuda kernels", built)
    try:
        found = diagnose()
    except ImportError as error:  # torch is broken, as is said above
        yield Finding("slow", "cuda", f"cannot be tried without torch: {error}")
        return
    if found is None:
        used = facts.devices[0]
        others = f"; {len(facts.devices) - 1} more, CUDA_VISIBLE_DEVICES chooses" if len(facts.devices) > 1 else ""
        yield Finding("ok", "cuda", f"models run on {used}{others}")
        yield from _beside_the_kernels()
    elif driver is None and not facts.devices:
        yield Finding("ok", "cuda", f"no NVIDIA driver: models run on the CPU ({found.fix})")
    else:
        yield Finding("slow", "cuda", f"models run on the CPU: {found}")


def _beside_the_kernels() -> Iterator[Finding]:
    """What of torch's packages counts on CUDA."""
    from importlib.util import find_spec

    import torch

    if find_spec("triton") is None:
        yield Finding(
            "slow",
            "triton",
            "not installed: ops that have no kernel of ours run in plain PyTorch; run: pip install triton",
        )
    else:
        yield Finding("ok", "triton", importlib.metadata.version("triton"))
    nccl = (
        "there" if torch.distributed.is_available() and torch.distributed.is_nccl_available() else "not in this torch"
    )
    yield Finding("ok", "nccl", f"{nccl}; it would be for several devices together, which helexa does not use yet")


def _demo() -> Iterator[Finding]:
    from .. import demo

    path = demo.path()
    if path.exists():
        yield Finding("ok", "demo model", f"{path} ({path.stat().st_size / 1e6:.1f} MB); try: helexa run demo")
    else:
        yield Finding(
            "missing", "demo model", f"no file {path}: this installation is not complete; install helexa again"
        )
