"""The worker processes of a server, found from outside."""

from __future__ import annotations

import os
from pathlib import Path


def workers_of(parent: int | None = None) -> list[int]:
    """Process ids of the workers that ``parent``, by default this process, has started and that have not been reaped."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just gone
            continue
        is_worker = b"helexa_engine.runtime.worker" in command or state[0] == "Z"
        if is_worker and int(state[1]) == (parent or os.getpid()):
            found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not just its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(") ")[2].split()[0] != "Z"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
