"""Builds, tests, checks and measures on a machine with a card: ``scripts/gpu_check [STAGE ...] [--seconds N]``.

Stages: ``build`` (the core, for this card), ``tests`` (``pytest -m gpu``, a file at a time), ``memcheck`` (some of them under
compute-sanitizer), ``bench`` (what goals are set for, what says most first). A stage is cut into pieces. What a piece gave is written as
soon as it has ended: rows into ``benchmarks/results/gpu/`` or, where that is set, into the folder ``$OUT``; what is done into
``build/gpu_check/state.json``. So it may be stopped at any time and goes on where it was; changed sources make it begin anew.

It needs a Python with torch for CUDA, and nvcc, CMake and a C++ compiler; no network. Packages that are missing are installed from
``./wheels`` into ``build/gpu_check/packages``, and named where they are not there either.

Status: 0 all is done and well; 1 something failed; 2 there is no card; 3 the time was over, run the same again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "tests", "memcheck", "bench")
DONE, FAILED, NO_CARD, LEFT = 0, 1, 2, 3

#: What the tests need besides what helexa needs.
TEST_PACKAGES = ("pytest>=8", "hypothesis>=6.100", "pybind11>=2.13")

#: Tests of each file that run under compute-sanitizer, which makes them ten to a hundred times slower.
MEMCHECK_TESTS = 4

#: What all else depends on: its failure ends the run.
CORE = "build/core"


@dataclass(frozen=True)
class Piece:
    """What is done in one go.

    Attributes:
        key: ``stage/name``.
        command: run in the repository's root; a file name in it is not quoted.
        seconds: how long it probably takes.
        junit: where the tests' outcome is written, if there is any.
    """

    key: str
    command: tuple[str, ...]
    seconds: float
    junit: Path | None = None

    @property
    def stage(self) -> str:
        return self.key.partition("/")[0]


@dataclass
class Outcome:
    """How a piece ended: ``passed``, ``failed``, ``skipped``, or ``stopped`` when the time was over."""

    status: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class State:
    """Which pieces are done, in a file that is whole at any time; of these sources only."""

    def __init__(self, path: Path, sources: str) -> None:
        self._path = path
        self._sources = sources
        self.pieces: dict[str, dict[str, Any]] = {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if known.get("sources") == sources:
            self.pieces = known["pieces"]

    def is_done(self, key: str) -> bool:
        """A piece that failed is done too: it is run again when its stage is named with ``--again``, or the sources change."""
        return key in self.pieces

    def note(self, key: str, outcome: Outcome) -> None:
        self.pieces[key] = {"status": outcome.status, "seconds": round(outcome.seconds, 1)}
        self._write()

    def forget(self, stages: Sequence[str]) -> None:
        self.pieces = {key: value for key, value in self.pieces.items() if key.partition("/")[0] not in stages}
        self._write()

    def failed(self) -> list[str]:
        return [key for key, value in self.pieces.items() if value["status"] == "failed"]

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"sources": self._sources, "pieces": self.pieces}, indent=1), encoding="utf-8")
        os.replace(partial, self._path)


def sources_fingerprint(root: Path = ROOT) -> str:
    """Of what is built, tested and measured."""
    digest = hashlib.sha256()
    for folder in ("csrc", "helexa_engine", "tests", "benchmarks", "scripts"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".json") and "results" not in path.parts:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    digest.update((root / "CMakeLists.txt").read_bytes())
    return digest.hexdigest()[:16]


# -- What the machine has


CARD_PROGRAM = """
import json, torch
facts = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "usable": torch.cuda.is_available()}
if facts["usable"]:
    p = torch.cuda.get_device_properties(0)
    facts |= {"device": p.name, "capability": [p.major, p.minor], "memory_gib": round(p.total_memory / 2**30, 1)}
