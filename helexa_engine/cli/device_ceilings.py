"""What a CUDA device does at most, measured with torch in the same run as what is held against it, and how it is named in a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Larger than every cache of a device.
COPIED_BYTES = 1 << 30
#: Rows and columns of the matrices that are multiplied.
MATMUL_SIZE = 8192
REPETITIONS = 10


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes read and written a second, together, by torch's copy of random bytes: ``nbytes``, by default :data:`COPIED_BYTES` or a quarter
    of what is free."""
    import torch

    if nbytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 26
        nbytes = min(COPIED_BYTES, free // 4)
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, REPETITIONS)
    return 2 * nbytes / seconds


def matmul_rate(device: torch.device, size: int | None = None) -> float:
    """Multiplications and additions a second of torch's product of two random bfloat16 matrices of ``size`` rows and columns, by
    default :data:`MATMUL_SIZE`."""
    import torch

    if size is None:
        size = MATMUL_SIZE if device.type == "cuda" else 128
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), device, REPETITIONS)
    return 2.0 * size**3 / seconds


def median_seconds(call: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Of one call, by the device's own clock where it has one; the first two calls warm up."""
    import torch

    with torch.inference_mode():
        call(), call()
        if device.type != "cuda":
            seconds = []
            for _ in range(repetitions):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            return statistics.median(seconds)
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for _ in range(repetitions)
        ]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return float(statistics.median(begin.elapsed_time(end) for begin, end in events)) / 1e3


def describe(device: torch.device) -> dict[str, Any]:
    """What a row says of the device besides the machine."""
    import torch

    if device.type != "cuda":
        return {"device": "emulated", "instruction_set": "emulated"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "instruction_set": f"sm_{properties.major}{properties.minor}",
        "torch": torch.__version__,
    }
