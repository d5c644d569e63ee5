"""Other work on the machine while a model is measured: processes that compute without a pause, where the system puts them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Meanwhile ``count`` processes compute, each as long as it is let."""
    processes = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)  # before the process's own exit, which waits for it
            processes.append(process)
        yield processes