print(json.dumps(facts))
"""


def find_card(python: str = sys.executable) -> dict[str, Any] | str:
    """What is known of the card, or why there is none to be used."""
    asked = subprocess.run([python, "-c", CARD_PROGRAM], capture_output=True, text=True)
    if asked.returncode:
        return f"torch cannot be imported by {python}: {(asked.stderr.strip().splitlines() or ['?'])[-1]}"
    facts: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    if facts["usable"]:
        return facts
    if facts["torch_cuda"] is None:
        return f"torch {facts['torch']} of {python} is built without CUDA"
    return f"torch {facts['torch']} sees no CUDA device: no card, no driver, or CUDA_VISIBLE_DEVICES hides it"


def architecture_of(capability: Sequence[int]) -> str:
    """What nvcc is asked to build for a card: ``90a`` where the kernels use what only that has."""
    name = "".join(map(str, capability))
    return "90a" if name == "90" else name


def requirements(root: Path = ROOT) -> list[str]:
    """``name>=version`` of every package that the tests and benchmarks need."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *TEST_PACKAGES]


def lacking(wanted: Sequence[str], version_of: Callable[[str], str]) -> list[str]:
    """Those of ``wanted`` that are not installed, or too old. ``version_of`` raises PackageNotFoundError."""
    found = []
    for requirement in wanted:
        name, _, oldest = requirement.partition(">=")
        try:
            if numbers(version_of(name)) < numbers(oldest):
                found.append(requirement)
        except importlib.metadata.PackageNotFoundError:
            found.append(requirement)
    return found


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cu130`` as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def install_packages(wheels: Path, target: Path) -> list[str]:
    """Installs what is missing from ``wheels``, which need not be there; returns what is missing still."""
    path = [str(target), *sys.path]

    def version_of(name: str) -> str:
        for distribution in importlib.metadata.distributions(name=name, path=path):
            return distribution.version
        raise importlib.metadata.PackageNotFoundError(name)

    missing = lacking(requirements(), version_of)
    files = sorted(wheels.glob("*.whl"))
    if missing and files:
        # All of them: a missing package may need others that are only there. What is there already is not replaced.
        names = {file.name.partition("-")[0].replace("_", "-").lower(): file for file in files}
        wanted = {re.sub(r"[-_.]+", "-", requirement.partition(">=")[0]).lower() for requirement in missing}
        chosen = []
        for name, file in names.items():
            try:
                version_of(name)
                if name not in wanted:
                    continue
            except importlib.metadata.PackageNotFoundError:
                pass
            chosen.append(str(file))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(target), *chosen], check=False)
        missing = lacking(requirements(), version_of)
    return missing


# -- The pieces of each stage


def build_pieces(folder: Path, capability: Sequence[int]) -> list[Piece]:
    configure = (
        f"cmake $(command -v ninja >/dev/null && echo -G Ninja) -S . -B {folder}/native -DHELEXA_CUDA=ON "
        f"-DHELEXA_CUDA_ARCHITECTURES={architecture_of(capability)} -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/helexa_engine "
        f"-DPython_EXECUTABLE={sys.executable} -Dpybind11_DIR=$({sys.executable} -m pybind11 --cmakedir)"
    )
    build = f"cmake --build {folder}/native --parallel $(nproc) --target _native"
    works = (
        f"{sys.executable} -c 'from helexa_engine import _native as n; print(n.cuda.architectures, n.cuda.devices())'"
    )
    script = f"export PATH=$PATH:/usr/local/cuda/bin; {configure} && {build} && {works}"
    return [Piece(CORE, ("bash", "-c", script), 300)]


def tests_pieces(folder: Path, collected: Sequence[str]) -> list[Piece]:
    """A piece for each file; kernels first, then ops, then the rest: what fails below makes all above it fail."""
    files = sorted({node.partition("::")[0] for node in collected}, key=lambda name: (_rank(name), name))
    pieces = []
    for name in files:
        junit = folder / "junit" / f"{Path(name).stem}.xml"
        options = ("--tb=short", "-p", "no:cacheprovider", "--maxfail=30", f"--junitxml={junit}")
        pieces.append(Piece(f"tests/{name}", (sys.executable, "-m", "pytest", "-m", "gpu", *options, name), 60, junit))
    return pieces


