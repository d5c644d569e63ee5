"""Planning a model that is on the hub alone: its headers come, its weights stay there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helexa_engine import env
from helexa_engine.errors import DownloadFailed, ModelNotFound
from helexa_engine.presets import write_preset_gguf
from helexa_engine.testing.checkpoints import write_folder
from helexa_engine.weights import hub_download, hub_headers
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.hub import HubId

from .hub_server import HubServer, Repo, hub_server

HEAD = 64 * 1024  # more than the header of the tiny file, less than the file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "m-Q8_0.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q8_0")
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[HubServer]:
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HELEXA_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_headers, "GGUF_HEAD_BYTES", HEAD)
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.repos["org/m-GGUF"] = Repo({model.name: model.read_bytes()})
        yield running


def facts(path: Path) -> list[tuple[object, ...]]:
    with open_checkpoint(path) as checkpoint:
        tensors = [(t.name, t.quant_type.name, t.shape) for t in checkpoint.tensors]
        return [(checkpoint.architecture, checkpoint.nbytes, checkpoint.chat_template), *tensors]


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_file_s_header_is_that_of_the_file(server: HubServer, model: Path, ignore_range: bool) -> None:
    server.ignore_range = ignore_range
    with hub_headers.located(HubId("org/m-GGUF")) as path:
        assert facts(path) == facts(model)
        assert path.stat().st_blocks * 512 < 2 * HEAD < path.stat().st_size
    assert not path.exists()
    assert not list(env.hub_cache().rglob("*.gguf")), "nothing of it may look like a download"
    if not ignore_range:
        assert server.sent[model.name] == HEAD


def test_a_folder_s_headers_are_those_of_the_folder(server: HubServer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", "qwen35moe")
    server.repos["org/m"] = Repo.of_folder(folder)
    with hub_headers.located(HubId("org/m")) as path:
        assert facts(path) == facts(folder)
    assert server.sent["model.safetensors"] < 0.1 * (folder / "model.safetensors").stat().st_size
    assert not server.sent["tokenizer.json"], "only the tokenizer reads it"


def test_what_is_on_disk_is_used(server: HubServer, model: Path) -> None:
    whole = hub_download.download(hub_download.plan(HubId("org/m-GGUF")))
    server.requests.clear()
    with hub_headers.located(HubId("org/m-GGUF"), offline=True) as path:
        assert path == whole
    assert not server.requests


def test_offline_it_says_what_to_do(server: HubServer) -> None:
    with (
        pytest.raises(ModelNotFound, match="offline mode is on.*run `helexa pull org/m-GGUF` while online"),
        hub_headers.located(HubId("org/m-GGUF"), offline=True),
    ):
        pass
    assert not server.requests


def test_a_broken_answer_is_said(server: HubServer, model: Path) -> None:
    server.cut[model.name] = [100, 100, 100]
    with pytest.raises(DownloadFailed), hub_headers.located(HubId("org/m-GGUF")):
        pass
