"""Loading a model with a progress bar on a terminal and plain lines elsewhere, all on stderr."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..config import EngineConfig
from .options import model_path

if TYPE_CHECKING:
    from ..llm import LLM

#: (what is being done, share of it that is done, 0 to 1)
Progress = Callable[[str, float], None]


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A callback to report to. On a terminal it moves a bar; elsewhere one line says the beginning and one the end."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda stage, fraction: bar.update(task, description=f"{title}: {stage}", completed=fraction)
    else:
        print(title, file=sys.stderr, flush=True)
        yield lambda stage, fraction: None
        print(f"{title}: done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def load(model: str, config: EngineConfig, watch: Progress | None = None) -> Iterator[LLM]:
    """The loaded model; closed on leaving. ``watch`` is told what the bar is. Raises what :class:`LLM` raises."""
    model_path(model, offline=config.offline)  # downloads a hub id, with a bar a file; below it is found on disk
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    with progress(f"loading {model}") as report:
        from ..llm import LLM

        def told(stage: str, fraction: float) -> None:
            report(stage, fraction)
            if watch is not None:
                watch(stage, fraction)

        llm = LLM(model, progress=told, **settings)
    try:
        yield llm
    finally:
        llm.close()
