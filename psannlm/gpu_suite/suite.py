"""GPU validation suite: runs the checks GPU-01 to GPU-09 one by one and reports them."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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
from psannlm.io.atomic import explain_write_errors
from psannlm.io.filenames import utf8
from psannlm.reports.schemas.gpu import CheckResult, GpuMachine, SuiteReport
from psannlm.runtime.device import describe_device, pick_device
from psannlm.runtime.log import without_messages

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
    """Run the checks (all, or ``only`` those named) and return their results.

    A check that raises is an error with its message, and the others still run. On the CPU the suite is a dry run: the
    sizes are small, and no throughput limit applies.

    Args:
        baseline: an earlier ``summary.json`` to compare with; with ``any_machine`` also one of other hardware.
        sizes: sizes of the checks; None chooses by device.
        say: receives log lines.
        on_report: receives the report after each check, so that a run that is killed leaves the finished checks behind.

    Raises:
        PsannlmError: a GPU was requested and is not available (exit code 1).
        ConfigError: a check is unknown, or the baseline was measured on another machine.
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
    with _settings(is_dry_run), without_messages(), tempfile.TemporaryDirectory(prefix="psannlm-gpu-") as folder:
        for name in names:
            context = CheckContext(chosen, sizes, is_dry_run, Path(folder) / name, say, clock)
            results.append(run_check(name, CHECKS[name], context))
            say(f"{name}: {results[-1].status} after {results[-1].seconds:,.1f} s")
            report = replace(
                report,
                checks=tuple(results),
                regressions=() if former is None else tuple(regressions(results, former)),
                to_come=tuple(names[len(results) :]),
            )
            on_report(report)
    return report


def require_device(
    device: str, only: Sequence[str] = (), baseline: Path | None = None, *, any_machine: bool = False
) -> torch.device:
    """Return the device, after the same validation as :func:`validate` makes before its first check.

    Raises:
        PsannlmError: a GPU was requested and is not available (exit code 1).
        ConfigError, ArtifactError: as :func:`validate` does.
    """
    _chosen(only)
    if device != "cpu" and not torch.cuda.is_available():
        raise PsannlmError(
            f"torch {torch.__version__} sees no GPU; psannlm gpu-validate --device cpu is a dry run on a CPU"
        )
    chosen = pick_device(device)
    if baseline is not None:
        machine, is_dry_run = describe_machine(chosen), chosen.type == "cpu"
        read_baseline(baseline, machine, is_dry_run=is_dry_run, any_machine=any_machine)
    return chosen


def run_check(name: str, check: Check, context: CheckContext) -> CheckResult:
    """Run ``check`` and return its result; an exception in it becomes its ``error``.

    So does a failure to free the device afterwards.
    """
    context.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        result = check(context)
    except Interrupted:
        # Ctrl-C, which a training run turns into this error: the suite ends.
        raise
    except Exception as error:  # noqa: BLE001 - a kernel or library may raise anything, and the others must still run
        for line in traceback.format_exc().splitlines():
            context.say(f"{name}: {line}")
        result = CheckResult(name, "", error=_describe_error(error))
    finally:
        # The suite's temporary folder, which holds this one, is removed at the end too, and reports errors.
        shutil.rmtree(context.folder, ignore_errors=True)
    failure = _release(context)
    if failure is not None:
        context.say(f"{name}: {failure}")
        result = replace(result, error=failure if result.error is None else f"{result.error}; {failure}")
    return replace(result, seconds=time.monotonic() - began)


def _release(context: CheckContext) -> str | None:
    """Wait for the device and free its memory for the next check; return an error message, or None.

    A GPU that ran out of memory still has failed work in its queue, and one with a broken kernel fails every later call
    with the same error. Each later check then reports it; the measures of earlier checks stay.
    """
    try:
        context.wait()
        context.release()
    except RuntimeError as error:
        return f"the device could not be freed after the check: {_describe_error(error)}"
    return None


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.500}"


def _chosen(only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in CHECKS:
            raise ConfigError(f"{name!r:.40} is not a check{nearest(name.upper(), CHECKS)}: {', '.join(CHECKS)}")
    return [name for name in CHECKS if not only or name in only]


def describe_machine(device: torch.device) -> GpuMachine:
    """Return what determines the figures: hardware, versions, and float32 matrix precision."""
    is_gpu = device.type == "cuda"
    machine: GpuMachine = {
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
    """Use one thread in a dry run, whose matrices are too small for several."""
    threads = torch.get_num_threads()
    if is_dry_run:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SuiteLog:
    """Log file of the suite, complete up to the last line even if the process is killed.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.monotonic()
        with explain_write_errors(path):
            path.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        """Append one line, with the seconds since the start."""
        seconds = time.monotonic() - self._began
        self.add(f"{seconds:9.1f} s  {line}\n")

    def add(self, text: str) -> None:
        """Append text without a time, such as a table."""
        with explain_write_errors(self._path), open(self._path, "ab") as file:
            file.write(utf8(text))
