"""Registers, shared memory and spills of every CUDA kernel, as ptxas reported them when it was built.

    python scripts/cuda_resources.py            compares with csrc/cuda/resources.json; fails on a difference or a spill
    python scripts/cuda_resources.py --write    writes the table, to be read in review

The logs are what the build leaves in build/cuda. A kernel's row holds the most that any of its instantiations takes on each
architecture. Another version of nvcc may count other registers: then only spills fail.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc" / "cuda" / "resources.json"
LOGS = ROOT / "build" / "cuda"

#: {kernel: {architecture: [registers, bytes of static shared memory]}}
Resources = dict[str, dict[str, list[int]]]

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def kernel_name(mangled: str) -> str:
    """The plain name in a mangled one: the last of its nested names. Template arguments are left out."""
    names, rest = [], mangled.removeprefix("_ZN")
    while (length := re.match(r"\d+", rest)) is not None:
        start, size = length.end(), int(length[0])
        names.append(rest[start : start + size])
        rest = rest[start + size :]
    return names[-1] if names else mangled


def read_log(text: str) -> tuple[Resources, list[str]]:
    """What a log says of its kernels, and a line for each that spills or keeps arrays in local memory."""
    resources: Resources = {}
    faults: list[str] = []
    name = architecture = ""
    for line in text.splitlines():
        if (entry := _ENTRY.search(line)) is not None:
            name, architecture = kernel_name(entry[1]), entry[2]
        elif (spills := _SPILLS.search(line)) is not None and any(int(n) for n in spills.groups()):
            faults.append(f"{name} on {architecture}: {spills[0]}")
        elif (used := _USED.search(line)) is not None:
            shared = _SHARED.search(line)
            row = resources.setdefault(name, {}).setdefault(architecture, [0, 0])
            row[0] = max(row[0], int(used[1]))
            row[1] = max(row[1], int(shared[1]) if shared else 0)
    return resources, faults


def read_logs(folder: Path = LOGS) -> tuple[dict[str, Resources], list[str]]:
    """All sources of a build, by name."""
    sources, faults = {}, []
    for log in sorted(folder.glob("*.ptxas.log")):
        sources[log.name.split(".")[0]], found = read_log(log.read_text(encoding="utf-8"))
        faults += found
    return sources, faults


def compiler(folder: Path = LOGS) -> str:
    """The version of nvcc that built the logs."""
    return (folder / "nvcc_version").read_text(encoding="utf-8").strip()


def differences(table: dict[str, Resources], built: dict[str, Resources]) -> list[str]:
    """A line for each kernel and architecture whose figures are not the table's."""
    lines = []
    for source in sorted({*table, *built}):
        for kernel in sorted({*table.get(source, {}), *built.get(source, {})}):
            was, now = table.get(source, {}).get(kernel, {}), built.get(source, {}).get(kernel, {})
            lines += [
                f"{source}.cu: {kernel} on {a}: [registers, shared bytes] {was.get(a, 'absent')} in the table, {now.get(a, 'absent')} built"
                for a in sorted({*was, *now})
                if was.get(a) != now.get(a)
            ]
    return lines


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    built, faults = read_logs()
    if not built:
        print(f"no logs in {LOGS}: build with nvcc first", file=sys.stderr)
        return 2
    if arguments:
        table = {"nvcc": compiler(), "kernels": built}
        text = json.dumps(table, indent=1)
        text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
        TABLE.write_text(text + "\n", encoding="utf-8")
    else:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        if table["nvcc"] == compiler():
            faults += differences(table["kernels"], built)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
