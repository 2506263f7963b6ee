"""A small hub on loopback: what huggingface_hub asks for, of repositories in memory, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Run = Callable[..., subprocess.CompletedProcess]  # words of a verb, or Python, run to its end
LARGE = (".gguf", ".safetensors", ".model")  # kept by SHA-256, as git-lfs does; the rest by git's own hash


@dataclass
class SmallHub:
    """Serves `repos`, name -> file -> content, while the block runs. Faults:

    `break_at`: file -> bytes after which the connection breaks, once, and nothing is served until `repair()`;
    `damaged`: files whose content is not what their hash says; `gated`: repositories that ask for a token.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    break_at: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    is_down: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, file or route, Range
    n_bytes_sent: int = 0

    def __enter__(self) -> SmallHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, files: Mapping[str, bytes | Path]) -> None:
        self.repos[repo] = {n: f.read_bytes() if isinstance(f, Path) else f for n, f in files.items()}

    def add_folder(self, repo: str, folder: Path) -> None:
        self.add(repo, {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()})

    def repair(self) -> None:
        self.is_down = False
        self.break_at.clear()
        self.damaged.clear()

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + git_hash(content).encode())
        return digest.hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def content_hash(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        repo = "/".join(words[2:4] if is_api else words[:2])
        name = "/".join(words[4:])
        self.hub.asked.append((self.command, "api" if is_api else name, self.headers.get("Range")))
        if self.hub.is_down:
            self._send(503, b"")
        elif repo not in self.hub.repos:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo in self.hub.gated and "Authorization" not in self.headers:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif is_api:
            self._send(200, json.dumps(self._info(repo)).encode(), {"Content-Type": "application/json"})
        elif name not in self.hub.repos[repo]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        else:
            self._file(repo, name, with_body)

    def _info(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.hub.repos[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": content_hash(name, content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": []}

    def _file(self, repo: str, name: str, with_body: bool) -> None:
        content = self.hub.repos[repo][name]
        headers = {
            "ETag": f'"{content_hash(name, content)}"',
            "X-Repo-Commit": self.hub.commit(repo),
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if name in self.hub.damaged:
            content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
        first, status = 0, 200
        if given := self.headers.get("Range"):
            first, status = int(given.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(status, content[first:], headers, name if with_body else None)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, name: str | None = "") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD" or name is None:
            return
        breaks = self.hub.break_at.pop(name, None)
        if breaks is not None:
            self.hub.is_down = True
            body = body[:breaks]
        if name:
            self.hub.n_bytes_sent += len(body)
        self.wfile.write(body)
        if breaks is not None:
            self.wfile.flush()
            self.close_connection = True
