"""Where a model is, and what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine import demo
from helexa_engine.errors import ModelNotFound
from helexa_engine.runtime.locate import locate_model, model_name


def test_files_folders_and_the_demo_are_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "m.gguf", tmp_path / "org" / "m"
    file.touch()
    folder.mkdir(parents=True)
    assert locate_model(str(file)) == locate_model(file) == file
    assert locate_model(str(folder)) == folder
    assert locate_model("demo") == demo.path()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/m.gguf") == file
    monkeypatch.chdir(tmp_path)
    assert locate_model("org/m") == Path("org/m"), "what is there goes before a hub id"


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "m-Q4_K_M.gguf", tmp_path / "m"
    file.touch()
    folder.mkdir()
    assert model_name(str(file), file) == "m-Q4_K_M"
    assert model_name(folder, folder) == "m"
    monkeypatch.chdir(folder)
    assert model_name(".", Path(".")) == "m"
    assert model_name("demo", demo.path()) == "demo"
    assert model_name("org/m:Q8_0", tmp_path / "snapshots" / "x.gguf") == "org/m:Q8_0"


@pytest.mark.parametrize("name", ["", "no.gguf", "/no/such/folder"])
def test_what_is_nowhere_is_said_with_what_to_give(name: str) -> None:
    with pytest.raises(ModelNotFound, match="give a .gguf file, a HuggingFace folder, a hub id org/name, or demo"):
        locate_model(name, offline=True)


def test_a_missing_demo_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "path", lambda: Path("/no/demo.gguf"))
    with pytest.raises(ModelNotFound, match="the demo model is missing from this installation"):
        locate_model("demo")
