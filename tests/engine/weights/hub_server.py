"""A hub on a loopback port: the requests huggingface-hub makes for model repositories, answered from memory, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1000


@dataclass
class Repo:
    """A model repository. Files above :data:`LFS_BYTES` are large files, served from another host after a redirect."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)

    @classmethod
    def of_folder(cls, folder: Path) -> Repo:
        return cls(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )

    def etag(self, name: str) -> str:
        data = self.files[name]
        if len(data) > LFS_BYTES:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


@dataclass
class HubServer:
    """
    Attributes:
        url: of the API; large files come from ``cdn``, another origin.
        requests: (method, path, headers) of everything asked.
        cut: large file -> bytes after which each answer breaks off, one entry an answer.
        sent: large file -> bytes of its contents that were sent.
        fail: status codes for the next API requests.
        ignore_range: answer 200 with everything to a Range request.
        corrupt: flip the first byte of large files.
    """

    url: str
    cdn: str
    repos: dict[str, Repo] = field(default_factory=dict)
    token: str | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    fail: list[int] = field(default_factory=list)
    ignore_range: bool = False
    corrupt: bool = False

    def asked(self, method: str, ending: str) -> list[dict[str, str]]:
        """Headers of the requests of a method for paths that end so."""
        return [headers for m, path, headers in self.requests if m == method and path.endswith(ending)]


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        hub: HubServer

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
            if path.startswith("/cdn/"):
                return self._cdn(path)
            if self.hub.fail:
                return self._answer(self.hub.fail.pop(0), b"{}")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            if found is None:
                return self._answer(404, b"{}")
            repo = self.hub.repos.get(found[1])
            if repo is None:  # the real hub says 401 to strangers, so that they cannot tell private from absent
                return self._error(401, "RepoNotFound", "Repository not found")
            if (found[2] or "main") not in (*repo.revisions, repo.commit):
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            if api:
                return self._info(found[1], repo)
            if repo.gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
                return self._error(401, "GatedRepo", "Access to this model is restricted")
            if found[3] not in repo.files:
                return self._error(404, "EntryNotFound", "Entry not found")
            self._file(repo, found[1], found[3])

        def _info(self, name: str, repo: Repo) -> None:
            siblings = []
            for file, data in repo.files.items():
                sibling = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                if len(data) > LFS_BYTES:
                    sibling["lfs"] = {"sha256": repo.etag(file), "size": len(data), "pointerSize": 134}
                else:
                    sibling["blobId"] = repo.etag(file)
                siblings.append(sibling)
            info = {"_id": "0", "id": name, "sha": repo.commit, "private": False, "gated": repo.gated, "tags": []}
            self._answer(200, json.dumps({**info, "siblings": siblings}).encode())

        def _file(self, repo: Repo, name: str, file: str) -> None:
            data, etag = repo.files[file], repo.etag(file)
            headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
            if len(data) <= LFS_BYTES:
                return self._answer(200, data, {**headers, "ETag": f'"{etag}"'})
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "ETag": '"of the redirect"'}
            self._answer(302, b"", {**headers, "Location": f"{self.hub.cdn}/cdn/{name}/{file}"})

        def _cdn(self, path: str) -> None:
            owner, name, file = path.removeprefix("/cdn/").split("/", 2)
            data = self.hub.repos[f"{owner}/{name}"].files[file]
            if self.hub.corrupt:
                data = bytes([data[0] ^ 255]) + data[1:]
            begin, status, headers = 0, 200, {"ETag": '"of the cdn"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if wanted and not self.hub.ignore_range:
                begin, status = int(wanted[1]), 206
                end = min(len(data), int(wanted[2]) + 1) if wanted[2] else len(data)
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
                if begin >= len(data):
                    return self._answer(416, b"")
                data = data[:end]
            body = data[begin:]
            cuts = self.hub.cut.get(file, [])
            stop = cuts.pop(0) if cuts and self.command == "GET" else None
            if self.command == "GET":
                self.hub.sent[file] += len(body[:stop])
            self._answer(status, body, headers, stop)

        def _error(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._answer(status, json.dumps({"error": message}).encode(), headers)

        def _answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, stop: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body if stop is None else body[:stop])
            if stop is not None and stop < len(body):
                self.wfile.flush()
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port = server.server_address[1]
    # The same server under another name is another origin, as the hub's store of large files is.
    hub = Handler.hub = HubServer(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
