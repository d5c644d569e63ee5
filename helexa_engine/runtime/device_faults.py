"""What is lost when a device fails: classified by the exception's type and the code it carries, never by its text.

Errors of the device come from three places: our kernels' launches (``CudaError`` of the core), torch's own work
(``torch.AcceleratorError``), and torch's allocator (``torch.OutOfMemoryError``). The first two carry a number of ``cudaError_t``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..errors import DeviceOutOfMemory, EngineDied
from ..ops import cuda

Fault = Literal["out_of_memory", "device_lost"]

_MEMORY_ALLOCATION = 2

#: Numbers of ``cudaError_t`` after which the process can compute no more on the device: all later calls fail too. Source: what CUDA's
#: driver_types.h says must end the process, the context or the device.
LOST = frozenset(
    {
        214,  # cudaErrorECCUncorrectable
        220,  # cudaErrorNvlinkUncorrectable
        226,  # cudaErrorContained
        700,  # cudaErrorIllegalAddress
        702,  # cudaErrorLaunchTimeout
        709,  # cudaErrorContextIsDestroyed
        710,  # cudaErrorAssert
        714,  # cudaErrorHardwareStackError
        715,  # cudaErrorIllegalInstruction
        716,  # cudaErrorMisalignedAddress
        717,  # cudaErrorInvalidAddressSpace
        718,  # cudaErrorInvalidPc
        719,  # cudaErrorLaunchFailure
        721,  # cudaErrorTensorMemoryLeak
        810,  # cudaErrorMpsClientTerminated
        911,  # cudaErrorExternalDevice
        999,  # cudaErrorUnknown
    }
)


def cuda_code(error: BaseException) -> int | None:
    """The number of ``cudaError_t`` that an exception carries; None where it is none of the device's."""
    kernels = cuda.kernels()
    if kernels is not None and isinstance(error, kernels.CudaError):
        return int(error.code)  # type: ignore[attr-defined]
    torch: Any = sys.modules.get("torch")  # who has not imported it raises nothing of it
    if torch is not None and isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)
        return None if code is None else int(code)
    return None


def fault_of(error: BaseException) -> Fault | None:
    """What is lost: memory was short and all else is well, or the device is gone for this process. None for other errors."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "out_of_memory"
    code = cuda_code(error)
    if code == _MEMORY_ALLOCATION:
        return "out_of_memory"
    return "device_lost" if code in LOST else None


def device_lost(error: BaseException, doing: str) -> EngineDied:
    """What ends an engine whose device is lost; the fact ``reason`` is ``device_lost``."""
    died = EngineDied(
        f"the device was lost {doing}: {type(error).__name__}: {error}; a new process can use it again unless the hardware failed: "
        "nvidia-smi and the kernel's log (Xid) tell",
        reason="device_lost",
        cuda_error=cuda_code(error),
    )
    died.__cause__ = error
    return died


def out_of_memory(error: BaseException, doing: str, advice: str) -> DeviceOutOfMemory:
    """What a request, or a load, ends with when the device has no memory left."""
    failure = DeviceOutOfMemory(f"the device ran out of memory {doing}: {error}; {advice}")
    failure.__cause__ = error
    return failure


def release_cached_memory() -> None:
    """Gives back what torch's allocator holds and nobody uses, in pieces that did not suit what was asked for."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def explained(doing: str, advice: str) -> Iterator[None]:
    """Raises the device's faults as helexa's errors.

    Raises:
        DeviceOutOfMemory: memory was short; ``advice`` says what to do.
        EngineDied: the device is lost.
    """
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if fault == "out_of_memory":
            failure: Exception = out_of_memory(error, doing, advice)
        elif fault == "device_lost":
            failure = device_lost(error, doing)
        else:
            raise
        raise failure from error
