"""The systemd unit in docs/: systemd takes it, and what it tells helexa is what helexa reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine import env
from helexa_engine.cli import build_parser
from helexa_server.config import ServerConfig

UNIT = Path(__file__).parents[2] / "docs" / "helexa.service"


def values(key: str) -> list[str]:
    lines = (line.strip().partition("=") for line in UNIT.read_text().splitlines() if not line.startswith("#"))
    return [value for name, _, value in lines if name == key]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_it(tmp_path: Path) -> None:
    # Verifying looks for the program too, which is not installed under its usual name here.
    text = UNIT.read_text().replace("/usr/local/bin/helexa", sys.executable)
    for name, wrong in (("good", ""), ("bad", "\n[Service]\nProtectSistem=yes\n")):
        unit = tmp_path / f"{name}.service"
        unit.write_text(text + wrong)
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
        complaints = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
        assert bool(complaints) == bool(wrong), complaints


def test_its_command_and_its_environment_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = values("ExecStart")
    _, *words = command.replace("$HELEXA_MODELS", "demo a/b:Q4_K_M").split()
    arguments = build_parser("serve").parse_args(words)
    assert arguments.command == "serve" and arguments.models == ["demo", "a/b:Q4_K_M"]
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    for line in values("Environment"):
        name, _, value = line.partition("=")
        monkeypatch.setenv(name, value)
    assert env.cache_folder() == Path("/var/cache/helexa"), "CacheDirectory"
    assert env.hub_cache() == Path("/var/lib/helexa/huggingface/hub"), "StateDirectory"
    assert values("CacheDirectory") == values("StateDirectory") == ["helexa"]


def test_systemd_waits_longer_than_the_server() -> None:
    assert int(values("TimeoutStopSec")[0]) > ServerConfig().shutdown_seconds + 10


def test_a_model_that_the_kernel_kills_does_not_end_the_service() -> None:
    assert values("OOMPolicy") == ["continue"]
