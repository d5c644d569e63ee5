"""``helexa config show``: what it prints is the configuration, and says where each value came from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from helexa_engine.cli import main
from helexa_engine.cli.config_show import TABLES
from helexa_engine.config import EngineConfig, resolve
from helexa_server.config import ServerConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HELEXA_API_KEY", "HELEXA_ADMIN_KEY", "HELEXA_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def show(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["config", "show", *flags]) == 0
    return capsys.readouterr().out


def source(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.removeprefix("# ").startswith(f"{name} =")]
    return line.rpartition("  # ")[2]


def test_every_value_has_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[engine]\nmax_num_seqs = 3\nseed = 4\n[server]\nhost = "::1"\n')
    monkeypatch.setenv("HELEXA_SEED", "6")
    text = show(capsys, "--config", str(file), "--port", "9000", "--insecure")
    assert text.startswith(f"# file: {file}\n")
    assert source(text, "max_num_seqs") == f"{file}: engine.max_num_seqs"
    assert source(text, "host") == f"{file}: server.host"
    assert source(text, "seed") == "environment HELEXA_SEED"
    assert source(text, "port") == "--port"
    assert source(text, "insecure") == "--insecure"
    assert source(text, "max_model_len") == source(text, "dtype") == "default"
    shown = tomllib.loads(text)
    assert shown["server"]["port"] == 9000 and shown["engine"]["seed"] == 6 and shown["engine"]["max_num_seqs"] == 3


def test_what_is_shown_is_a_file_of_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--served-model-name", 'a "b"\\ü\n\x7f', "--load-wait-seconds", "1.5", "--no-quant-cache"]
    file = tmp_path / "shown.toml"
    file.write_text(show(capsys, *flags), encoding="utf-8")
    document = tomllib.loads(file.read_text())
    assert document.keys() == TABLES.keys()
    assert document["server"]["served_model_name"] == flags[1]
    assert resolve(EngineConfig, {}, document["engine"]) == EngineConfig(quant_cache=False)
    assert resolve(ServerConfig, {}, document["server"]).load_wait_seconds == 1.5
    again = show(capsys, "--config", str(file))
    assert tomllib.loads(again) == document


def test_the_usual_place_is_read_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert show(capsys).startswith("# file: none\n")
    usual, named = tmp_path / "helexa" / "config.toml", tmp_path / "named.toml"
    usual.parent.mkdir()
    usual.write_text("[server]\nport = 1234\n")
    named.write_text("[server]\nport = 5678\n")
    assert source(show(capsys), "port") == f"{usual}: server.port"
    monkeypatch.setenv("HELEXA_CONFIG", str(named))
    assert source(show(capsys), "port") == f"{named}: server.port"
    assert source(show(capsys, "--config", str(usual)), "port") == f"{usual}: server.port"


def test_sampling_defaults_of_a_model_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[sampling."org/name"]\ntemperature = 0\ntop_k = 20\n')
    shown = tomllib.loads(show(capsys, "--config", str(file)))
    assert shown["sampling"] == {"org/name": {"temperature": 0, "top_k": 20}}


def test_tables_of_models_are_shown_and_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.toml"
    table = 'model = "demo"\naliases = ["x", "y"]\npin = true\nttl_seconds = 2.5\nload = "at start"\nmax_num_seqs = 2\n'
    file.write_text(f'[models."org/name"]\n{table}[sampling."org/name"]\ntop_k = 2\n[sampling.demo]\ntop_k = 3\n')
    text = show(capsys, "--config", str(file))
    assert tomllib.loads(text)["models"] == tomllib.loads(file.read_text())["models"]
    (tmp_path / "shown.toml").write_text(text)
    assert tomllib.loads(show(capsys, "--config", str(tmp_path / "shown.toml"))) == tomllib.loads(text)


def test_tables_that_share_a_name_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[models.a]\naliases = ['b']\n[models.b]\n")
    assert main(["config", "show", "--config", str(file)]) == 2
    assert "models: 'b' is a name of a already" in capsys.readouterr().err


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "# HELEXA_API_KEY: not set" in show(capsys)
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    text = show(capsys)
    assert "# HELEXA_API_KEY: set" in text and "sesame" not in text


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[server]\nprot = 1\n", "server.prot: unknown key"),
        ("[sever]\n", "sever: unknown table"),
        ("[server]\nport = 70000\n", "server.port: expected at most 65535"),
        ('[engine]\nseed = "x"\n', "engine.seed: expected int, got 'x'"),
        ("[sampling.demo]\ntop_q = 1\n", "sampling.demo.top_q: unknown key"),
        ("[sampling.demo]\ntop_p = 2.0\n", "sampling.demo.top_p: expected"),
        ("[models.a]\nmodle = 1\n", "models.a.modle: unknown key"),
        ("[models.a]\nload = 1\n", "models.a.load: expected one of at start, on request"),
        ("[sampling]\ntop_p = 1.0\n", "sampling.top_p: expected a table"),
        ("[engine]\nmax_num_seqs = true\n", "engine.max_num_seqs: expected int"),
    ],
)
def test_what_a_file_gets_wrong_is_named_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], toml: str, words: str
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(toml)
    assert main(["config", "show", "--config", str(file)]) == 2
    assert f"helexa: error: {file}: {words}" in capsys.readouterr().err
