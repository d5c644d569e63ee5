"""``helexa plan``: the figures that a load follows, for people and for programs, of files and of ids on the hub."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine.cli import main
from helexa_engine.config import EngineConfig
from helexa_engine.llm import LLM
from helexa_engine.presets import write_preset_gguf
from helexa_engine.runtime import plan as plan_module

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q4_K_M")
    return path


def facts_of(capsys: Capture, *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_figures_are_those_of_the_loaded_model(
    tiny: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 2**29)
    facts = facts_of(capsys, str(tiny), "--max-num-seqs", "2", "--kv-dtype", "float32")
    with LLM(tiny, max_num_seqs=2, kv_dtype="float32") as llm:
        info = llm.model_info
    assert facts["fits"] is True and facts["file_bytes"] == tiny.stat().st_size
    for name in ("name", "architecture", "weight_bytes", "kv_bytes", "state_bytes", "snapshot_bytes", "max_model_len"):
        assert facts[name] == getattr(info, name), name
    parts = ("weight", "kv", "state", "snapshot", "workspace", "position")
    assert facts["total_bytes"] == sum(facts[f"{part}_bytes"] for part in parts)
    assert facts["kv_bytes"] == facts["kv_pages"] * facts["kv_page_bytes"]
    assert facts["tokens_per_seq"] == min(facts["max_model_len"], facts["kv_pages"] // 2 * 64)


def test_every_setting_of_loading_that_has_a_flag_is_one(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(EngineConfig):
        assert (f"--{field.name.replace('_', '-')}" in out) == field.metadata["flag"]


def test_the_table_is_for_people(tiny: Path, capsys: Capture) -> None:
    assert main(["plan", str(tiny), "--max-model-len", "2048", "--max-num-seqs", "2"]) == 0
    lines = {line[:13].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    assert lines["model"].startswith("tiny, qwen3, ") and lines["model"].endswith(f" in {tiny}")
    assert "64 of 64 tokens in float16" in lines["KV pages"]
    assert lines["context"] == "2048 tokens; the model allows 40960"
    assert lines["sequences"] == "2 together, 2048 tokens each when all are as long"
    assert "quant_matmul" in lines["kernels"] and "paged_attention" in lines["kernels"]
    assert "states" not in lines and "in the file" not in lines


def test_states_snapshots_and_the_quantisation_to_come_have_their_lines(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "hybrid.gguf"
    write_preset_gguf(path, "qwen3.5-tiny", "BF16")
    assert main(["plan", str(path), "--quant", "Q8_0", "--max-model-len", "1024"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"weights +\d+\.\d MiB +Q8_0 .*, quantised to Q8_0 by way of the cache", out)
    assert re.search(r"states +\d+\.\d MiB +of 8 sequences in \d+ layers", out)
    assert re.search(r"snapshots +\d+\.\d MiB +32 of such states, for the prefix cache", out)


def test_what_does_not_fit_says_by_how_many_bytes(tiny: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 20 * 2**20
    monkeypatch.setattr(plan_module, "available_bytes", lambda: free)
    arguments = ["plan", str(tiny), "--max-model-len", "32768", "--memory-fraction", "1"]
    assert main([*arguments, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] is False and facts["free_bytes"] == free
    assert facts["short_bytes"] == facts["needed_bytes"] - free > 0
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"GiB short: {facts['short_bytes']} bytes)" in err
    # With exactly these bytes more, it fits.
    monkeypatch.setattr(plan_module, "available_bytes", lambda: facts["needed_bytes"])
    assert main(arguments) == 0
    monkeypatch.setattr(plan_module, "available_bytes", lambda: facts["needed_bytes"] - 1)
    assert main(arguments) == 1


def test_it_loads_nothing_heavy(tiny: Path) -> None:
    program = (
        "import sys\n"
        "from helexa_engine.cli import main\n"
        f"assert main(['plan', {str(tiny)!r}]) == 0\n"
        "print([m for m in ('torch', 'tokenizers', 'jinja2', 'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_file_that_is_not_there_is_said(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", str(tmp_path / "no.gguf")]) == 1
    assert "not found: no such file or folder" in capsys.readouterr().err
