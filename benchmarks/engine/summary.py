"""``python -m benchmarks.engine.summary``: the newest pair of rows of each case, helexa over llama.cpp, and the geometric means.

Pairs stand in ``benchmarks/results/engine.jsonl`` one behind the other. Levels of instruction sets are summed up apart; what ran
beside busy processes is shown and not summed up.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from .__main__ import RESULTS
from .cases import rows_of

Row = dict[str, Any]


def newest_pairs(rows: Iterable[Row], commit: str | None = None) -> list[tuple[Row, Row]]:
    """(ours, the peer's) of each model, lengths and level, the newest of them, of one commit if asked for."""
    pairs: dict[tuple[Any, ...], tuple[Row, Row]] = {}
    for ours, peer in pairwise(rows):
        if ours["engine"] != "helexa" or peer["engine"] == "helexa" or ours["date"] != peer["date"]:
            continue
        if commit is None or str(ours["commit"]).startswith(commit):
            level = ours["machine"]["instruction_set"]
            lengths = (ours["prefill_tokens"], ours["decode_tokens"], ours.get("decode_context", 0))
            key = (level, ours["model"], *lengths, ours.get("busy_processes", 0))
            pairs.pop(key, None)  # a newer one goes to the end
            pairs[key] = (ours, peer)
    return list(pairs.values())


def summary(pairs: list[tuple[Row, Row]]) -> str:
    """A table for people, and below it the geometric mean of the ratios of each level."""
    lines = []
    ratios: dict[str, list[tuple[float, float]]] = {}
    for ours, peer in pairs:
        level = ours["machine"]["instruction_set"]
        prefill, decode = (ours[key] / peer[key] for key in ("prefill_tokens_per_second", "decode_tokens_per_second"))
        busy = ours.get("busy_processes", 0)
        if not busy:
            ratios.setdefault(level, []).append((prefill, decode))
        lines.append(
            f"{level:8} {ours['model']:22} prefill {ours['prefill_tokens']:5}: {ours['prefill_tokens_per_second']:7.1f} {prefill:5.2f}x   "
            f"decode @{ours.get('decode_context', 0):<5} {ours['decode_tokens_per_second']:6.1f} {decode:5.2f}x, "
            f"{ours['decode_share_of_bandwidth']:.0%} of bandwidth   {ours['commit']}"
            + (f"   beside {busy} busy" if busy else "")
        )
    for level, values in ratios.items():
        prefill, decode = (
            math.exp(math.fsum(map(math.log, column)) / len(values)) for column in zip(*values, strict=True)
        )
        least = [min(column) for column in zip(*values, strict=True)]
        lines.append(
            f"{level:8} geometric mean of {len(values)}: prefill {prefill:.2f}x (least {least[0]:.2f}x), "
            f"decode {decode:.2f}x (least {least[1]:.2f}x)"
        )
    return "\n".join(lines)


def below(pairs: list[tuple[Row, Row]], ratio: float) -> str:
    """The pairs whose decode or prefill is under ``ratio``, in Markdown, the least first. ``bound``: the ratio that the bandwidth of our
    run would have let us reach at most."""
    decodes, prefills = [], []
    for ours, peer in pairs:
        if ours.get("busy_processes"):
            continue
        level, context = ours["machine"]["instruction_set"], ours.get("decode_context", 0)
        name = f"{ours['model']}, {level}"
        decode = ours["decode_tokens_per_second"] / peer["decode_tokens_per_second"]
        prefill = ours["prefill_tokens_per_second"] / peer["prefill_tokens_per_second"]
        if decode < ratio:
            share, theirs = ours["decode_share_of_bandwidth"], peer["decode_share_of_bandwidth"]
            bytes_read = ours["decode_bytes_per_token"] + ours.get("decode_kv_bytes_per_token", 0)
            behind = f" behind {context}" if context else f", prompts of {ours['prefill_tokens']}"
            decodes.append((
                decode,
                f"| {name}{behind} | {bytes_read / 1e6:.0f} | {ours['read_bytes_per_second'] / 1e9:.1f} | {share:.0%} | {theirs:.0%} "
                f"| {decode:.2f} | {decode / share:.2f} |",
            ))  # fmt: skip
        if prefill < ratio:
            prefills.append((prefill, f"| {name} | {ours['prefill_tokens']} | {prefill:.2f} |"))
    return "\n".join([
        "| decode | MB a token | GB/s | ours | llama.cpp | ratio | bound |", "|---|---|---|---|---|---|---|",
        *(line for _, line in sorted(decodes)), "",
        "| prefill | tokens | ratio |", "|---|---|---|", *(line for _, line in sorted(prefills)),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.engine.summary", description=__doc__)
    parser.add_argument("--commit", help="of this commit only")
    parser.add_argument("--input", type=Path, default=RESULTS, help="[benchmarks/results/engine.jsonl]")
    parser.add_argument("--below", metavar="RATIO", type=float, help="the pairs under this ratio instead, as a table")
    arguments = parser.parse_args()
    pairs = newest_pairs(rows_of(arguments.input), arguments.commit)
    print(summary(pairs) if arguments.below is None else below(pairs, arguments.below))


if __name__ == "__main__":
    main()
