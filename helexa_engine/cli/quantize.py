"""``helexa quantize SRC DST --type Q4_K_M``: a model as a quantised GGUF file, which llama.cpp reads too."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ..errors import InvalidRequest
from ..quant import mixes
from .loading import progress
from .options import model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="HuggingFace folder, .gguf file, or hub id")
    parser.add_argument("destination", metavar="DST", type=Path, help="the .gguf file to write")
    parser.add_argument(
        "--type", metavar="TYPE", default="Q4_K_M", help=f"one of {', '.join(mixes.MIXES)} [%(default)s]"
    )
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        type=Path,
        help="importance matrix from llama.cpp's llama-imatrix: which columns matter, measured on text",
    )
    parser.add_argument(
        "--allow-requantize", action="store_true", help="take weights that are quantised already, at a loss"
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def run(arguments: argparse.Namespace) -> int:
    destination: Path = arguments.destination.expanduser()
    source = model_path(arguments.source)
    _check_destination(source, destination, force=arguments.force)
    started = time.perf_counter()
    with progress(f"quantising {arguments.source} to {arguments.type.upper()}") as report:
        from ..runtime.quantize_model import quantize_model

        made = quantize_model(
            source,
            destination,
            arguments.type,
            name=Path(arguments.source.partition(":")[0]).expanduser().absolute().name.removesuffix(".gguf"),
            importance_file=arguments.imatrix,
            allow_requantize=arguments.allow_requantize,
            progress=lambda share: report("writing", share),
        )
    kinds = ", ".join(
        f"{kind} {size / made.nbytes:.0%}" for kind, size in made.types.items() if size > made.nbytes / 200
    )
    print(
        f"{made.path}: {made.nbytes / 1e6:.1f} MB, {made.bits_per_weight:.2f} bits a weight ({kinds}), "
        f"{made.parameters / (time.perf_counter() - started) / 1e6:.0f} M weights/s"
    )
    if made.left_out:
        listed = ", ".join(f"{count} {kind} tensors" for kind, count in made.left_out.items())
        print(f"left out: {listed}; the file holds the text model")
    return 0


def _check_destination(source: Path, destination: Path, *, force: bool) -> None:
    """Raises :class:`InvalidRequest` when DST cannot be written or would destroy something."""
    if destination.is_dir():
        raise InvalidRequest("DST", f"{destination} is a folder; name the file to write, ending in .gguf")
    if not destination.parent.is_dir():
        raise InvalidRequest("DST", f"there is no folder {destination.parent}")
    if not os.access(destination.parent, os.W_OK):
        raise InvalidRequest("DST", f"{destination.parent} cannot be written to")
    if not destination.exists():
        return
    if source.exists() and destination.samefile(source):
        raise InvalidRequest("DST", f"{destination} is the source itself; name another file")
    if not force:
        raise InvalidRequest("DST", f"{destination} exists; give --force to replace it")
