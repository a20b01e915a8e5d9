"""A hub of the tests' own on the loopback interface: what huggingface_hub asks of the real one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
HUGE_BYTES = 1 << 50  # what is said of a file with .huge. in its name


def serve(repositories: dict[str, Path], gated: tuple[str, ...] = ()):
    """`with serve({"org/name": folder}) as hub`: its address, and what was asked of it."""

    class Handler(BaseHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            self.line = f"{self.command} {path}"
            parts = path.split("/")
            name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
            if name in gated:
                return self.say(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
            if name not in repositories:
                return self.say(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            folder = repositories[name]
            if parts[:2] == ["api", "models"]:
                rest = parts[4:]
                if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                    return self.say(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                found = _tree(folder) if rest[:1] == ["tree"] else _model(name, folder)
                return self.say(200, json.dumps(found).encode(), body, {})
            file = folder / "/".join(parts[4:])
            if asked := self.headers.get("Range"):
                return self.say_range(file, asked, body)
            data = file.read_bytes()
            size = HUGE_BYTES if ".huge." in path else len(data)
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(size)}
            etag = hashlib.sha1(data).hexdigest()
            return self.say(200, data, body, headers | {"ETag": f'"{etag}"'})

        def say_range(self, file: Path, asked: str, body: bool) -> None:
            """Of a file that may be larger than the memory."""
            first, _, last = asked.removeprefix("bytes=").partition("-")
            with open(file, "rb") as opened:
                opened.seek(int(first))
                data = opened.read(int(last) + 1 - int(first))
            self.line += f" {len(data)} bytes"
            end = int(first) + len(data) - 1
            of = f"bytes {first}-{end}/{file.stat().st_size}"
            self.say(206, data, body, {"X-Repo-Commit": COMMIT, "Content-Range": of})

        def say(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
            self.asked.append(self.line)
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    @contextmanager
    def running() -> Iterator[tuple[str, list[str]]]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", Handler.asked
        finally:
            server.shutdown()
            server.server_close()

    return running()


def environment(cache: Path, address: str, **more: str) -> dict[str, str]:
    """huggingface_hub reads it when it is imported, so each use is a process of its own."""
    others = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    own = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    quick = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2", "NO_PROXY": "127.0.0.1"}
    return others | own | quick | more


def _names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _model(name: str, folder: Path) -> dict[str, object]:
    return {
        "id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": False,
        "disabled": False, "downloads": 0, "likes": 0, "tags": [],
        "siblings": [
            {"rfilename": file, "size": (folder / file).stat().st_size} for file in _names(folder)
        ],
    }  # fmt: skip


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": name,
            "size": (folder / name).stat().st_size,
            "oid": hashlib.sha1((folder / name).read_bytes()).hexdigest(),
        }
        for name in _names(folder)
    ]
