"""``pull``, ``list``, ``rm``, and hub ids in the commands that take a model, against a local hub."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helexa_engine import LLM, SamplingParams, env
from helexa_engine.cli import downloads, main
from helexa_engine.config import EngineConfig
from helexa_engine.presets import write_preset_gguf
from helexa_engine.testing.checkpoints import write_qwen3_folder
from helexa_engine.weights import hub_download
from helexa_engine.weights.hub import Transfer

from ..weights.hub_server import HubServer, Repo, hub_server

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q8_0")
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("tiny") / "folder")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: bytes, folder: Path) -> Iterator[HubServer]:
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HELEXA_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_download, "RETRY_SECONDS", 0.0)
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.repos["org/m-GGUF"] = Repo({"m-Q8_0.gguf": model, "m-Q4_K_M.gguf": model + b"\0" * 64})
        running.repos["org/m"] = Repo.of_folder(folder)
        yield running


def test_pull_says_what_came_and_where_it_is(server: HubServer, capsys: Capture) -> None:
    assert main(["pull", "org/m-GGUF:q8_0"]) == 0
    out, err = capsys.readouterr()
    (path,) = env.hub_cache().rglob("m-Q8_0.gguf")
    assert out.startswith("org/m-GGUF:Q8_0 is complete: ") and out.endswith(f" in {path}\n")
    assert "downloading m-Q8_0.gguf (" in err and "downloaded m-Q8_0.gguf (" in err
    assert main(["pull", "org/m-GGUF:q8_0"]) == 0
    out, err = capsys.readouterr()
    assert "was complete already" in out and err == ""


def test_pull_says_which_quant_it_takes(server: HubServer, capsys: Capture) -> None:
    assert main(["pull", "org/m-GGUF"]) == 0
    out, err = capsys.readouterr()
    assert "org/m-GGUF: no quant named, taking Q4_K_M" in err and out.startswith("org/m-GGUF:Q4_K_M is complete")


def test_pull_goes_on_where_it_stopped(server: HubServer, capsys: Capture) -> None:
    server.cut["m-Q8_0.gguf"] = [30_000, *[0] * hub_download.MAX_ATTEMPTS]
    assert main(["pull", "org/m-GGUF:Q8_0"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    server.cut.clear()
    assert main(["pull", "org/m-GGUF:Q8_0"]) == 0
    assert "going on at 30.0 kB" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["demo", "model.gguf", "./org/m", "org/m:"])
def test_pull_wants_an_id(server: HubServer, capsys: Capture, text: str) -> None:
    assert main(["pull", text]) == 2
    assert "expected a hub id such as org/name" in capsys.readouterr().err


def test_pull_offline(server: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_OFFLINE", "yes")
    assert main(["pull", "org/m"]) == 1
    assert "offline mode is on" in capsys.readouterr().err and not server.requests


def test_list_shows_what_can_be_run(server: HubServer, capsys: Capture, model: bytes) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["MODEL", "demo"]
    main(["pull", "org/m-GGUF:Q8_0", "org/m"])
    capsys.readouterr()
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["MODEL", "demo", "org/m", "org/m-GGUF:Q8_0"]
    assert main(["list", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"demo", "org/m", "org/m-GGUF:Q8_0"}
    row = rows["org/m-GGUF:Q8_0"]
    assert (row["repo"], row["file"], row["quant"], row["bytes"], row["missing"]) == (
        "org/m-GGUF", "m-Q8_0.gguf", "Q8_0", len(model), None
    )  # fmt: skip
    assert Path(row["path"]).read_bytes() == model and rows["org/m"]["file"] is None
    assert Path(rows["demo"]["path"]).is_file()
    (Path(rows["org/m"]["path"]) / "model.safetensors").unlink()
    main(["list"])
    assert "half-downloaded: `helexa pull org/m` goes on" in capsys.readouterr().out


def test_list_names_what_it_cannot_run(server: HubServer, capsys: Capture, model: bytes) -> None:
    server.repos["org/other"] = Repo({"m-Q8_0.gguf": model.replace(b"qwen3", b"gnome")})
    main(["pull", "org/other"])
    capsys.readouterr()
    main(["list"])
    assert "not for helexa or without weights: org/other" in capsys.readouterr().out


def test_rm_deletes_without_a_terminal_only_when_told_to(
    server: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: bytes
) -> None:
    main(["pull", "org/m-GGUF:Q8_0", "org/m-GGUF:Q4_K_M"])
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["rm", "org/m-GGUF:Q8_0"]) == 2
    assert "--yes" in capsys.readouterr().err and list(env.hub_cache().rglob("m-Q8_0.gguf"))
    assert main(["rm", "--yes", "org/m-GGUF:Q8_0"]) == 0
    assert capsys.readouterr().out == f"deleted org/m-GGUF:Q8_0: {len(model) / 1e6:.1f} MB freed\n"
    assert [p.name for p in env.hub_cache().rglob("*.gguf")] == ["m-Q4_K_M.gguf"]
    assert main(["rm", "--yes", "org/m-GGUF"]) == 0
    assert not list(env.hub_cache().glob("models--*"))


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("YES", True), ("n", False), ("", False), (None, False)])
def test_rm_asks_on_a_terminal(
    server: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch, answer: str | None, gone: bool
) -> None:
    main(["pull", "org/m-GGUF:Q8_0"])
    capsys.readouterr()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    assert main(["rm", "org/m-GGUF:Q8_0"]) == 0
    assert len(asked) == 1 and asked[0].startswith("delete org/m-GGUF:Q8_0 (") and asked[0].endswith("[y/N] ")
    assert ("freed" in capsys.readouterr().out) == gone
    assert bool(list(env.hub_cache().rglob("m-Q8_0.gguf"))) != gone


def test_rm_leaves_the_demo_alone(server: HubServer, capsys: Capture) -> None:
    assert main(["rm", "--yes", "demo"]) == 1
    assert "demo ships with helexa" in capsys.readouterr().err
    assert main(["rm", "--yes", "org/absent"]) == 1
    assert "nothing of it is in" in capsys.readouterr().err


def test_info_takes_an_id(server: HubServer, capsys: Capture) -> None:
    assert main(["info", "org/m-GGUF:Q8_0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "qwen3" and facts["path"].endswith("/m-Q8_0.gguf")
    assert main(["info", "org/m-GGUF:Q6_K"]) == 1
    assert "there is Q4_K_M (" in capsys.readouterr().err


def test_run_takes_an_id_and_then_needs_no_network(
    server: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--prompt", "hello", "--max-tokens", "2", "--temperature", "0", "--max-model-len", "128"]
    assert main(["run", "org/m", *flags]) == 0
    out, err = capsys.readouterr()
    assert "downloading model.safetensors" in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert main(["run", "org/m", "--offline", *flags]) == 0
    again, err = capsys.readouterr()
    assert again == out and "downloading" not in err


def test_a_model_is_called_by_its_id_and_answers_as_the_folder_does(server: HubServer, folder: Path) -> None:
    stages: list[tuple[str, float]] = []
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM("org/m", max_model_len=128, progress=lambda stage, share: stages.append((stage, share))) as llm:
        assert llm.model_info.name == "org/m"
        tokens = llm.generate("Hello", greedy).token_ids
    assert ("downloading model.safetensors", 1.0) in stages
    with LLM(folder, max_model_len=128) as llm:
        assert llm.generate("Hello", greedy).token_ids == tokens


def test_the_server_takes_an_id_and_says_how_far_the_download_is(server: HubServer) -> None:
    from helexa_server.lifecycle.catalogue import model_name
    from helexa_server.lifecycle.model_source import WorkerSource

    stages: list[str] = []

    async def load() -> str:
        source = WorkerSource("org/m-GGUF:Q8_0", EngineConfig(max_model_len=128), 60.0)
        engine = await source.load(2**40, lambda stage, share: stages.append(stage))
        name: str = engine.model_info.name
        await engine.aclose()
        return name

    assert asyncio.run(load()) == model_name("org/m-GGUF:Q8_0") == "org/m-GGUF:Q8_0"
    assert "downloading m-Q8_0.gguf" in stages


def test_lines_where_there_is_no_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(downloads.time, "monotonic", lambda: now)
    with downloads.bars() as move:
        for done in (0, 100_000, 500_000, 1_000_000, 1_000_000):
            move(Transfer("a.gguf", done, 1_000_000, done, 2_000_000))
            now += 20
        move(Transfer("there.json", 5, 5, 5, 5))
    assert capsys.readouterr().err.splitlines() == [
        "downloading a.gguf (1.0 MB)",
        "downloading a.gguf: 500.0 kB of 1.0 MB, 50 %",
        "downloaded a.gguf (1.0 MB)",
    ]


def test_a_bar_a_file_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with downloads.bars() as move:
        assert terminal.getvalue() == ""  # nothing to download, nothing to see
        for name in ("config.json", "m-Q8_0.gguf"):
            move(Transfer(name, 0, 2_000_000, 0, 4_000_000))
            move(Transfer(name, 2_000_000, 2_000_000, 0, 4_000_000))
    first, second = [line for line in terminal.getvalue().replace("\r", "\n").splitlines() if "MB" in line][-2:]
    assert "config.json" in first and "2.0/2.0 MB" in first and "m-Q8_0.gguf" in second and "2.0/2.0 MB" in second


def test_list_is_quick_and_brings_no_torch(server: HubServer) -> None:
    main(["pull", "org/m-GGUF:Q8_0"])
    program = (
        "import sys, time\nfrom helexa_engine.cli import main\nassert main(['list']) == 0\n"
        "print(time.process_time(), [m for m in ('torch', 'rich', 'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    done = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    reports = [run.stderr.strip().split(" ", 1) for run in done]
    assert all(loaded == "[]" for _, loaded in reports) and "org/m-GGUF:Q8_0" in done[0].stdout
    assert min(float(seconds) for seconds, _ in reports) < 0.5  # processor time of the whole process