def _rank(name: str) -> int:
    return next((i for i, part in enumerate(("tests/native", "/ops/", "/layers/")) if part in name), 3)


def memcheck_pieces(folder: Path, collected: Sequence[str], sanitizer: str) -> list[Piece]:
    """Some tests of every file of kernels, spread over the file."""
    by_file: dict[str, list[str]] = {}
    for node in collected:
        if node.startswith("tests/native/"):
            by_file.setdefault(node.partition("::")[0], []).append(node)
    pieces = []
    for name, nodes in sorted(by_file.items()):
        step = max(1, len(nodes) // MEMCHECK_TESTS)
        junit = folder / "junit" / f"memcheck-{Path(name).stem}.xml"
        # torch's allocator hands out parts of larger pieces, so that what lies behind a tensor is another: not here.
        memcheck = ("--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all")
        tool = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, *memcheck)
        test = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}")
        pieces.append(Piece(f"memcheck/{name}", (*tool, *test, *nodes[::step][:MEMCHECK_TESTS]), 120, junit))
    return pieces


def bench_pieces(results: Path) -> list[Piece]:
    """What says most first: rows that have goals, Q4_K_M before the rest, and the kernels alone between."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.engine.cases import ON_CARD

    def engine(case: Any) -> Piece:
        lengths = [case.prompt_tokens, *case.more_prompts]
        options = [
            "--preset",
            case.preset,
            "--quant",
            case.quant,
            "--decode-tokens",
            case.decode_tokens,
            "--repetitions",
            3,
        ]
        return run("engine", case.name, 150 if "27b" in case.preset or "35b" in case.preset else 75, [
            *options, "--prompt-tokens", *lengths, "--output", results / "engine.jsonl",
        ])  # fmt: skip

    def run(module: str, name: str, seconds: float, options: Sequence[Any]) -> Piece:
        command = (sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda", *map(str, options))
        return Piece(f"bench/{name}", command, seconds)

    def op(name: str, case: str, options: Sequence[Any], seconds: float = 40) -> Piece:
        return run(f"ops.{name}", f"{name} {case}", seconds, [*options, "--json", results / f"{name}.jsonl"])

    rows = {quant: [engine(case) for case in ON_CARD if case.quant == quant] for quant in ("Q4_K_M", "Q8_0", "BF16")}
    together = ["--sequences", 1, 4, 8, 32, "--output", results / "aggregate.jsonl"]
    ops = [
        op(
            "quant_matmul",
            "decode",
            ["--rows", 1, 4, "--shape", "9216x2560", "--types", "Q4_K", "Q6_K", "Q8_0", "BF16"],
        ),
        op("paged_attention", "decode", ["--heads", "16x4x256", "--tokens", 1, "--context", 4096, 32768]),
        op("gated_delta_rule", "step", ["--heads", 16, 32, "--tokens", 1]),
        op("gated_delta_rule", "prompt", ["--heads", 16, 32, "--tokens", 2048, 8192]),
        op(
            "quant_matmul",
            "prompt",
            ["--rows", 64, 512, 4096, "--shape", "9216x2560", "--types", "Q4_K", "Q8_0", "BF16"],
        ),
        op(
            "moe_matmul",
            "of 35b-a3b",
            ["--experts", 256, "--top-k", 8, "--width", 512, "--shared-width", 512, "--rows", 1, 8, 512],
            60,
        ),
        op("sample", "of a step", ["--rows", 1, 32, "--vocabulary", 151936, 248320]),
        op("paged_attention", "prompt", ["--heads", "16x4x256", "--tokens", 2048, "--context", 2048, 16384]),
    ]
    aggregate = [
        run("engine.aggregate", f"{name} together", 90, ["--preset", name, "--quant", "Q4_K_M", *together])
        for name in ("qwen3.5-4b", "qwen3-8b")
    ]
    first = ON_CARD[0]
    load = run("engine", f"{first.name} from a file", 120, [
        "--preset", first.preset, "--quant", first.quant, "--preset-folder", ROOT / "build" / "gpu_check" / "presets",
        "--repetitions", 1, "--decode-tokens", 16, "--output", results / "engine.jsonl",
    ])  # fmt: skip
    prefix = run("engine.prefix", "prefixes", 60, [
        "--preset", "qwen3.5-4b", "qwen3-8b", "--quant", "Q4_K_M", "--output", results / "prefix.jsonl",
    ])  # fmt: skip
    # To be copied to helexa_engine/ops/gated_delta_rule/tuning.json by hand: here it would change what is measured.
    tiles = run("ops.gated_delta_rule", "tiles of the delta rule", 400, [
        "--heads", 16, 32, "--tune", "--table", results / "gated_delta_tuning.json",
    ])  # fmt: skip
    return [*rows["Q4_K_M"], *ops, *aggregate, load, prefix, *rows["Q8_0"], *rows["BF16"], tiles]


def collect(
    environment: dict[str, str], expression: str = "gpu", paths: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """(the tests that run on a card, the files that cannot be imported)."""
    # The project's own options make the list shorter than a name a line.
    options = ("-o", "addopts=--strict-markers", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    command = [sys.executable, "-m", "pytest", "-m", expression, "--collect-only", *options, *paths]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    return re.findall(r"^(tests/\S+::.*)$", said, re.MULTILINE), re.findall(r"^ERROR (tests/\S+)", said, re.MULTILINE)


# -- Running them


def run_piece(piece: Piece, environment: dict[str, str], log: Path, seconds: float) -> Outcome:
    """Runs it for at most ``seconds``; what it says goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if piece.junit is not None:
        piece.junit.parent.mkdir(parents=True, exist_ok=True)
        piece.junit.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            piece.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            return Outcome("stopped", time.monotonic() - started)
    facts: dict[str, Any] = {"exit_code": code}
    if piece.junit is not None and piece.junit.exists():
        facts |= tests_of(piece.junit)
    return Outcome("passed" if code == 0 else "failed", time.monotonic() - started, facts)


