"""Steps on disk: what is loaded computes as what was compiled, with the weights of the process that loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psannlm.errors import StorageError
from psannlm.generation import step_cache
from psannlm.generation.engine import Engine
from psannlm.io.cache import CACHE_VARIABLE
from psannlm.kernels.compiler import has_compiler
from psannlm.kernels.torch_private import can_compile_ahead
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
SIZES = {"base": "waveresnet", "n_layers": 1, "d_model": 16, "d_mlp": 32, "max_seq_len": 400}
CAN_COMPILE = has_compiler(torch.device("cpu")) and can_compile_ahead()


def compile_nothing(*args: object) -> Any:
    raise AssertionError("compiled, although the cache has the step")


def decoded(engine: Engine, n: int = 40) -> Tensor:
    """Return the logits (n, 2, V) of two rows that grow from one block of slots into another."""
    logits, state = engine.prefill([[1, 5, 9], [2] * 20], 1)
    found = []
    for _ in range(n):
        logits = engine.decode(logits.argmax(-1), state)
        found.append(logits)
    return torch.stack(found)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, build_tiny: Build) -> Iterator[Path]:
    """Yield the file of a step that was compiled."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(CACHE_VARIABLE, str(folder))
        decoded(Engine(build_tiny(**SIZES), compile=True), 1)
        (path,) = (folder / "steps").iterdir()
        yield path


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="there is no compiler whose result can be kept")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_step_loaded_from_disk_uses_own_weights(
    seed: int, kept: Path, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(seed, **SIZES)
    monkeypatch.setattr(step_cache, "compiled_ahead", compile_nothing)
    found = decoded(Engine(model, compile=True))
    torch.testing.assert_close(found, decoded(Engine(model)), rtol=0, atol=3e-4)
    assert (decoded(Engine(model, compile=True)) == found).all()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="there is no compiler whose result can be kept")
@pytest.mark.filterwarnings("ignore")
def test_step_of_damaged_file_is_compiled_again(kept: Path, build_tiny: Build) -> None:
    engine = Engine(build_tiny(**SIZES), compile=True)
    wanted, content = decoded(engine), kept.read_bytes()
    isa, _, step = content.partition(b"\n")
    for damaged in (b"", content[:-1000], b"?" * 999, isa + b"\n", isa + b"\n?" * 99, b"vsx\n" + step):
        kept.write_bytes(damaged)
        assert step_cache._load(kept, {"model": engine.model}, {}) is None
    assert (decoded(Engine(build_tiny(**SIZES), compile=True)) == wanted).all()
    assert kept.read_bytes().startswith(isa + b"\n")


class Scaled(nn.Module):
    """A model whose output depends on a plain number, a flag and a tensor."""

    def __init__(self, factor: float = 2.0, width: int = 3) -> None:
        super().__init__()
        self.factor, self.names = factor, {"b", "a", "c"}
        self.weight = nn.Parameter(torch.ones(width))


def make_step(n: int) -> Callable[..., int]:
    return lambda model, x: n


class Compilers:
    """Stands in for the compiler: a step's bytes are its number, of which it keeps count."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n_compiled = 0
        for name in ("compiled_ahead", "dump_compiled", "load_compiled"):
            patch.setattr(step_cache, name, getattr(self, name))
        patch.setattr(step_cache, "can_compile_ahead", lambda: True)
        patch.setattr(step_cache, "load_realize", lambda: None)

    def compiled_ahead(self, *args: object) -> Callable[..., int]:
        self.n_compiled += 1
        return make_step(self.n_compiled)

    def dump_compiled(self, ahead: Callable[..., int], modules: object) -> bytes:
        return b"%d" % ahead(None, None)

    def load_compiled(self, content: bytes, modules: object, options: object) -> Callable[..., int]:
        return make_step(int(content))


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compilers:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return Compilers(monkeypatch)


def asked(n: int = 1, model: nn.Module | None = None, x: Tensor | None = None, **options: object) -> int:
    """Return the number of the step that is given out."""
    args = (torch.zeros(2, 3) if x is None else x,)
    found: int = step_cache.compiled_step(make_step(n), model or Scaled(), args, options)(None, None)
    return found


def test_step_is_compiled_once_for_equal_code(compilers: Compilers) -> None:
    first = asked()
    other_weights = Scaled()
    nn.init.normal_(other_weights.weight)
    assert asked() == asked(model=other_weights) == asked(x=torch.ones(2, 3)) == first
    threads = torch.get_num_threads()
    different = [
        asked(n=2),
        asked(model=Scaled(3.0)),
        asked(model=Scaled(width=4)),
        asked(model=Scaled().double()),
        asked(model=Scaled().eval()),
        asked(x=torch.zeros(3, 3)),
        asked(x=torch.zeros(3, 2).t()),
        asked(x=torch.zeros(2, 3).double()),
        asked(fast=True),
    ]
    torch.set_num_threads(threads + 1)
    try:
        different.append(asked())
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        different.append(asked())
    assert len({first, *different}) == 1 + len(different) == compilers.n_compiled
    assert asked() == first


@pytest.mark.slow
def test_step_name_is_same_in_every_process(tmp_path: Path) -> None:
    program = """
import torch
from torch import nn
from psannlm.config.model import ModelConfig
from psannlm.generation import step_cache
from psannlm.models.registry import build_model, resolve
model = build_model(resolve(ModelConfig(base="waveresnet", d_model=16, n_layers=1, n_heads=2, vocab_size=17)), seed=0)
print(step_cache._fingerprint(lambda model, x: x, model, (torch.zeros(2),), {"a": 1}))
"""
    names = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert names[0] == names[1] != ""


def test_step_cache_is_read_under_any_umask(compilers: Compilers) -> None:
    before = os.umask(0o002)
    try:
        assert asked() == asked() == 1
    finally:
        os.umask(before)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the platform has no owners of files")
def test_step_file_that_others_can_write_is_not_read(compilers: Compilers, tmp_path: Path) -> None:
    """What is unpickled can run code."""
    assert asked() == asked() == 1
    folder = tmp_path / "cache" / "steps"
    (path,) = folder.iterdir()
    path.chmod(0o666)
    assert asked() == asked() == 2, "a new file takes its place"
    folder.chmod(0o777)
    assert asked() == 3
    assert asked() == 4


def test_step_cache_that_cannot_be_written_stops_nothing(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise StorageError(f"could not write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step_cache, "write_bytes", fail)
        assert asked() == 1
        assert asked() == 2
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert asked() == 3


def test_step_cache_keeps_what_was_used_last(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step_cache, "_MAX_FILES", 3)
    for n in range(3):
        asked(n)
        for at, path in enumerate(sorted((tmp_path / "cache" / "steps").iterdir(), key=lambda path: path.read_bytes())):
            os.utime(path, (1_000_000 + at, 1_000_000 + at))
    assert asked(0) == 1, "is the one used last from now on"
    assert asked(3) == 4
    assert (asked(0), asked(2), asked(3)) == (1, 3, 4)
    assert compilers.n_compiled == 4
    assert asked(1) == 5
