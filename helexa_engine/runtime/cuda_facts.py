"""What this machine, this build and this torch have of CUDA, and what of it stands in the way of models. No torch is imported."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import env
from ..ops import cuda
from . import nvml

#: The first driver of each major version of CUDA. Source: NVIDIA's CUDA release notes, minor version compatibility.
FIRST_DRIVERS = {12: "525", 13: "580"}

#: Where torch's builds for CUDA are, by the major version that the driver has.
TORCH_BUILDS = {12: "cu128", 13: "cu130"}

#: The oldest compute capability that helexa has kernels for.
OLDEST_CAPABILITY = (8, 0)

# Of cudaError_t, what asking for the devices may end with.
_NO_DEVICE, _INSUFFICIENT_DRIVER = 100, 35
_SYSTEM_NOT_READY, _DRIVER_MISMATCH = 802, 803


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A device as a process sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory_bytes / 2**30:.0f} GiB, compute capability {major}.{minor}"


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """All that :func:`obstacle` judges by.

    Attributes:
        kernels: whether the core was built with nvcc; False too where there is no driver and nobody looked.
        architectures: what it was built for: ``80``, ``90a``.
        runtime: the CUDA that it was built with, 13000 for 13.0; 0 without kernels.
        driver: the newest CUDA that the driver has; 0 without a driver.
        devices: those that this process may use; models run on the first.
        error: the number of cudaError_t that asking for the devices ended with; 0 is none.
        torch: version of torch; None where it is not installed.
        torch_cuda: the CUDA that torch was built for, ``13.0``; None for a build without.
        torch_architectures: what torch has kernels for, as ``torch.cuda.get_arch_list`` says; empty where that was not asked.
        is_old: whether the core was built from an older helexa, in a source tree that was not built again.
    """

    kernels: bool
    architectures: tuple[str, ...] = ()
    runtime: int = 0
    driver: int = 0
    devices: tuple[CudaDevice, ...] = ()
    error: int = 0
    torch: str | None = None
    torch_cuda: str | None = None
    torch_architectures: tuple[str, ...] = ()
    is_old: bool = False


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why models cannot run on CUDA here.

    Attributes:
        reason: one stable word for programs: ``no_driver``, ``old_driver`` ...
        what: what is in the way.
        fix: what to do about it.
    """

    reason: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def build_facts() -> CudaFacts:
    """What was built and installed, without asking for a driver or a device."""
    kernels = cuda.kernels()
    version, torch_cuda = _torch()
    if kernels is None:
        return CudaFacts(False, torch=version, torch_cuda=torch_cuda)
    if not hasattr(kernels, "architectures"):
        return CudaFacts(True, is_old=True, torch=version, torch_cuda=torch_cuda)
    architectures = tuple(kernels.architectures.split())
    return CudaFacts(True, architectures, kernels.runtime_version(), torch=version, torch_cuda=torch_cuda)


def gather_without_device() -> CudaFacts:
    """The same as :func:`gather` for a process that must not touch a device: driver and devices are NVML's, and those that
    ``CUDA_VISIBLE_DEVICES`` hides are none. Without a driver nothing else is looked at, and the core is not loaded."""
    try:
        driver, cards = nvml.read()
    except nvml.NoDriver:
        return CudaFacts(kernels=False)
    return with_cards(build_facts(), driver, cards)


def with_cards(facts: CudaFacts, driver: nvml.Driver, cards: Sequence[nvml.Card]) -> CudaFacts:
    """``facts`` with what NVML tells."""
    visible = () if env.hides_cuda_devices() else cards[env.first_cuda_device() :]
    found = tuple(CudaDevice(card.name, card.capability, card.memory_bytes) for card in visible)
    return replace(facts, driver=driver.cuda, devices=found)


def gather() -> CudaFacts:
    """The facts of this process, of torch what can be had without importing it. Asks the driver, and makes no context."""
    facts, kernels = build_facts(), cuda.kernels()
    if kernels is None or facts.is_old:
        return gather_without_device()
    error, devices = 0, []
    try:
        devices = kernels.devices()
    except kernels.CudaError as raised:
        error = raised.code
    seen = tuple(CudaDevice(name, (major, minor), nbytes) for name, major, minor, nbytes in devices)
    return replace(facts, driver=kernels.driver_version(), devices=seen, error=error)


