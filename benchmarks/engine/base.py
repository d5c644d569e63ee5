"""Two commits timed in turn, so that what the machine does meanwhile happens to both."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RATES = {"prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}


@contextmanager
def built(revision: str) -> Iterator[Path]:
    """A work tree of ``revision`` with its core built, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="helexa-base-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            environment = os.environ | {"PYTHON": sys.executable}
            subprocess.run(["scripts/build_native"], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(revision: str, model: Path, options: list[str], turns: int) -> str:
    """Median rates of ``revision`` and of this tree over ``turns`` runs of each, and this tree over that."""
    samples: dict[str, list[dict[str, Any]]] = {"base": [], "here": []}
    with built(revision) as tree:
        for turn in range(turns):
            trees = {"base": tree, "here": ROOT}
            for name in sorted(trees, reverse=turn % 2 == 1):  # who goes first changes
                samples[name].append(_bench(trees[name], model, options))
    lines = []
    for phase, key in RATES.items():
        base, here = ([row[key] for row in samples[name]] for name in ("base", "here"))
        ratios = sorted(new / old for old, new in zip(base, here, strict=True))
        lines.append(
            f"{phase:>12}  {revision} {statistics.median(base):.1f} tokens/s, here {statistics.median(here):.1f}: "
            f"{statistics.median(ratios):.3f}x ({ratios[0]:.3f} to {ratios[-1]:.3f} over {turns} turns)"
        )
    return "\n".join(lines)


def _bench(tree: Path, model: Path, options: list[str]) -> dict[str, Any]:
    """The row of one ``helexa bench`` in ``tree``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.jsonl"
        command = [sys.executable, "-m", "helexa_engine", "bench", str(model), *options, "--json", str(output)]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
        row: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return row
