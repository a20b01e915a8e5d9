"""A server of OpenAI's chat completions on loopback that answers as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """requests: bodies, in order. deltas: of each answer; None: words without end.

    hung_up: set when a client went away amid an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.deltas: list[list[dict[str, str]] | None] = []
        self.refusal: str | None = None
        self.breaks_off = False
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.requests.append(json.loads(body))
        if server.refusal:
            text = json.dumps({"error": {"message": server.refusal}}).encode()
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deltas = server.deltas.pop(0)
        try:
            if deltas is None:
                while not server.hung_up.wait(0.01):
                    self._event({"choices": [_choice({"content": "word "})]})
            for delta in deltas or []:
                self._event({"choices": [_choice(delta)]})
            if server.breaks_off:
                self.close_connection = True
                return
            usage = {"completion_tokens": 7, "prompt_tokens": 1, "total_tokens": 8}
            self._event({"choices": [], "usage": usage})
            self._send(b"data: [DONE]\n\n")
            self._send(b"")
        except OSError:
            server.hung_up.set()

    def _event(self, content: dict[str, Any]) -> None:
        fixed = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "any"}
        self._send(f"data: {json.dumps(fixed | content)}\n\n".encode())

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def _choice(delta: dict[str, str]) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": None}


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
