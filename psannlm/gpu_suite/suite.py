"""The names of checks and a device in; the battery GPU-01 to GPU-09, each check on its own, and their report, out."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from psannlm.benchmarks.harness.interleaved import Clock
from psannlm.errors import ConfigError, Interrupted, PsannlmError, nearest
from psannlm.gpu_suite.baseline import read_baseline, regressions
from psannlm.gpu_suite.checks.checkpoints import check_checkpoints
from psannlm.gpu_suite.checks.generation import check_compiled, check_generation
from psannlm.gpu_suite.checks.memory import check_memory
from psannlm.gpu_suite.checks.numerics import check_gradients, check_precision
from psannlm.gpu_suite.checks.parallel import check_ddp, check_fsdp
from psannlm.gpu_suite.checks.speed import check_speed
from psannlm.gpu_suite.context import DRY_RUN, FULL, CheckContext, Sizes
from psannlm.gpu_suite.report import CheckResult, SuiteReport
from psannlm.runtime.device import describe_device, pick_device

Check = Callable[[CheckContext], CheckResult]

CHECKS: dict[str, Check] = {
    "GPU-01": check_gradients,
    "GPU-02": check_precision,
    "GPU-03": check_speed,
    "GPU-04": check_memory,
    "GPU-05": check_ddp,
    "GPU-06": check_fsdp,
    "GPU-07": check_generation,
    "GPU-08": check_checkpoints,
    "GPU-09": check_compiled,
}


def validate(
    device: str = "cuda",
    *,
    only: Sequence[str] = (),
    baseline: Path | None = None,
    any_machine: bool = False,
    sizes: Sizes | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_report: Callable[[SuiteReport], None] = lambda report: None,
    clock: Clock = time.perf_counter,
) -> SuiteReport:
    """Run the checks (all, or ``only`` those named) and return what they came to.

    A check that breaks is a failed check with its message, and the others run all the same. On the CPU the sizes are
    small and rates are held against nothing: a rehearsal of the battery itself.

    Args:
        baseline: an earlier ``summary.json`` to compare with; ``any_machine``: even one of other hardware.
        sizes: None takes what suits the device.
        say: takes lines for people.
        on_report: takes what is known after each check: a battery that is killed leaves behind what was kept of these.

    Raises:
        PsannlmError: a GPU was asked for and is not there (exit code 1).
        ConfigError: a check is not known, or the baseline is of another machine.
        ArtifactError: the baseline cannot be read.
    """
    names = _chosen(only)
    chosen = require_device(device)
    is_dry_run = chosen.type == "cpu"
    machine = describe_machine(chosen)
    former = None
    if baseline is not None:
        former = read_baseline(baseline, machine, is_dry_run=is_dry_run, any_machine=any_machine)
    sizes = sizes or (DRY_RUN if is_dry_run else FULL)
    results: list[CheckResult] = []
    report = SuiteReport(machine, is_dry_run, (), None if baseline is None else str(baseline), to_come=tuple(names))
    with _settings(is_dry_run), tempfile.TemporaryDirectory(prefix="psannlm-gpu-") as folder:
        for name in names:
            context = CheckContext(chosen, sizes, is_dry_run, Path(folder) / name, say, clock)
            results.append(run_check(name, CHECKS[name], context))
            say(f"{name}: {results[-1].status} after {results[-1].seconds:,.1f} s")
            report = replace(
                report,
                results=tuple(results),
                regressions=() if former is None else tuple(regressions(results, former)),
                to_come=tuple(names[len(results) :]),
            )
            on_report(report)
    return report


def require_device(
    device: str, only: Sequence[str] = (), baseline: Path | None = None, *, any_machine: bool = False
) -> torch.device:
    """Return the device, after refusing all that :func:`validate` would refuse before its first check.

    Raises:
        PsannlmError: a GPU was asked for and is not there (exit code 1).
        ConfigError, ArtifactError: as :func:`validate` does.
    """
    _chosen(only)
    if device != "cpu" and not torch.cuda.is_available():
        raise PsannlmError(
            f"torch {torch.__version__} sees no GPU; psannlm gpu-validate --device cpu rehearses the battery on a CPU"
        )
    chosen = pick_device(device)
    if baseline is not None:
        machine, is_dry_run = describe_machine(chosen), chosen.type == "cpu"
        read_baseline(baseline, machine, is_dry_run=is_dry_run, any_machine=any_machine)
    return chosen


def run_check(name: str, check: Check, context: CheckContext) -> CheckResult:
    """Return what ``check`` came to; whatever breaks in it is its ``error``, and never passes for ok.

    So is what keeps the device from coming free behind it.
    """
    context.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        result = check(context)
    except Interrupted:
        # The user's own Ctrl-C, which a training run turns into this: the battery ends.
        raise
    except Exception as error:  # noqa: BLE001 - a check may break in any way, and must not hide the others
        for line in traceback.format_exc().splitlines():
            context.say(f"{name}: {line}")
        result = CheckResult(name, "", error=_told(error))
    finally:
        shutil.rmtree(context.folder, ignore_errors=True)
    failure = _release(context)
    if failure is not None:
        context.say(f"{name}: {failure}")
        result = replace(result, error=failure if result.error is None else f"{result.error}; {failure}")
    return replace(result, seconds=time.monotonic() - began)


def _release(context: CheckContext) -> str | None:
    """Wait for the device and free it for the next check; return in words what kept it from that, or None.

    A GPU that ran out of memory has work that failed still in its queue, and one whose kernel broke answers every later
    call with the same error: that is told of each check from then on, and takes none of what was measured before.
    """
    try:
        context.wait()
        context.release()
    except RuntimeError as error:
        return f"the device did not come free after the check: {_told(error)}"
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.500}"


def _chosen(only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in CHECKS:
            raise ConfigError(f"no check is called {name!r:.40}{nearest(name.upper(), CHECKS)}: {', '.join(CHECKS)}")
    return [name for name in CHECKS if not only or name in only]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what decides the figures, as plain data: hardware, versions, and how float32 is multiplied."""
    is_gpu = device.type == "cuda"
    machine: dict[str, Any] = {
        "device": device.type,
        "name": describe_device(device) if is_gpu else "CPU",
        "n_devices": torch.cuda.device_count() if is_gpu else 1,
        "threads": None if is_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_in_matmul": bool(torch.backends.cuda.matmul.allow_tf32) if is_gpu else False,
        "tf32_in_cudnn": bool(torch.backends.cudnn.allow_tf32) if is_gpu else False,
    }
    if is_gpu:
        properties = torch.cuda.get_device_properties(device)
        machine["memory_bytes"] = properties.total_memory
        machine["compute_capability"] = f"{properties.major}.{properties.minor}"
    return machine


@contextmanager
def _settings(is_dry_run: bool) -> Iterator[None]:
    """One thread for a rehearsal, whose matrices are smaller than what handing them over costs."""
    threads = torch.get_num_threads()
    if is_dry_run:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
