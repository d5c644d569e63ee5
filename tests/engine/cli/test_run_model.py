"""``helexa run`` as a process of its own, on a real model with random weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine.presets import write_preset_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "tiny.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q8_0")
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "helexa_engine", "run", *arguments]


def test_piped_input_is_answered(tiny: Path) -> None:
    arguments = command(str(tiny), "--max-tokens", "5", "--seed", "1", "--max-model-len", "64")
    one, two = (subprocess.run(arguments, input="hello", capture_output=True, text=True, check=True) for _ in range(2))
    assert one.stdout == two.stdout
    assert "cut off at the token limit" in one.stderr and "tokens/s" in one.stderr
    assert "\x1b" not in one.stdout + one.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.gguf", "--prompt", "hi"], "absent.gguf"),
        (["{tiny}", "--prompt", "hi " * 50, "--max-model-len", "64"], "prompt is too long"),
        (["{tiny}", "--prompt", "hi", "--max-model-len", "99999"], "max_model_len"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(tiny: Path, arguments: list[str], words: str) -> None:
    filled = [argument.replace("{tiny}", str(tiny)) for argument in arguments]
    done = subprocess.run(command(*filled), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("helexa: error: ") and words in last and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_single_answer_in_order(tiny: Path) -> None:
    arguments = command(str(tiny), "--prompt", "hi", "--seed", "1", "--temperature", "5", "--max-model-len", "40000")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read().decode()
        assert process.wait(timeout=60) == 130
    assert "[stopped after" in error and "Traceback" not in error
