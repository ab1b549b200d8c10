"""``psannlm serve``: what is refused before the port opens, and a server's life as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.models.artifact import save_model
from psannlm.models.transformer import Transformer

from .conftest import Outcome

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

Psannlm = Callable[..., Outcome]
PROMPT = "sesame opens"


@pytest.fixture
def without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which the port opens."""

    def run(bound: Any) -> None:
        raise AssertionError("the port has opened")

    monkeypatch.setattr("psannlm.serving.sockets.start_listening", run)


def refused(psannlm: Psannlm, *arguments: str, code: int = 2) -> str:
    outcome = psannlm("serve", *arguments)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    return outcome.err


@pytest.mark.usefixtures("without_a_server")
def test_serve_refuses_a_port_in_use(psannlm: Psannlm, trained: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused(psannlm, str(trained / "runs/tiny"), "--port", str(port))
    assert said == f"error: port {port} on 127.0.0.1 is in use; end what uses it, or give another --port\n"


@pytest.mark.usefixtures("without_a_server")
def test_serve_refuses_a_model_without_tokenizer(
    psannlm: Psannlm, tmp_path: Path, build_tiny: Callable[..., Transformer]
) -> None:
    save_model(tmp_path / "bare.safetensors", build_tiny(), None)
    said = refused(psannlm, str(tmp_path / "bare.safetensors"), "--port", "0", code=1)
    assert "bare.safetensors has no tokenizer" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("without_a_server")
def test_serve_refuses_a_batch_larger_than_memory(
    psannlm: Psannlm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.serving.engine_host.machine_memory_bytes", lambda: 2_000_000)
    said = refused(psannlm, str(trained / "runs/tiny"), "--port", "0", "--max-batch", "1000")
    assert "1,000 rows of 16 tokens need" in said
    assert "lower --max-batch" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("without_a_server")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])
def test_serve_refuses_other_hosts_without_a_key(host: str, psannlm: Psannlm, trained: Path) -> None:
    assert "give --api-key-file" in refused(psannlm, str(trained / "runs/tiny"), "--host", host)


