"""Energy that this machine's processors have taken, as the kernel's powercap interface counts it (Intel's and AMD's RAPL).

Source: https://www.kernel.org/doc/html/latest/power/powercap/powercap.html. The counters are usually readable by root alone; what
cannot be read is left out, because zero would be a figure.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@dataclass
class _Zone:
    """One package: its counter as last read and how often that wrapped."""

    counter: Path
    range_microjoules: int
    last: int = 0
    wrapped: int = 0

    def joules(self) -> float | None:
        try:
            now = int(self.counter.read_text())
        except (OSError, ValueError):
            return None
        if now < self.last:
            self.wrapped += 1
        self.last = now
        return (self.wrapped * self.range_microjoules + now) / 1e6


class EnergyMeter:
    """The packages (and, where the processor has one, the ``psys`` zone of the whole board) that can be read.

    A counter wraps after some ten thousand joules and more; a wrap is seen when two readings are less than that apart.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._zones: dict[str, _Zone] = {}
        self._lock = threading.Lock()
        for zone in sorted(folder.glob("*-rapl:*")):
            if zone.name.count(":") != 1:
                continue  # cores and memory, which their package counts already
            try:
                name = (zone / "name").read_text().strip()
                found = _Zone(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            except (OSError, ValueError):
                continue
            if found.joules() is not None:
                self._zones[name] = found

    def joules(self) -> Mapping[str, float]:
        """By zone (``package-0``), since some moment before this server began; only what can be read."""
        with self._lock:
            read = {name: zone.joules() for name, zone in self._zones.items()}
        return {name: joules for name, joules in read.items() if joules is not None}
