"""``helexa list``: the models on this machine, those of the hub's cache and ``demo``. Reads directories and headers only."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .. import demo, env
from ..weights import hub_cache
from ..weights.hub import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: a JSON array")


def run(arguments: argparse.Namespace) -> int:
    models, others = hub_cache.models()
    rows = [*_demo(demo.path()), *map(_row, models)]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    table = [("MODEL", "SIZE", "LAST USED", "ARCHITECTURE")]
    for row in rows:
        missing = f"  half-downloaded: `helexa pull {row['id']}` goes on" if row["missing"] else ""
        used = time.strftime("%Y-%m-%d", time.localtime(row["last_used"]))
        table.append((row["id"], format_bytes(row["bytes"]), used, row["architecture"] + missing))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print(f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:<{widths[2]}}  {line[3]}")
    if others:
        print(f"\nalso in {env.hub_cache()}, not for helexa or without weights: {', '.join(others)}")
    return 0


def _demo(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    stat = path.stat()
    model = hub_cache.CachedModel(
        id="demo",
        repo="demo",
        file=path.name,
        quant=None,
        architecture=hub_cache.architecture_of(path) or "unknown",
        nbytes=stat.st_size,
        last_used=max(stat.st_atime, stat.st_mtime),
        path=path,
        missing=None,
    )
    return [_row(model)]


def _row(model: hub_cache.CachedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "repo": model.repo,
        "file": model.file,
        "quant": model.quant,
        "architecture": model.architecture,
        "bytes": model.nbytes,
        "last_used": round(model.last_used),
        "path": str(model.path),
        "missing": model.missing,
    }
