"""What ``scripts/gpu_check`` does without a card: its stages and their order, going on where it stopped, and its rows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


gpu_check = _load()
Piece = gpu_check.Piece
CARD = {"device": "NVIDIA H200", "capability": [9, 0], "memory_gib": 139.8, "torch": "2.11.0+cu130"}


def piece(key: str, program: str = "pass", seconds: float = 1.0) -> Any:
    return Piece(key, (sys.executable, "-c", program), seconds)


class Machine:
    """A machine with a card whose pieces are little programs that note that they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ran = folder, folder / "ran"
        self.out = folder / "out"
        monkeypatch.setenv("OUT", str(self.out))
        monkeypatch.setattr(gpu_check, "find_card", lambda: CARD)
        monkeypatch.setattr(gpu_check, "install_packages", lambda wheels, target: ["msgspec>=0.19"])
        monkeypatch.setattr(gpu_check, "sources_fingerprint", lambda: self.sources)
        monkeypatch.setattr(gpu_check, "collect", lambda environment: (["tests/native/test_a.py::test_b"], self.broken))
        monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: self.sanitizer)
        for stage, names in {
            "build": ["core"],
            "tests": ["a", "b"],
            "memcheck": ["a"],
            "bench": ["fast", "slow"],
        }.items():
            made = [self.note(f"{stage}/{name}") for name in names]
            monkeypatch.setattr(
                gpu_check, f"{stage}_pieces", lambda *_, made=made: [self.pieces.get(p.key, p) for p in made]
            )
        self.pieces: dict[str, Any] = {}
        self.broken: list[str] = []
        self.sources = "one"
        self.sanitizer: str | None = "compute-sanitizer"

    def note(self, key: str, then: str = "", seconds: float = 1.0) -> Any:
        return piece(key, f"open({str(self.ran)!r}, 'a').write({key!r} + '\\n')\n{then}", seconds)

    def run(self, *arguments: str) -> tuple[int, list[str]]:
        """(status, the pieces that ran)."""
        self.ran.unlink(missing_ok=True)
        code = gpu_check.main([*arguments, "--folder", str(self.folder / "state")])
        return code, self.ran.read_text().split() if self.ran.exists() else []

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "gpu_check.jsonl").read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


ALL = ["build/core", "tests/a", "tests/b", "memcheck/a", "bench/fast", "bench/slow"]


