from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from helexa_engine.cli import main
from helexa_engine.presets import write_preset_gguf
from helexa_engine.testing.checkpoints import write_folder, write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info") / "tiny.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q4_K_M")
    return path


def test_the_facts_are_those_of_the_file(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = gguf.GGUFReader(tiny).tensors
    assert facts["architecture"] == "qwen3" and facts["file_bytes"] == tiny.stat().st_size
    assert facts["parameters"] == sum(int(t.n_elements) for t in tensors)
    for name, entry in facts["types"].items():
        assert entry["bytes"] == sum(int(t.n_bytes) for t in tensors if t.tensor_type.name == name)
    assert set(facts["types"]) == {t.tensor_type.name for t in tensors}
    shape = {key: facts[key] for key in ("layers", "hidden_size", "attention_heads", "kv_heads", "head_dim", "context")}
    assert shape == {
        "layers": 2,
        "hidden_size": 256,
        "attention_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "context": 40960,
    }
    assert facts["kv_bytes_per_token"] == {"float32": 2048, "float16": 1024, "q8_0": 544}
    assert facts["tied_embeddings"] is True
    assert "system message" in facts["template"] and "thinking" not in facts["template"]


def test_the_report_is_for_people(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "2 layers, hidden 256" in out and "Q6_K" in out and "40960 tokens" in out and "tied output head" in out
    assert "2.0 KiB in float32, 1.0 KiB in float16, 0.5 KiB in q8_0 a token" in out


def test_a_hybrid_s_mixers_experts_and_unused_tensors_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "hf", "qwen35moe", multimodal=True)
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "4 layers (1 of attention, 3 of gated delta net)" in out
    assert "6 experts of 256, 2 a token and a shared one of 256" in out
    assert "not used  vision (1 tensors, 0.0 MB), MTP (1 tensors, 0.0 MB)" in out
    path = write_gguf(write_folder(tmp_path / "dense", "qwen35"), tmp_path / "mtp.gguf", mtp=True)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layers"], facts["delta_net_layers"], facts["experts"]) == (4, 3, None)
    extra = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk.4.")]
    assert facts["unused"] == {"MTP": {"tensors": len(extra), "bytes": sum(int(t.n_bytes) for t in extra)}}


def test_it_reads_headers_without_torch(tiny: Path) -> None:
    program = (
        f"import sys; from helexa_engine.cli import main; assert main(['info', {str(tiny)!r}]) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "absent.gguf")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("helexa: error: ") and "absent.gguf" in err and err.count("\n") == 1


def test_a_broken_file_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:1000])
    assert main(["info", str(broken)]) == 1
    err = capsys.readouterr().err
    assert "broken.gguf" in err and err.count("\n") == 1 and "Traceback" not in err


def test_an_unknown_architecture_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny.read_bytes().replace(b"\x05\0\0\0\0\0\0\0qwen3", b"\x05\0\0\0\0\0\0\0gnome"))
    assert main(["info", str(other)]) == 1
    assert "architecture 'gnome' is not supported" in capsys.readouterr().err
