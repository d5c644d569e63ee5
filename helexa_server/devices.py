"""What this host computes with: its processor, and its NVIDIA cards as the driver's management library tells, without a context."""

from __future__ import annotations

import ctypes
import platform
import typing
from collections.abc import Iterator
from typing import Any

from helexa_engine.cli import machine
from helexa_engine.config import EngineConfig


class NoDriver(Exception):
    """NVML cannot be used; the text says why."""


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def describe() -> dict[str, Any]:
    """Host, devices and driver, and why CUDA cannot be used where it cannot. Reads the driver: call it in a thread."""
    cards: list[dict[str, Any]] = []
    driver: dict[str, Any] | None = None
    reason: str | None = None
    try:
        driver, cards = _nvidia()
        if not cards:
            reason = "the NVIDIA driver shows this process no card"
    except NoDriver as error:
        reason = str(error)
    if reason is None and "cuda" not in typing.get_args(typing.get_type_hints(EngineConfig)["device"]):
        reason = "this build of helexa computes on the processor only"
    processor = {
        "kind": "cpu",
        "name": machine.cpu_model(),
        "cpus": machine.usable_cpus(),
        "memory_bytes": machine.memory_bytes(),
    }
    return {
        "host": {"name": platform.node(), "system": platform.system(), "machine": platform.machine()},
        "devices": [processor, *cards],
        "driver": driver,
        "cuda": {"usable": reason is None, "reason": reason},
    }


def _nvidia(library: str = "libnvidia-ml.so.1") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(driver, cards). Raises :class:`NoDriver`."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        raise NoDriver(f"there is no NVIDIA driver here ({library} cannot be loaded)") from None
    status = nvml.nvmlInit_v2()
    if status != 0:
        raise NoDriver(f"the NVIDIA driver does not answer (NVML error {status})")
    try:
        version = ctypes.create_string_buffer(80)
        nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
        cuda = ctypes.c_int()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        newest = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
        return {"version": version.value.decode(), "cuda_version": newest}, list(_cards(nvml))
    finally:
        nvml.nvmlShutdown()


def _cards(nvml: ctypes.CDLL) -> Iterator[dict[str, Any]]:
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        card = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(card)) != 0:
            continue  # a card that fell off the bus
        name, memory = ctypes.create_string_buffer(96), _Memory()
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvml.nvmlDeviceGetName(card, name, ctypes.c_uint(len(name)))
        nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(card, ctypes.byref(major), ctypes.byref(minor))
        yield {
            "kind": "cuda",
            "index": index,
            "name": name.value.decode(errors="replace"),
            "compute_capability": f"{major.value}.{minor.value}",
            "memory_bytes": memory.total,
            "free_bytes": memory.free,
        }
