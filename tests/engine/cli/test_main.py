from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine import cli
from helexa_engine.cli import COMMANDS, main
from helexa_engine.errors import HelexaError, ModelNotFound

HEAVY = ("torch", "numpy", "rich", "starlette", "uvicorn", "jinja2", "tokenizers")


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    program = (
        "import sys, time\n"
        "from helexa_engine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(time.process_time(), [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        elapsed, loaded = done.stderr.strip().split(" ", 1)
        assert loaded == "[]"
        assert all(name in done.stdout for name in COMMANDS)
        seconds.append(float(elapsed))
    assert min(seconds) < 0.2  # processor time of the whole process: others on the machine are not ours to measure


def test_running_as_a_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "helexa_engine", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("helexa ")


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"], ["run", "--no-such-flag", "x"], ["completion", "tcsh"]])
def test_wrong_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2


class _Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def add_arguments(self, parser: object) -> None:
        pass

    def run(self, arguments: object) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModelNotFound("x.gguf", "no such file"), 1, "model 'x.gguf' not found"),
        (HelexaError("line one\nline two\x1b[31m"), 1, "helexa: error: line one line two [31m"),
        (cli.UsageError("--top-p: bad"), 2, "--top-p: bad"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "helexa doctor"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr(cli, "command_module", lambda name: _Raises(error))
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and words in captured.err and "Traceback" not in captured.err


def test_faults_of_our_own_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "command_module", lambda name: _Raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_closed_pipe_is_quiet() -> None:
    shell = f"set -o pipefail; {sys.executable} -m helexa_engine completion bash | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-num-seqs", "many"], "--max-num-seqs: expected int, got 'many'"),
        (["--max-num-seqs", "0"], "--max-num-seqs: expected at least 1"),
        (["--temperature", "-1"], "--temperature: expected a finite number >= 0"),
        (["--top-p", "0"], "--top-p: expected a finite number > 0"),
        (["--config", "absent.toml"], "no such file: absent.toml"),
        (["--prompt", " "], "the prompt is empty"),
    ],
)
def test_bad_values_exit_with_2(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(["run", "demo", "--prompt", "hello", *flags]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_key_in_the_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "helexa.toml"
    file.write_text("[engine]\nmax_len = 3\n")
    assert main(["run", "demo", "--prompt", "x", "--config", str(file)]) == 2
    assert f"{file}: engine.max_len: unknown key" in capsys.readouterr().err


def test_precedence_is_flag_environment_file_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helexa_engine.cli.options import resolve_config
    from helexa_engine.config import EngineConfig

    file = tmp_path / "helexa.toml"
    file.write_text("[engine]\nmax_num_seqs = 3\nseed = 4\nmemory_fraction = 0.5\n")
    monkeypatch.setenv("HELEXA_CONFIG", str(file))
    monkeypatch.setenv("HELEXA_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("HELEXA_SEED", "6")
    arguments = cli.build_parser("run").parse_args(["run", "demo", "--seed", "7"])
    config = resolve_config(arguments, "engine", EngineConfig)
    assert (config.seed, config.max_num_seqs, config.memory_fraction) == (7, 5, 0.5)
    assert config.max_num_batched_tokens == EngineConfig().max_num_batched_tokens


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_fewer_than_40_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert 0 < capsys.readouterr().out.count("\n  -") < 40
