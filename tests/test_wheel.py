"""The wheel, built without a compiler: what is in it, and that it runs where nothing else of helexa is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 12_000_000


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the wheel of a copy of the tree without a native core, what building it said)."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for package in ("helexa_engine", "helexa_server"):
        ignored = shutil.ignore_patterns("__pycache__", "_native*")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source))
    said = run(*build, HELEXA_BUILD_NATIVE="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    (wheel,) = wheels.iterdir()
    return wheel, said.stdout + said.stderr


def test_the_wheel_holds_what_helexa_needs_and_is_small(built: tuple[Path, str]) -> None:
    wheel, _ = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "helexa_engine/py.typed",
        "helexa_engine/demo/demo.gguf",
        "helexa_engine/demo/chat_template.jinja",
        "helexa_engine/demo/MODEL_CARD.md",
        "helexa_server/py.typed",
        "helexa_server/wire/openai_chat.py",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "scripts/")) or "_native" in name]
    assert wheel.stat().st_size <= MAX_BYTES


def test_building_without_the_core_says_what_that_costs(built: tuple[Path, str]) -> None:
    _, said = built
    assert "the native core was NOT built: HELEXA_BUILD_NATIVE=0" in said
    assert "small fraction of the speed" in said and "Install a C++17 compiler" in said


def test_a_pure_python_install_answers(built: tuple[Path, str], tmp_path: Path) -> None:
    wheel, _ = built
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    # Without ``site`` no .pth file is read, so an editable install of this tree cannot lend its core.
    path = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    place = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    where = run("-S", "-c", "import helexa_engine; print(helexa_engine.__file__)", **place)
    assert where.stdout.startswith(str(installed)), "this must not be the tree's own package"
    done = run("-S", "-m", "helexa_engine", "run", "demo", "--prompt", "What is helexa?", "--temperature", "0", **place)
    assert "helexa" in done.stdout
    assert "quant_matmul: reference (native: the native core is not built): plain PyTorch" in done.stderr
