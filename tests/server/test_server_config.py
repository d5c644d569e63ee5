"""Settings of the server: where it may listen, and where its key comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine.config import resolve
from helexa_engine.errors import InvalidRequest
from helexa_server.config import KeyLimits, Keys, ServerConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELEXA_API_KEY", raising=False)
    monkeypatch.delenv("HELEXA_ADMIN_KEY", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert not ServerConfig(host=host).keys()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_a_wider_bind_needs_a_key_or_insecure(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="--insecure") as caught:
        ServerConfig(host=host).keys()
    assert caught.value.path == "host"
    assert not ServerConfig(host=host, insecure=True).keys()
    monkeypatch.setenv("HELEXA_ADMIN_KEY", "open")
    with pytest.raises(InvalidRequest, match="--insecure"):
        ServerConfig(host=host).keys()
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    assert ServerConfig(host=host).keys() == Keys(("sesame",), "open")


def key_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contracts.md 3: keys: none, one, a file of keys, an admin key."""
    clients = key_file(tmp_path / "keys", "# ann\nsesame\n\n  poppy  \n")
    admin = key_file(tmp_path / "admin", "open\n")
    assert ServerConfig(api_key_file=clients).keys() == Keys(("sesame", "poppy"))
    assert ServerConfig(api_key_file=clients, admin_key_file=admin).keys() == Keys(("sesame", "poppy"), "open")
    assert ServerConfig(admin_key_file=admin).keys() == Keys((), "open")
    with pytest.raises(InvalidRequest, match="expected one key") as caught:
        ServerConfig(admin_key_file=clients).keys()
    assert caught.value.path == "admin_key_file"
    monkeypatch.setenv("HELEXA_API_KEY", "first")
    assert ServerConfig(api_key_file=clients).keys() == Keys(("first",)), "the environment comes before the file"
    assert "sesame" not in repr(Keys(("sesame",)))


def test_limits_behind_a_key(tmp_path: Path) -> None:
    text = "sesame requests_per_minute=60 tokens_per_minute=9000\npoppy\nbatch  token_budget=5 priority=-2\n"
    keys = ServerConfig(api_key_file=key_file(tmp_path / "keys", text)).keys()
    assert keys.clients == ("sesame", "poppy", "batch")
    assert keys.limits == {
        "sesame": KeyLimits(requests_per_minute=60, tokens_per_minute=9000),
        "batch": KeyLimits(token_budget=5, priority=-2),
    }
    with pytest.raises(InvalidRequest, match="no limits"):
        ServerConfig(admin_key_file=key_file(tmp_path / "admin", "open token_budget=5")).keys()


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("sesame", 0o644, "chmod 600"),
        ("# none\n", 0o600, "one a line"),
        ("two words", 0o600, "keys:1: expected one key a line"),
        ("a\nb token_budget=many", 0o600, "keys:2: expected a whole number behind token_budget="),
        ("a token_budget=0", 0o600, "token_budget of at least 1"),
        ("a priority=1 priority=2", 0o600, "each once"),
        ("k\u00e4y", 0o600, "printable ASCII"),
    ],
)
def test_bad_key_files(tmp_path: Path, text: str, mode: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ServerConfig(api_key_file=key_file(tmp_path / "keys", text, mode)).keys()


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        ServerConfig(api_key_file=str(tmp_path / "key")).keys()


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_PORT", "9000")
    assert resolve(ServerConfig, {}).port == 9000
    assert resolve(ServerConfig, {"port": "9001"}, {"port": 9002}).port == 9001
    with pytest.raises(InvalidRequest, match="at most 65535"):
        resolve(ServerConfig, {"port": "70000"})
