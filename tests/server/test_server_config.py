"""Settings of the server: where it may listen, and where its key comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine.config import resolve
from helexa_engine.errors import InvalidRequest
from helexa_server.config import ServerConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELEXA_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerConfig(host=host).api_key() is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_a_wider_bind_needs_a_key_or_insecure(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="--insecure") as caught:
        ServerConfig(host=host).api_key()
    assert caught.value.path == "host"
    assert ServerConfig(host=host, insecure=True).api_key() is None
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    assert ServerConfig(host=host).api_key() == "sesame"


def key_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_key_from_a_file(tmp_path: Path) -> None:
    assert ServerConfig(api_key_file=key_file(tmp_path / "key", "sesame\n")).api_key() == "sesame"


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [("sesame", 0o644, "chmod 600"), ("", 0o600, "one line"), ("two\nlines", 0o600, "one line")],
)
def test_bad_key_files(tmp_path: Path, text: str, mode: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ServerConfig(api_key_file=key_file(tmp_path / "key", text, mode)).api_key()


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        ServerConfig(api_key_file=str(tmp_path / "key")).api_key()


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_PORT", "9000")
    assert resolve(ServerConfig, {}).port == 9000
    assert resolve(ServerConfig, {"port": "9001"}, {"port": 9002}).port == 9001
    with pytest.raises(InvalidRequest, match="at most 65535"):
        resolve(ServerConfig, {"port": "70000"})
