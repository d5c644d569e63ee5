"""How a download looks: a bar a file on a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..weights.hub import OnTransfer, Transfer, format_bytes

#: Between two lines about one file where there is no terminal.
LINE_SECONDS = 30.0


@contextmanager
def bars() -> Iterator[OnTransfer]:
    """What to hand to :func:`helexa_engine.weights.hub.locate` or ``download``; nothing shows before the first file begins."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    progress = Progress(*columns, console=Console(stderr=True))

    def move(transfer: Transfer) -> None:
        progress.start()
        if transfer.file not in tasks:
            tasks[transfer.file] = progress.add_task(transfer.file, total=transfer.total_bytes)
        progress.update(tasks[transfer.file], completed=transfer.done_bytes, total=transfer.total_bytes)

    try:
        yield move
    finally:
        if tasks:
            progress.stop()


class _Lines:
    """One line when a file begins, one every :data:`LINE_SECONDS`, one when it is complete; none for a file that was there."""

    def __init__(self) -> None:
        self._file: str | None = None
        self._next_line = 0.0

    def __call__(self, transfer: Transfer) -> None:
        complete = transfer.done_bytes == transfer.total_bytes
        total = format_bytes(transfer.total_bytes)
        if transfer.file != self._file:
            if complete:
                return
            self._file = transfer.file
            self._next_line = time.monotonic() + LINE_SECONDS
            resumed = f", going on at {format_bytes(transfer.done_bytes)}" if transfer.done_bytes else ""
            self._print(f"downloading {transfer.file} ({total}{resumed})")
        elif complete:
            self._file = None
            self._print(f"downloaded {transfer.file} ({total})")
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            share = 100 * transfer.done_bytes // transfer.total_bytes
            self._print(f"downloading {transfer.file}: {format_bytes(transfer.done_bytes)} of {total}, {share} %")

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
