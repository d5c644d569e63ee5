"""Error and speed of the quantisers on seeded tensors, beside ggml's own where its library is given: one JSON row a type.

    python -m benchmarks.ops.quantize --peer-libggml PATH/libggml-base.so

``errors`` are relative root mean square errors: sqrt(sum w (x - decoded)^2 / sum w x^2), the weights ``w`` 1 or, under
``<tensor>+imatrix``, the importances that both quantisers are given. The two decode with the same decoder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helexa_engine.cli import machine
from helexa_engine.ops.quantize import native
from helexa_engine.ops.registry import require_native
from helexa_engine.quant import types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.quant.quantize import QUANTISABLE
from helexa_engine.quant.types import QuantType

ROWS, COLS = 128, 2048
SPEED_ROWS = 2048
TYPES = tuple(t for t in QUANTISABLE if t.is_quantised)
Encode = Callable[[np.ndarray, QuantType, "np.ndarray | None"], np.ndarray]


def tensors() -> dict[str, np.ndarray]:
    """Seeded float32 matrices [ROWS, COLS]: normal values, heavy tails (Student's t with 3 degrees of freedom), normal
    values with a hundredth of the columns 20 times larger, and a different size for each column.
    """
    rng = np.random.default_rng(20)
    shape = (ROWS, COLS)
    outlier = rng.standard_normal(shape)
    outlier[:, rng.choice(COLS, COLS // 100, replace=False)] *= 20
    made = {
        "normal": rng.standard_normal(shape),
        "student": rng.standard_t(3, shape),
        "outlier": outlier,
        "columns": rng.standard_normal(shape) * np.exp(rng.standard_normal(COLS)),
    }
    return {name: (0.02 * values).astype(np.float32) for name, values in made.items()}


def importances() -> np.ndarray:
    """[COLS] float32, log-normal over two orders of magnitude as mean squares of activations are."""
    return np.exp(1.5 * np.random.default_rng(21).standard_normal(COLS)).astype(np.float32)


def relative_error(values: np.ndarray, decoded: np.ndarray, weights: np.ndarray | None) -> float:
    w = np.ones(values.shape[-1]) if weights is None else weights.astype(np.float64)
    difference = values.astype(np.float64) - decoded
    return float(np.sqrt((w * difference**2).sum() / (w * values.astype(np.float64) ** 2).sum()))


def errors(encode: Encode, quant_type: QuantType) -> dict[str, float]:
    """Relative error on each tensor, without and with importances."""
    found = {}
    for name, values in tensors().items():
        for suffix, weights in (("", None), ("+imatrix", importances())):
            decoded = dequantize(quant_type, encode(values, quant_type, weights), values.shape)
            found[name + suffix] = relative_error(values, decoded, weights)
    return found


def peer_encoder(library: Path) -> Encode:
    """``ggml_quantize_chunk`` of a libggml-base, on the calling thread."""
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def encode(values: np.ndarray, quant_type: QuantType, weights: np.ndarray | None) -> np.ndarray:
        rows, cols = values.shape
        out = np.empty((rows, quant_type.row_bytes(cols)), dtype=np.uint8)
        importance = None if weights is None else weights.ctypes.data
        written = chunk(quant_type.number, values.ctypes.data, out.ctypes.data, 0, rows, cols, importance)
        if written != out.nbytes:
            raise RuntimeError(f"the peer wrote {written} bytes of {quant_type}, not {out.nbytes}")
        return out

    return encode


def weights_per_second(encode: Encode, quant_type: QuantType, rows: int, repeats: int) -> float:
    """Of the fastest of some runs."""
    values = np.random.default_rng(0).standard_normal((rows, COLS), dtype=np.float32)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        encode(values, quant_type, None)
        seconds.append(time.perf_counter() - start)
    return values.size / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[t.name for t in TYPES], metavar="TYPE")
    parser.add_argument("--peer-libggml", type=Path, help="a libggml-base to measure beside; it runs on one thread")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    core = require_native()
    peer = peer_encoder(arguments.peer_libggml) if arguments.peer_libggml else None
    for name in arguments.types:
        quant_type = types.by_name(name)
        if quant_type not in TYPES:
            parser.error(f"argument --types: there is no quantiser for {name!r}")
        ours = errors(native.quantize, quant_type)
        row: dict[str, Any] = {
            "benchmark": "quantize",
            "type": name,
            **machine.stamp(),
            "instruction_set": core.cpu_isa(),
            "threads": core.num_threads(),
            "weights_per_second": weights_per_second(native.quantize, quant_type, SPEED_ROWS, arguments.repeats),
            "errors": ours,
        }
        if peer is not None:
            theirs = errors(peer, quant_type)
            row["peer_errors"] = theirs
            row["peer_weights_per_second_one_thread"] = weights_per_second(peer, quant_type, SPEED_ROWS // 8, 1)
            row["error_ratios"] = {key: ours[key] / theirs[key] for key in ours}
            row["largest_error_ratio"] = max(row["error_ratios"].values())
        line = json.dumps(_rounded(row))
        print(line, flush=True)
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
