"""NVIDIA cards as the driver's management library tells, without a context and without the core. Source: NVML's API reference."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"


class NoDriver(Exception):
    """NVML cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card; ``capability`` is its compute capability, ``free_bytes`` as of this moment."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver: its version (``580.95.05``), and the newest CUDA that it has, 13000 for 13.0."""

    version: str
    cuda: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def read(library: str = LIBRARY) -> tuple[Driver, list[Card]]:
    """The driver and every card of the machine, whatever ``CUDA_VISIBLE_DEVICES`` says. Waits for the driver: call it in a thread where
    nothing may wait. Raises :class:`NoDriver`."""
    nvml = _opened(library)
    try:
        version = ctypes.create_string_buffer(80)
        nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
        cuda = ctypes.c_int()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        return Driver(version.value.decode(), cuda.value), list(_cards(nvml))
    finally:
        nvml.nvmlShutdown()


def free_bytes(index: int, library: str = LIBRARY) -> int:
    """Free memory of a card by its number. Waits for the driver. Raises :class:`NoDriver`, also where there is no such card."""
    nvml = _kept(library)
    card, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(card)) != 0:
        raise NoDriver(f"the NVIDIA driver has no card {index}")
    if nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)) != 0:
        raise NoDriver(f"the NVIDIA driver does not tell the memory of card {index}")
    return int(memory.free)


def _opened(library: str) -> ctypes.CDLL:
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        raise NoDriver(f"there is no NVIDIA driver here ({library} cannot be loaded)") from None
    status = nvml.nvmlInit_v2()
    if status != 0:
        raise NoDriver(f"the NVIDIA driver does not answer (NVML error {status})")
    return nvml


@functools.cache
def _kept(library: str) -> ctypes.CDLL:
    """Open to the end of the process: opening takes much longer than asking."""
    return _opened(library)


def _cards(nvml: ctypes.CDLL) -> Iterator[Card]:
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
        yield Card(index, name.value.decode(errors="replace"), (major.value, minor.value), memory.total, memory.free)
