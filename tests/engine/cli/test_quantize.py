"""``helexa quantize``: writes, reports, and never destroys what it was not told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine.cli import main
from helexa_engine.testing.checkpoints import write_folder, write_qwen3_folder
from helexa_engine.weights.gguf import GGUFFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("hf") / "tiny-model")


def test_it_writes_and_reports(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    assert main(["quantize", str(folder), str(path), "--type", "q4_k_m"]) == 0
    out, err = capsys.readouterr()
    assert str(path) in out and "bits a weight (Q4_K" in out and "Q6_K" in out
    assert "quantising" in err and "done in" in err and "\r" not in err, "plain lines where there is no terminal"
    assert GGUFFile(path).metadata["general.name"] == "tiny-model"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(folder), str(tmp_path / "m.gguf")]) == 0
    assert "left out" not in capsys.readouterr().out
    released = write_folder(tmp_path / "released", "qwen35", multimodal=True)
    assert main(["quantize", str(released), str(tmp_path / "r.gguf"), "--type", "Q8_0"]) == 0
    assert "left out: 1 vision tensors, 1 MTP tensors; the file holds the text model" in capsys.readouterr().out


def test_the_default_is_q4_k_m(folder: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(folder), str(tmp_path / "m.gguf")]) == 0
    assert GGUFFile(tmp_path / "m.gguf").metadata["general.file_type"] == 15


def test_an_existing_file_is_replaced_only_with_force(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    assert main(["quantize", str(folder), str(path), "--type", "Q8_0"]) == 1
    assert "exists; give --force to replace it" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert main(["quantize", str(folder), str(path), "--type", "Q8_0", "--force"]) == 0
    assert GGUFFile(path).metadata["general.file_type"] == 7
    assert main(["quantize", str(path), str(path), "--force"]) == 1
    assert "is the source itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SRC", "FOLDER"], "is a folder; name the file to write"),
        (["SRC", "FOLDER/none/m.gguf"], "there is no folder"),
        (["SRC", "FOLDER/m.gguf", "--type", "Q9"], "type: expected one of"),
        (["SRC", "FOLDER/m.gguf", "--imatrix", "FOLDER/none"], "no importance matrix there"),
        (["FOLDER/none", "FOLDER/m.gguf"], "no such file or folder"),
    ],
)
def test_mistakes_are_named(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", *(a.replace("SRC", str(folder)).replace("FOLDER", str(tmp_path)) for a in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
