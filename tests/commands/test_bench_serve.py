"""psannlm bench-serve: exit codes, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psannlm.commands.app import build_app
from tests.benchmarks.serving.conftest import small_servers

runner = CliRunner()
SMALL = "--d-model 16 --n-layers 1 --n-heads 2 --vocab-size 300 --prompt-tokens 8 --new-tokens 4".split()
LOADS = "--concurrency 1,2 --requests 4 --repeats 1 --max-batch 2 --check 3".split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,x"], "not a list of numbers above 0"),
        (["--concurrency", "0"], "not a list of numbers above 0"),
        (["--rate", "nan"], "not a list of numbers above 0"),
        (["--seconds", "soon"], "not a duration"),
        (["model.safetensors", "--d-model", "64"], "sizes of its own"),
    ],
)
def test_bench_serve_refuses_wrong_usage(options: list[str], message: str) -> None:
    result = runner.invoke(build_app(), ["bench-serve", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_bench_serve_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from psannlm.benchmarks.serving import servers
    from psannlm.errors import ConfigError
    from psannlm.serving import http_process

    monkeypatch.setattr(http_process, "find_spec", lambda name: None if name == "uvicorn" else "found")
    with pytest.raises(ConfigError, match=r"the server needs uvicorn; .*\.\[serve\]"):
        servers.require_servers([])
    monkeypatch.setattr(http_process, "find_spec", lambda name: "found")
    monkeypatch.setattr(servers, "find_spec", lambda name: None if name in ("fastapi", "llama_cpp") else "found")
    servers.require_servers([])
    with pytest.raises(ConfigError, match=r"needs fastapi: .*pip install -c constraints.txt fastapi; or leave out"):
        servers.require_servers(["transformers"])
    with pytest.raises(ConfigError, match="needs llama-cpp-python fastapi"):
        servers.require_servers(["llama.cpp"])
    with pytest.raises(ConfigError, match=r"did you mean 'llama.cpp'\?"):
        servers.require_servers(["llama-cpp"])


@pytest.mark.slow
def test_bench_serve_wrong_answers_exit_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, with the real engine, on a server whose answers are not the engine's."""
    pytest.importorskip("h11")
    from psannlm.benchmarks.serving import servers
    from psannlm.errors import LimitMissed

    monkeypatch.setattr(servers, "ours", lambda *args, **options: small_servers(tmp_path)("right"))
    out = tmp_path / "out"
    result = runner.invoke(build_app(), ["bench-serve", *SMALL, *LOADS, "--json", "--out", str(out)])
    assert isinstance(result.exception, LimitMissed)
    assert result.exception.exit_code == 3
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert figures == {key: value for key, value in json.loads(result.stdout).items() if key != "folder"}
    assert figures["check"]["wrong"] == 3
    assert {path.name for path in out.iterdir()} == {"metrics.json", "system.json", "table.txt", "serving.png"}
    assert "2 clients" in (out / "table.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loads", "soak"])
def test_bench_serve_finds_our_server_right(kind: str, tmp_path: Path) -> None:
    """The whole command on the real server: every answer is the engine's, nothing is lost, and it stops cleanly."""
    pytest.importorskip("starlette")
    out = tmp_path / "out"
    options = LOADS if kind == "loads" else "--soak --concurrency 16 --requests 150 --check 60 --max-batch 4".split()
    result = runner.invoke(build_app(), ["bench-serve", *SMALL, *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert figures["problems"] == []
    assert figures["servers"][0]["exit_code"] == 0
    assert figures["check"]["wrong"] == 0
    if kind == "soak":
        assert (figures["soak"]["lost"], figures["soak"]["unrefused"]) == (0, 0)
        assert figures["check"]["compared"] == 60