def test_stages_run_in_their_order_and_once(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.run() == (0, ALL)
    said = capsys.readouterr().out
    assert "NVIDIA H200" in said and "not installed" in said and "msgspec>=0.19" in said and "6 passed" in said
    assert machine.run() == (0, [])
    assert [row["piece"] for row in machine.rows()] == ALL
    row = machine.rows()[1]
    assert (
        row["status"] == "passed"
        and row["card"] == CARD
        and row["sources"] == "one"
        and row["date"]
        and row["seconds"] >= 0
    )
    assert machine.run("tests", "--again") == (0, ["tests/a", "tests/b"])
    machine.sources = "two"
    assert machine.run("bench") == (0, ["bench/fast", "bench/slow"]), "changed sources make all anew"


def test_named_stages_run_alone_in_order(machine: Machine) -> None:
    assert machine.run("bench", "build") == (0, ["build/core", "bench/fast", "bench/slow"])


def test_it_goes_on_where_it_stopped(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.pieces["bench/slow"] = machine.note("bench/slow", seconds=1e6)
    assert machine.run("--seconds", "500") == (3, ALL[:-1]), "it would not end in time"
    assert machine.run("--seconds", "500") == (0, ALL[-1:]), "the first of a call is always tried"


def test_what_is_stopped_is_tried_again_unless_it_had_all_the_time(machine: Machine) -> None:
    machine.pieces["bench/slow"] = machine.note("bench/slow", "import time; time.sleep(60)", seconds=0.1)
    assert machine.run("bench", "--seconds", "1.5") == (3, ["bench/fast", "bench/slow"])
    assert machine.run("bench", "--seconds", "1.5") == (1, ["bench/slow"])
    assert machine.rows()[-1]["stopped_after_seconds"] >= 1
    assert machine.run("bench", "--seconds", "1.5") == (1, [])


def test_a_failure_is_told_and_the_others_run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.pieces["tests/a"] = machine.note("tests/a", "print('the last words'); raise SystemExit(4)")
    assert machine.run() == (1, ALL)
    said = capsys.readouterr().out
    assert "the last words" in said and "1 failed, 5 passed: tests/a" in said
    assert machine.rows()[1]["exit_code"] == 4
    assert "the last words" in (machine.out / "logs" / "tests_a.log").read_text()
    assert machine.run("bench") == (0, []) and machine.run() == (1, []), "only the stages that were asked for count"


def test_nothing_runs_without_the_core(machine: Machine) -> None:
    machine.pieces["build/core"] = machine.note("build/core", "raise SystemExit(1)")
    assert machine.run() == (1, ["build/core"])
    assert machine.run("tests") == (1, [])


def test_files_that_cannot_be_imported_fail(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.broken = ["tests/engine/test_llm.py"]
    assert machine.run("tests")[0] == 1
    assert "tests/engine/test_llm.py cannot be imported" in capsys.readouterr().out


def test_without_a_sanitizer_memcheck_is_skipped_aloud(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.sanitizer = None
    assert machine.run("memcheck") == (0, [])
    assert "memcheck is skipped" in capsys.readouterr().out and machine.rows()[-1]["status"] == "skipped"


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["benches"])
    assert caught.value.code == 2 and "build, tests, memcheck, bench" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    command = [ROOT / "scripts" / "gpu_check", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    )
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("gpu_check: no card to check on: torch") and "Nothing was run" in done.stderr


def test_torch_that_is_missing_is_a_reason() -> None:
    assert "cannot be imported" in gpu_check.find_card("/bin/false")


def test_the_core_is_built_for_the_card() -> None:
    assert [gpu_check.architecture_of(c) for c in ([9, 0], [8, 6], [12, 0])] == ["90a", "86", "120"]
    (build,) = gpu_check.build_pieces(Path("build/x"), [9, 0])
    assert build.key == gpu_check.CORE and "-DHELEXA_CUDA_ARCHITECTURES=90a" in build.command[-1]


def test_kernels_are_tested_before_what_stands_on_them() -> None:
    nodes = ["tests/engine/models/test_m.py::a", "tests/engine/ops/test_o.py::a[x::y]", "tests/native/test_n.py::a"]
    pieces = gpu_check.tests_pieces(Path("/f"), [*nodes, "tests/native/test_n.py::b"])
    assert [p.key for p in pieces] == [f"tests/{node.partition('::')[0]}" for node in (nodes[2], nodes[1], nodes[0])]
    assert all("gpu" in p.command and p.junit is not None for p in pieces)


def test_what_runs_on_a_card_is_found_by_asking_pytest(tmp_path: Path) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text("import a_package_that_is_not_here")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    nodes, errors = gpu_check.collect(
        environment, "not gpu", ["tests/native/test_cuda_errors.py", "tests/native/nothing.py"]
    )
    assert nodes == [] and errors == [], "a file that is not there is pytest's error, not a test's"
    nodes, _ = gpu_check.collect(environment, "not gpu", ["tests/native/test_cuda_errors.py", str(broken)])
    assert "tests/native/test_cuda_errors.py::test_some_errors_stick" in nodes
    if not torch.cuda.is_available():
        assert gpu_check.collect(environment, "gpu", ["tests/native/test_cuda_errors.py"]) == ([], [])


def test_some_tests_of_each_kernel_run_under_the_sanitizer() -> None:
    nodes = [f"tests/native/test_n.py::t[{i}]" for i in range(40)] + ["tests/engine/ops/test_o.py::a"]
    (checked,) = gpu_check.memcheck_pieces(Path("/f"), nodes, "/x/compute-sanitizer")
    chosen = [argument for argument in checked.command if "::" in argument]
    assert chosen == [nodes[i] for i in (0, 10, 20, 30)] and "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in checked.command


def test_benchmarks_are_those_with_goals_and_their_modules_take_the_options(tmp_path: Path) -> None:
    from benchmarks.engine.cases import ON_CARD

    pieces = gpu_check.bench_pieces(tmp_path)
    keys = [p.key for p in pieces]
    assert len(set(keys)) == len(keys) and set(keys) >= {f"bench/{case.name}" for case in ON_CARD}
    assert keys[0] == "bench/qwen3.5-4b Q4_K_M" and all(p.seconds < 570 for p in pieces)
    for p in pieces:
        module = ROOT.joinpath(*p.command[2].split("."))
        assert module.is_dir() or module.with_suffix(".py").is_file()
        text = (module / "__main__.py" if module.is_dir() else module.with_suffix(".py")).read_text()
        for option in (argument for argument in p.command[3:] if argument.startswith("--")):
            assert f'"{option}"' in text or (option in ("--json", "--device") and "add_arguments(parser)" in text), (
                option
            )


def test_missing_and_old_packages_are_found() -> None:
    installed = {"torch": "2.11.0+cu130", "numpy": "1.25.2", "rich": "13.1"}

    def version_of(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    wanted = ["torch>=2.9", "numpy>=1.26", "rich>=13", "msgspec>=0.19"]
    assert gpu_check.lacking(wanted, version_of) == ["numpy>=1.26", "msgspec>=0.19"]
    assert any(requirement.startswith("llguidance") for requirement in gpu_check.requirements())


def test_packages_that_are_there_need_no_wheels(tmp_path: Path) -> None:
    assert gpu_check.install_packages(tmp_path / "wheels", tmp_path / "packages") == []


def test_outcomes_of_tests_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "o.xml"
    file.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
        '<testcase name="bad"><failure/></testcase><testcase name="not"><skipped/></testcase></testsuite></testsuites>'
    )
    found = gpu_check.tests_of(file)
    assert found == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["bad"]}
    assert gpu_check.summary(found) == "(3 tests, 1 failed, 1 skipped)"


def test_the_state_is_of_these_sources_and_survives_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    state = gpu_check.State(path, "a")
    state.note("tests/x", gpu_check.Outcome("failed", 2.0))
    assert gpu_check.State(path, "a").failed() == ["tests/x"] and not gpu_check.State(path, "b").is_done("tests/x")
    path.write_text("{")
    assert gpu_check.State(path, "a").pieces == {}


def test_sources_change_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("x")
    (tmp_path / "csrc" / "a.cu").write_text("one")
    before = gpu_check.sources_fingerprint(tmp_path)
    (tmp_path / "csrc" / "a.cu").write_text("two")
    assert gpu_check.sources_fingerprint(tmp_path) != before
