"""What this host computes with: its processor, and its NVIDIA cards as the driver's management library tells, without a context."""

from __future__ import annotations

import asyncio
import platform
import time
import typing
from collections.abc import Callable
from typing import Any

from helexa_engine.cli import machine
from helexa_engine.config import EngineConfig
from helexa_engine.runtime import nvml
from helexa_engine.runtime.cuda_facts import Obstacle, build_facts, obstacle, version_text, with_cards

#: A driver that hangs is waited for so long; then the last figures are shown.
PATIENCE_SECONDS = 1.0


def describe() -> dict[str, Any]:
    """Host, devices and driver, and why CUDA cannot be used where it cannot. Waits for the driver; see :class:`Devices`."""
    driver: nvml.Driver | None = None
    cards: list[nvml.Card] = []
    try:
        driver, cards = nvml.read()
    except nvml.NoDriver as error:
        found: Obstacle | None = Obstacle("no_driver", str(error), "models run on the CPU")
    else:
        found = _obstacle(driver, cards)
    return _described(driver, cards, found)


def _obstacle(driver: nvml.Driver, cards: list[nvml.Card]) -> Obstacle | None:
    """As a worker will find it, as far as can be told without a device."""
    if "cuda" not in typing.get_args(typing.get_type_hints(EngineConfig)["device"]):
        return Obstacle(
            "cpu_only", "this build of helexa computes on the processor only", "there is nothing to be done"
        )
    return obstacle(with_cards(build_facts(), driver, cards))


def _described(driver: nvml.Driver | None, cards: list[nvml.Card], found: Obstacle | None) -> dict[str, Any]:
    processor = {
        "kind": "cpu",
        "name": machine.cpu_model(),
        "cpus": machine.usable_cpus(),
        "memory_bytes": machine.memory_bytes(),
    }
    shown = [
        {
            "kind": "cuda",
            "index": card.index,
            "name": card.name,
            "compute_capability": "{}.{}".format(*card.capability),
            "memory_bytes": card.memory_bytes,
            "free_bytes": card.free_bytes,
        }
        for card in cards
    ]
    return {
        "host": {"name": platform.node(), "system": platform.system(), "machine": platform.machine()},
        "devices": [processor, *shown],
        "driver": None if driver is None else {"version": driver.version, "cuda_version": version_text(driver.cuda)},
        "cuda": {"usable": found is None, "reason": None if found is None else str(found)},
    }


class Devices:
    """The last figures of :func:`describe`: who asks never waits long for a driver that hangs."""

    def __init__(self, describe: Callable[[], dict[str, Any]] = describe) -> None:
        self._describe = describe
        self._reading: asyncio.Task[dict[str, Any]] | None = None
        self._last: dict[str, Any] | None = None
        self._read_at = 0.0

    async def figures(self, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Those of now, or after ``patience`` seconds the last ones; ``seconds_old`` says how old they are, None where there are none."""
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._describe))
        reading = self._reading
        await asyncio.wait({reading}, timeout=patience)
        if reading.done():
            self._reading = None
            self._last, self._read_at = reading.result(), time.monotonic()
        if self._last is None:
            silent = Obstacle(
                "no_answer", "the NVIDIA driver does not answer", "nvidia-smi will hang too; restart the machine"
            )
            return _described(None, [], silent) | {"seconds_old": None}
        return self._last | {"seconds_old": round(time.monotonic() - self._read_at, 1)}
