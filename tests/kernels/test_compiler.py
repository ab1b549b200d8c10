"""The compiler: what it lacks is named, and one that is broken is found by a trial, of which the next process knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from psannlm.errors import DeviceError
from psannlm.kernels import compiler
from psannlm.kernels.compiler import require_compiler
from psannlm.training.plan import decide_compiling

CPU = torch.device("cpu")


def programs(monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    monkeypatch.setattr("psannlm.kernels.compiler.shutil.which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.setattr("psannlm.kernels.compiler.trial_failure", lambda kind, **trust: None)


def test_compile_on_cpu_needs_cpp_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch)
    with pytest.raises(DeviceError, match=r"install g\+\+.*set compile: false"):
        require_compiler(CPU)
    programs(monkeypatch, "clang++")
    require_compiler(CPU)


def test_compile_on_gpu_needs_triton_and_its_build_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("psannlm.kernels.compiler.find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    programs(monkeypatch, "gcc")
    with pytest.raises(DeviceError, match="pip install triton"):
        require_compiler(gpu)
    monkeypatch.setattr("psannlm.kernels.compiler.find_spec", lambda name: object())
    monkeypatch.setattr("psannlm.kernels.compiler.sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(DeviceError, match="python3-dev"):
        require_compiler(gpu)
    (tmp_path / "Python.h").touch()
    require_compiler(gpu)
    monkeypatch.setenv("CC", "icx -O2")
    with pytest.raises(DeviceError, match="install gcc"):
        require_compiler(gpu)
    programs(monkeypatch, "icx")
    assert compiler.has_compiler(gpu)


@pytest.mark.slow
def test_compiler_trial_detects_broken_compiler_once(tmp_path: Path) -> None:
    """With a compiler that is there and fails, asked for by name is refused, and auto does without."""
    for name in ("g++", "clang++", "c++"):
        fake = tmp_path / name
        fake.write_text("#!/bin/sh\necho 'fatal error: broken' >&2\nexit 1\n", encoding="ascii")
        fake.chmod(0o755)
    program = """
import torch
from psannlm.kernels.compiler import require_compiler
from psannlm.errors import DeviceError
from psannlm.training.plan import decide_compiling
cpu = torch.device("cpu")
is_compiled, line = decide_compiling("auto", cpu, 1e20)
assert not is_compiled and "trial failed" in line, line
try:
    require_compiler(cpu)
except DeviceError as error:
    assert "trial failed" in str(error) and "compile: false" in str(error), error
else:
    raise SystemExit("not refused")
"""
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CXX": str(tmp_path / "g++"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class _CompileError(RuntimeError):
    pass


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    """Return a setter of what every compilation raises."""

    def set_error(error: Exception) -> None:
        def fail(function: object, **settings: object) -> object:
            raise error

        monkeypatch.setattr(torch, "compile", fail)
        monkeypatch.setattr("psannlm.kernels.compiler.missing_to_compile", lambda device: None)
        compiler.trial_failure.cache_clear()

    yield set_error
    compiler.trial_failure.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_CompileError("CppCompileError: C++ compile error\n\nOutput:\nx.cpp:1:2: fatal error: broken"),
         "failed: x.cpp:1:2: fatal error: broken"),
        (PermissionError(13, "Permission denied", "/cache/x"), "Permission denied: '/cache/x'"),
        (NotADirectoryError(20, "Not a directory", "/file/x"), "Not a directory: '/file/x'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("/cache/x.so: failed to map segment from shared object"), "failed to map segment"),
        (KeyError("getpwuid(): uid not found: 4711"), "uid not found: 4711"),
        (subprocess.CalledProcessError(1, "g++"), "returned non-zero exit status 1"),
        (_CompileError("backend='inductor' raised:\nUserWarning: no target"), "failed: UserWarning: no target"),
        (_CompileError(""), "_CompileError"),
    ],
)  # fmt: skip
def test_compiler_trial_failure_names_cause_and_remedy(
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    fail_with: Callable[[Exception], None],
    tmp_path: Path,
) -> None:
    """A cache that may not be written to, or not be run from, fails as these exceptions say."""
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("psannlm.kernels.compiler.tempfile.gettempdir", lambda: "/tmp")
    fail_with(error)
    with pytest.raises(DeviceError) as refused:
        require_compiler(CPU)
    message = str(refused.value)
    assert said in message
    assert message.startswith("compile: true needs a working compiler; a trial failed: ")
    assert "which is missing" not in message
    assert "TMPDIR or TORCHINDUCTOR_CACHE_DIR names a folder" in message
    assert message.endswith("; repair it, or set compile: false")
    assert "\n" not in message
    is_compiled, line = decide_compiling("auto", CPU, 1e20)
    assert (is_compiled, said in (line or "")) == (False, True)


@pytest.mark.parametrize("place", ["TORCHINDUCTOR_CACHE_DIR", "temporary files", "Python environment"])
def test_compiler_trial_names_path_with_space(
    place: str, monkeypatch: pytest.MonkeyPatch, fail_with: Callable[[Exception], None]
) -> None:
    path = "/home/ada/My Projects/x"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", path if place.isupper() else "/tmp/cache")
    monkeypatch.setattr(
        "psannlm.kernels.compiler.tempfile.gettempdir", lambda: path if "temporary" in place else "/tmp"
    )
    monkeypatch.setattr(torch, "__path__", [path if "Python" in place else "/usr/lib/torch"])
    fail_with(_CompileError("CppCompileError: C++ compile error"))
    with pytest.raises(DeviceError, match=place) as refused:
        require_compiler(CPU)
    assert f"has a space in its path, {path!r}" in str(refused.value)


def test_compiler_trial_is_spared_while_compiler_is_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, program = tmp_path / "cache", tmp_path / "bin" / "g++"
    cache.mkdir()
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.setenv("PATH", str(program.parent))
    n_trials = 0
    error: Exception | None = _CompileError("fatal error: broken")

    def compile_tiny(function: Callable[..., object], **settings: object) -> Callable[..., object]:
        nonlocal n_trials
        n_trials += 1
        if error is not None:
            raise error
        return function

    def in_new_process() -> tuple[bool, int]:
        compiler.trial_failure.cache_clear()
        return compiler.trial_failure("cpu", trusts_note=True) is None, n_trials

    monkeypatch.setattr(torch, "compile", compile_tiny)
    assert in_new_process() == (False, 1)
    assert in_new_process() == (False, 2), "a failure is no reason to skip the next trial"
    error = None
    assert in_new_process() == (True, 3)
    assert in_new_process() == (True, 3)
    program.write_text("#!/bin/sh\n# another version\n", encoding="ascii")
    assert in_new_process() == (True, 4)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    assert in_new_process() == (True, 5)
    # Where doing without is an alternative, only a trial will do.
    assert compiler.compiler_fault(CPU) is None
    assert n_trials == 6
    compiler.trial_failure.cache_clear()
