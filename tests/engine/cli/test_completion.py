from __future__ import annotations

import shutil
import subprocess

import pytest

from helexa_engine.cli import COMMANDS, main
from helexa_engine.cli.completion import SCRIPTS


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def complete(source: str, *words: str) -> set[str]:
    """What bash offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"{source}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _helexa; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["helexa", ""], {*COMMANDS, "--help", "--version"}),
        (["helexa", "do"], {"doctor"}),
        (["helexa", "run", "--temp"], {"--temperature"}),
        (["helexa", "run", "--kv-dtype", ""], {"auto", "float32", "float16", "bfloat16", "q8_0"}),
        (["helexa", "completion", ""], {*SCRIPTS, "-h", "--help"}),
        (["helexa", "doctor", "--temp"], set()),
        (["helexa", "rm", "--y"], {"--yes"}),
        (["helexa", "list", "--"], {"--help", "--json"}),
        (["helexa", "pu"], {"pull"}),
    ],
)
def test_bash_offers_commands_flags_and_choices(
    capsys: pytest.CaptureFixture[str], words: list[str], offered: set[str]
) -> None:
    assert complete(script("bash", capsys), *words) == offered


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_script_names_every_command(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    text = script(shell, capsys)
    assert all(command in text for command in COMMANDS)
    interpreter = shutil.which(shell)
    if interpreter is not None:
        assert subprocess.run([interpreter, "-n"], input=text, text=True, capture_output=True).returncode == 0