def _torch() -> tuple[str | None, str | None]:
    """torch's version and its CUDA, from the file that ``import torch`` reads them from."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return said.get("__version__"), said.get("cuda")


def serving(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Which of ``architectures`` (``80``, ``90a``, torch's ``sm_80``, ``compute_90``) a device runs; None if none.

    Machine code runs within its major version, on the same or a later minor one; with an ``a`` on its own alone. ``compute_`` is PTX,
    which the driver compiles for every later device.
    """
    major, minor = capability
    best: tuple[tuple[int, int], str] | None = None
    for architecture in architectures:
        match = re.fullmatch(r"(?:sm_|(compute_))?(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        is_ptx, has = match[1] is not None, (int(match[2]), int(match[3]))
        if match[4] == "a":
            runs = has == capability
        elif is_ptx:
            runs = has <= capability
        else:
            runs = has[0] == major and has[1] <= minor
        if runs and (best is None or has >= best[0]):
            best = has, architecture
    return None if best is None else best[1]


def version_text(cuda_version: int) -> str:
    """``13.0`` of 13000."""
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"


def obstacle(facts: CudaFacts) -> Obstacle | None:
    """What is in the way of models on CUDA, the most fundamental thing first; None where nothing is."""
    return _driver_obstacle(facts) or _device_obstacle(facts)


def _driver_obstacle(facts: CudaFacts) -> Obstacle | None:
    if facts.driver == 0:
        return Obstacle(
            "no_driver",
            "there is no NVIDIA driver here",
            "install one, version 525 or newer; a container needs the NVIDIA container toolkit and --gpus all",
        )
    if not facts.kernels:
        return Obstacle(
            "no_kernels",
            "this build of helexa has no CUDA kernels: nvcc 12.8 or newer was not found when it was built",
            "install the CUDA toolkit and install helexa again",
        )
    if facts.is_old:
        return Obstacle(
            "old_core", "the native core was built from an older helexa", "build it again (scripts/build_native)"
        )
    major = facts.driver // 1000
    torch_build = TORCH_BUILDS.get(min(major, max(TORCH_BUILDS)), TORCH_BUILDS[12])
    install_torch = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{torch_build}"
    if facts.error == _INSUFFICIENT_DRIVER or major < facts.runtime // 1000:
        needed = facts.runtime // 1000
        return Obstacle(
            "old_driver",
            f"the NVIDIA driver is too old: it has CUDA {version_text(facts.driver)}, and this build of helexa needs {needed}.0",
            f"update the driver to {FIRST_DRIVERS.get(needed, 'a newer one')} or newer, or build helexa with a CUDA toolkit "
            f"of version {major}",
        )
    if facts.torch_cuda is None:
        return Obstacle("torch_without_cuda", f"torch {facts.torch} is built without CUDA", f"run: {install_torch}")
    needed = int(facts.torch_cuda.partition(".")[0])
    if major < needed:
        return Obstacle(
            "torch_newer_than_driver",
            f"torch {facts.torch} is built for CUDA {facts.torch_cuda}, and the NVIDIA driver has {version_text(facts.driver)}",
            f"update the driver to {FIRST_DRIVERS.get(needed, 'a newer one')} or newer, or run: {install_torch}",
        )
    return None


def _device_obstacle(facts: CudaFacts) -> Obstacle | None:
    if facts.error == _SYSTEM_NOT_READY:
        return Obstacle(
            "system_not_ready",
            "the driver is not ready: the switches between the devices are not set up",
            "start nvidia-fabricmanager, of the driver's version",
        )
    if facts.error == _DRIVER_MISMATCH:
        return Obstacle(
            "driver_mismatch",
            "the NVIDIA driver in the kernel and its library are of different versions",
            "restart the machine, or the container that was made with the other one",
        )
    if facts.error not in (0, _NO_DEVICE):
        return Obstacle(
            "device_unusable",
            f"the driver cannot give a device (CUDA error {facts.error})",
            "nvidia-smi and the kernel's log (Xid) say more; a device that is lost needs a reset or a restart of the machine",
        )
    if not facts.devices:
        return Obstacle(
            "no_device",
            "the NVIDIA driver shows this process no device",
            "CUDA_VISIBLE_DEVICES hides it, it is not passed into the container, or nvidia-smi shows none either",
        )
    device = facts.devices[0]
    major, minor = device.capability
    if device.capability < OLDEST_CAPABILITY:
        return Obstacle(
            "old_device",
            f"{device.name} has compute capability {major}.{minor}, and helexa's kernels need 8.0 (Ampere) or newer",
            "run the model on the CPU (--device cpu) or on another device (CUDA_VISIBLE_DEVICES)",
        )
    if serving(device.capability, facts.architectures) is None:
        return Obstacle(
            "no_code",
            f"this build of helexa has kernels for compute capabilities {' '.join(facts.architectures)}, none of which "
            f"{device.name} ({major}.{minor}) runs",
            f"install helexa again with HELEXA_CUDA_ARCHITECTURES={major}{minor} in the environment",
        )
    if facts.torch_architectures and serving(device.capability, facts.torch_architectures) is None:
        return Obstacle(
            "torch_without_code",
            f"torch {facts.torch} has kernels for {' '.join(facts.torch_architectures)}, none of which {device.name} "
            f"({major}.{minor}) runs",
            "install a build of torch for a newer CUDA",
        )
    return None