@pytest.mark.usefixtures("without_a_server")
@pytest.mark.parametrize("content", [b"", b"short\n", b"\n0123456789abcdef", b"0123456789 abcdef", "é".encode() * 20])
def test_serve_refuses_weak_keys_without_printing_them(
    content: bytes, psannlm: Psannlm, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(content)
    said = refused(psannlm, str(trained / "runs/tiny"), "--api-key-file", str(tmp_path / "key"))
    assert "is not a key of 16 or more" in said
    assert "short" not in said
    assert "no file at" in refused(psannlm, str(trained / "runs/tiny"), "--api-key-file", str(tmp_path / "none"))


@pytest.mark.usefixtures("without_a_server")
def test_serve_without_its_extra_names_it(psannlm: Psannlm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = refused(psannlm, str(trained / "runs/tiny"))
    assert "the server needs uvicorn; run pip install -c constraints.txt '.[serve]'" in said


@pytest.fixture
def served_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the model that a server lists, which ends once it has listed one."""
    from psannlm.serving import sockets
    from psannlm.serving.engine_host import EngineHost

    names: list[str] = []
    ports: list[int] = []
    listen = sockets.start_listening

    def start_listening(bound: socket.socket) -> None:
        listen(bound)
        ports.append(bound.getsockname()[1])

    def run(host: EngineHost) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/v1/models", timeout=30) as answer:
            names.append(json.loads(answer.read())["data"][0]["id"])
        return False

    monkeypatch.setattr(sockets, "start_listening", start_listening)
    monkeypatch.setattr(EngineHost, "run", run)
    return names


def test_serve_escapes_an_undecodable_model_name(
    psannlm: Psannlm, trained: Path, tmp_path: Path, served_names: list[str]
) -> None:
    """JSON cannot hold such a name: every answer of the server would fail."""
    run = tmp_path / os.fsdecode(b"caf\351")
    try:
        shutil.copytree(trained / "runs/tiny", run)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    assert psannlm("serve", str(run), "--port", "0").code == 0
    assert served_names == ["caf\\xe9"]


def test_serve_without_a_path_serves_newest_run(
    psannlm: Psannlm, trained: Path, tmp_path: Path, served_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint under runs/; make one with: psannlm train" in refused(psannlm, code=1)
    shutil.copytree(trained / "runs/tiny", tmp_path / "runs/older")
    shutil.copytree(trained / "runs/tiny", tmp_path / "runs/newer")
    for age_s, name in enumerate(("newer", "older")):
        for path in (tmp_path / "runs" / name).rglob("*"):
            os.utime(path, (1e9 - age_s, 1e9 - age_s))
    assert psannlm("serve", "--port", "0").code == 0
    assert served_names == ["newer"]


class Process:
    """A server in a process of its own."""

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "psannlm", "serve", str(model), "--port", "0", *arguments]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
        assert self.child.stderr is not None
        first = self.child.stderr.readline()
        assert first.startswith(f"preparing {model}"), first
        first = self.child.stderr.readline()
        assert first.startswith("serving "), first
        self.url = first.split()[-1]

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Transformer]) -> Path:
    """A model whose texts take seconds."""
    from psannlm.tokenizers.resolve import fit_tokenizer

    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    tokenizer = fit_tokenizer(["the sea and the tide"], "simple")
    save_model(path, build_tiny(vocab_size=tokenizer.vocab_size, max_seq_len=2000, n_layers=4), tokenizer)
    return path


@pytest.mark.slow
def test_serve_sigterm_ends_open_requests_and_refuses_new(large: Path) -> None:
    server = Process(large, "--max-tokens", "1500")
    long = {"model": "large.safetensors", "prompt": PROMPT, "max_tokens": 800, "seed": 1, "temperature": 1}
    content = json.dumps({**long, "stream": True}).encode()
    request = urllib.request.Request(server.url + "v1/completions", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        began = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused_new, text = server.ask("v1/completions", {**long, "max_tokens": 1})
        assert (refused_new, json.loads(text)["error"]["code"]) == (503, "shutting_down")
        assert server.ask("health")[0] == 503
        *_, last, done = (line for line in answer.read().splitlines() if line)
    _, err = server.child.communicate(timeout=30)
    assert done == b"data: [DONE]"
    assert json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert server.child.returncode == 0
    assert time.monotonic() - began < 30
    assert err.splitlines() == ["ending: open requests have 25 s; press Ctrl-C again to cut them off", "ended"]


@pytest.mark.slow
def test_serve_prints_neither_prompts_nor_tracebacks(large: Path) -> None:
    server = Process(large)
    for body in (
        {"prompt": PROMPT},
        {"model": "large.safetensors", "prompt": PROMPT},
        {"prompt": [PROMPT] * 500},
        [PROMPT],
    ):
        server.ask("v1/completions", body)
    server.ask(f"v1/{'sesame'}")
    server.child.send_signal(signal.SIGINT)
    out, err = server.child.communicate(timeout=30)
    assert server.child.returncode == 0
    assert err == "ended\n"
    assert not out


@pytest.mark.slow
def test_serve_without_its_http_process_ends_with_an_error(large: Path) -> None:
    server = Process(large)
    (http,) = Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text().split()
    os.kill(int(http), signal.SIGKILL)
    _, err = server.child.communicate(timeout=30)
    assert server.child.returncode == 1
    assert err == "error: the HTTP process of the server ended with signal 9 (SIGKILL); start the server again\n"


@pytest.mark.slow
def test_http_process_ends_with_a_killed_server(large: Path) -> None:
    server = Process(large)
    (http,) = Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text().split()
    server.child.kill()
    server.child.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{http}").exists() and "Z" not in Path(f"/proc/{http}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_to_both_processes_finishes_open_requests(large: Path) -> None:
    """As systemd and container runtimes send it: to every process of the service."""
    server = Process(large, "--max-tokens", "1500")
    (http,) = Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text().split()
    content = json.dumps({"prompt": PROMPT, "max_tokens": 300, "seed": 1, "stream": True}).encode()
    request = urllib.request.Request(server.url + "v1/completions", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        os.kill(int(http), signal.SIGTERM)
        server.child.send_signal(signal.SIGTERM)
        *_, done = (line for line in answer.read().splitlines() if line)
    server.child.communicate(timeout=30)
    assert done == b"data: [DONE]"
    assert server.child.returncode == 0
