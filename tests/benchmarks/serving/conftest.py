"""A small server of the protocol, as a script: right, wrong, broken or dead on request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.benchmarks.serving.servers import OURS, ServerSpec

_SCRIPT = """
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

kind, port = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: os._exit(7 if kind == "rude" else 0))
if kind == "dead":
    print("there is no such model")
    sys.exit(5)
served = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, {"data": [{"id": "small"}]})

    def event(self, text):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(text), text))
        self.wfile.flush()

    def do_POST(self):
        global served
        served += 1
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if kind == "dies" and served > 4:
            os._exit(9)
        if kind == "refuses" and served % 2:
            return self.answer(429, {"error": {"message": "the queue is full"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = [f"{asked['seed']} ", "one ", "two ", "three"]
        if kind == "wrong":
            words[2] = "too "
        for number, word in enumerate(words):
            if kind == "cuts" and number == 2:
                self.close_connection = True
                return
            choice = {"text": word, "finish_reason": None}
            self.event(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\\n\\n")
        last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": len(words)}}
        self.event(b"data: " + json.dumps(last).encode() + b"\\n\\n")
        self.event(b"data: [DONE]\\n\\n")
        self.wfile.write(b"0\\r\\n\\r\\n")


ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def small_server(tmp_path: Path) -> Callable[..., ServerSpec]:
    return small_servers(tmp_path)


def small_servers(folder: Path) -> Callable[..., ServerSpec]:
    """Return a function of (kind, name) that describes a server of a kind: right, wrong, cuts, refuses, dies, ..."""
    script = folder / "server.py"
    script.write_text(_SCRIPT, encoding="utf-8")

    def describe(kind: str, name: str = OURS) -> ServerSpec:
        return ServerSpec(name, kind, lambda port: [sys.executable, "-S", str(script), kind, str(port)], "/health")

    return describe