def tests_of(junit: Path) -> dict[str, Any]:
    """Counts of a file of test outcomes, and the names of those that failed."""
    suites = xml.etree.ElementTree.parse(junit).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failed = []
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        failed += [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    return {**counts, "failed": failed[:30]}


class Run:
    """One call of the script."""

    def __init__(self, folder: Path, results: Path, state: State, seconds: float, card: dict[str, Any]) -> None:
        self.state = state
        self.results = results
        self._folder = folder
        self._deadline = time.monotonic() + seconds
        self._card = card
        self._has_run = False
        self.environment = dict(os.environ)
        self.environment["PYTHONPATH"] = os.pathsep.join(
            [str(folder / "packages"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)

    def take(self, pieces: Sequence[Piece]) -> bool:
        """Runs what is not done yet; False when the time was over before all was."""
        for piece in pieces:
            if self.state.is_done(piece.key):
                continue
            left = self._deadline - time.monotonic()
            if left <= 0 or (self._has_run and left < piece.seconds):
                return False
            log = self._folder / "logs" / (re.sub(r"[^\w.-]+", "_", piece.key) + ".log")
            is_first, self._has_run = not self._has_run, True
            print(f"{piece.key} ...", end=" ", flush=True)
            outcome = run_piece(piece, self.environment, log, left)
            if outcome.status == "stopped":
                if not is_first:  # it has its chance in the next call
                    print("stopped: the time is over", flush=True)
                    return False
                outcome = Outcome("failed", outcome.seconds, {"stopped_after_seconds": round(outcome.seconds)})
            self.write(piece.key, outcome)
            print(f"{outcome.status} in {outcome.seconds:.1f} s {summary(outcome.facts)}", flush=True)
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()
            if outcome.status == "failed":
                print("\n".join(f"    {line}" for line in said[-25:]), flush=True)
                kept = self.results / "logs" / log.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, kept)
                if piece.key == CORE:
                    return True
            elif piece.stage == "bench":
                print("\n".join(f"    {line}" for line in said[-12:]), flush=True)
        return True

    def write(self, key: str, outcome: Outcome) -> None:
        """Notes the piece, and appends its row to the results."""
        row = {
            "benchmark": "gpu_check",
            "piece": key,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sources": self.state._sources,
            "card": self._card,
            **outcome.facts,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        with (self.results / "gpu_check.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.state.note(key, outcome)


def summary(facts: dict[str, Any]) -> str:
    if "tests" not in facts:
        return ""
    return f"({facts['tests']} tests, {facts['failures'] + facts['errors']} failed, {facts['skipped']} skipped)"


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("stages", metavar="STAGE", nargs="*", help=f"of {', '.join(STAGES)} [all]")
    parser.add_argument("--seconds", type=float, default=570.0, help="of this call; the next one goes on [570]")
    parser.add_argument("--again", action="store_true", help="forget what is done of these stages")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu_check", help="[build/gpu_check]")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="packages to install from [wheels]")
    given = parser.parse_args(arguments)
    for stage in given.stages:
        if stage not in STAGES:
            parser.error(f"argument STAGE: expected some of {', '.join(STAGES)}, got {stage!r}")
    stages = [stage for stage in STAGES if stage in given.stages] or list(STAGES)
    card = find_card()
    if isinstance(card, str):
        print(f"gpu_check: no card to check on: {card}. Nothing was run.", file=sys.stderr)
        return NO_CARD
    results = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")
    state = State(given.folder / "state.json", sources_fingerprint())
    if given.again:
        state.forget(stages)
    print(
        f"gpu_check: {card['device']}, {card['memory_gib']} GiB, torch {card['torch']}; rows go to {results}",
        flush=True,
    )
    missing = install_packages(given.wheels, given.folder / "packages")
    if missing:
        print(
            f"gpu_check: not installed, and not in {given.wheels}: {', '.join(missing)}; what needs them fails",
            flush=True,
        )
    run = Run(given.folder, results, state, given.seconds, card)
    code = run_stages(run, stages, given.folder, card)
    print(f"gpu_check: {counts(state)}", flush=True)
    return code


def run_stages(run: Run, stages: Sequence[str], folder: Path, card: dict[str, Any]) -> int:
    """The stages in their order, as far as the time allows."""
    state = run.state
    if "build" in stages and not run.take(build_pieces(folder, card["capability"])):
        return LEFT
    if CORE in state.failed():
        print("gpu_check: the core was not built, so nothing else is run", flush=True)
        return FAILED
    collected: list[str] = []
    if "tests" in stages or "memcheck" in stages:
        collected, broken = collect(run.environment)
        print(f"gpu_check: {len(collected)} tests run on a card", flush=True)
        for name in broken:
            print(f"gpu_check: {name} cannot be imported, so its tests are not run", flush=True)
            if not state.is_done(f"tests/{name}"):
                run.write(f"tests/{name}", Outcome("failed", 0.0, {"cannot_be_imported": True}))
    if "tests" in stages and not run.take(tests_pieces(folder, collected)):
        return LEFT
    if "memcheck" in stages:
        sanitizer = find_sanitizer()
        if sanitizer is None:
            print("gpu_check: compute-sanitizer is not here, so memcheck is skipped", flush=True)
            if not state.is_done("memcheck/all"):
                run.write("memcheck/all", Outcome("skipped", 0.0, {"why": "no compute-sanitizer"}))
        elif not run.take(memcheck_pieces(folder, collected, sanitizer)):
            return LEFT
    if "bench" in stages and not run.take(bench_pieces(run.results)):
        return LEFT
    return FAILED if any(key.partition("/")[0] in stages for key in state.failed()) else DONE


def counts(state: State) -> str:
    """``12 passed, 1 failed: tests/...``."""
    by_status: dict[str, int] = {}
    for value in state.pieces.values():
        by_status[value["status"]] = by_status.get(value["status"], 0) + 1
    said = ", ".join(f"{number} {status}" for status, number in sorted(by_status.items())) or "nothing is done"
    failed = state.failed()
    return said + (f": {', '.join(failed)}" if failed else "")


if __name__ == "__main__":
    sys.exit(main())
