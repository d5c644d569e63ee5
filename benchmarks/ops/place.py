"""Where an op is measured: the processor or a card, with the ceilings there and a clock that sees the kernels alone."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from helexa_engine.cli import device_ceilings
from helexa_engine.ops.registry import Op, require_native
from helexa_engine.runtime.cuda_device import require_cuda

Call = Callable[[], Any]


@dataclass(frozen=True)
class Place:
    """A device with its ceilings.

    Attributes:
        name: ``cpu`` or ``cuda``.
        device: of the tensors.
        working_set: bytes that a round of calls must reach over, so that caches do not help.
        bandwidth: bytes a second; on the processor read, on a card read and written.
        rates: operations a second by arithmetic: ``int8``, ``bfloat16``, ``float32``.
        described: what a row says of it.
    """

    name: str
    device: torch.device
    working_set: int
    bandwidth: float
    rates: dict[str, float]
    described: dict[str, Any]

    def implementation(self, op: Op, **facts: Any) -> Any:
        """What a layer would choose here; the plain PyTorch twin is not worth measuring. Raises RuntimeError."""
        choice = op.decide(self.name, **facts)
        if choice.is_fallback and self.device.type == self.name:
            raise RuntimeError(f"{op.name} has no kernel on {self.name}: {choice.why}")
        return op.choose(self.name, **facts)

    def seconds(self, calls: Sequence[Call], repeats: int) -> float:
        """Median time of a round of ``calls``, by the number of them; the first rounds warm up. On a card a round is a graph, so
        that neither Python nor launching is in it."""
        with torch.inference_mode():
            if self.device.type != "cuda":
                return _by_the_clock(calls, repeats)
            return _by_graph(calls, repeats, self.device)


def _by_the_clock(calls: Sequence[Call], repeats: int) -> float:
    seconds = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        for call in calls:
            call()
        if repeat:
            seconds.append((time.perf_counter() - started) / len(calls))
    return statistics.median(seconds)


def _by_graph(calls: Sequence[Call], repeats: int, device: torch.device) -> float:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return device_ceilings.median_seconds(graph.replay, device, repeats) / len(calls)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    parser.add_argument("--json", metavar="FILE", help="append the rows to this file")


def place(name: str) -> Place:
    """The device of this name, its ceilings measured now. Raises :class:`BackendUnavailable`."""
    if name == "cpu":
        native = require_native()
        rates = {"int8": native.int8_rate(), "bfloat16": native.bfloat16_rate(), "float32": native.float_rate()}
        described = {"instruction_set": native.cpu_isa(), "threads": native.num_threads()}
        return Place(name, torch.device("cpu"), 96 << 20, native.read_bandwidth(), rates, described)
    device = require_cuda()
    on_card = device.type == "cuda"
    rate = device_ceilings.matmul_rate(device)
    # Products of codes are held against the same rate: what they are worth is told by the bfloat16 product that they stand for.
    rates = dict.fromkeys(("int8", "bfloat16", "float32"), rate)
    bandwidth = device_ceilings.copy_bandwidth(device)
    return Place(name, device, 512 << 20 if on_card else 1, bandwidth, rates, device_ceilings.describe(device))
