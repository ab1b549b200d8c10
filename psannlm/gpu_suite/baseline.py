"""Regression check of the GPU validation suite against the summary of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from psannlm.errors import ArtifactError, ConfigError
from psannlm.io.artifact_schema import read_figures
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.readers import Unreadable, read_json
from psannlm.reports.schemas.gpu import CheckResult, GpuMachine, Measure, SuiteReport

# Parts of measures' names in earlier summaries, and what they are now.
_FORMER_NAMES = {
    "floor of memory / step": "roofline / step",
    "rows that their company changes": "rows that the batch changes",
    "losses or gradients that are no numbers": "non-finite losses or gradients",
    "steps made again after an overflow": "steps repeated after an overflow",
    "weights that are others on the CPU": "weights that differ on the CPU",
    "weights that are others back on the device": "weights that differ back on the device",
    "optimiser state that is another": "optimizer state that differs",
}
# Figures are only comparable if these are equal.
_IDENTITY = ("device", "name", "n_devices", "threads")


def read_baseline(path: Path, machine: GpuMachine, *, is_dry_run: bool, any_machine: bool) -> SuiteReport:
    """Read an earlier ``summary.json``, given by its path or its folder.

    Raises:
        ArtifactError: the file cannot be read, or is not such a summary.
        ConfigError: it was measured on other hardware and ``any_machine`` is not set, or only one of the two runs is a
            dry run, which has smaller sizes.
    """
    if path.is_dir():
        path = path / "summary.json"
    refuse_pointer(path, ArtifactError)
    if not path.is_file():
        raise ArtifactError(f"the baseline {path} cannot be read: it is not a file")
    try:
        # The user named it, so that a link is followed.
        report = read_figures(SuiteReport, read_json(path.resolve()))
    except Unreadable as error:
        raise ArtifactError(f"{path} is not a summary.json of psannlm gpu-validate: {error}") from error
    former, was_dry_run = report.machine, report.is_dry_run
    if was_dry_run != is_dry_run:
        kinds = ("a dry run", "a run at full size")
        mine, theirs = (kinds[0 if flag else 1] for flag in (is_dry_run, was_dry_run))
        raise ConfigError(f"the baseline {path} is {theirs} and this is {mine}: their figures are not comparable")
    differing = [
        f"{key}: {former.get(key)} in the baseline, {machine.get(key)} here"
        for key in _IDENTITY
        if former.get(key) != machine.get(key)
    ]
    if differing and not any_machine:
        raise ConfigError(
            f"the baseline {path} was measured on another machine ({'; '.join(differing)}); its figures are not "
            "comparable. Use --baseline-any-machine to compare anyway"
        )
    return report


def regressions(results: Sequence[CheckResult], baseline: SuiteReport) -> list[str]:
    """Return one line for each check now skipped, each value now missing, and each value worse than allowed.

    Only checks of this run are compared.
    """
    former = {check.check: check for check in baseline.checks}
    lines = []
    for result in results:
        if result.check not in former or former[result.check].status not in ("ok", "failed"):
            continue
        if result.status == "skipped":
            lines.append(f"{result.check}: ran in the baseline, and is skipped now: {result.skipped}")
            continue
        values = {_present_name(measure.name): measure.value for measure in former[result.check].measures}
        now = {measure.name: measure for measure in result.measures}
        if result.status != "error":
            gone = [name for name in values if name not in now]
            lines += [f"{result.check}: {name}: measured in the baseline, and not now" for name in gone]
        for name, measure in now.items():
            earlier = values.get(name)
            if earlier is not None and math.isfinite(earlier) and (line := _worse(measure, earlier)):
                lines.append(f"{result.check}: {line}")
    return lines


def _present_name(name: str) -> str:
    """Return the present name of a measure that earlier versions named otherwise."""
    for former, present in _FORMER_NAMES.items():
        name = name.replace(former, present)
    return name


def _worse(measure: Measure, earlier: float) -> str | None:
    if measure.regression is None:
        return None
    if measure.side == "at most":
        is_worse = not measure.value <= earlier * (1.0 + measure.regression)
    else:
        is_worse = not measure.value >= earlier * (1.0 - measure.regression)
    if not is_worse:
        return None
    change = f" ({measure.value / earlier - 1.0:+.1%})" if earlier else ""
    return (
        f"{measure.name}: {measure.value:.4g} {measure.unit} now, {earlier:.4g} in the baseline{change}; "
        f"{measure.regression:.0%} worse is allowed"
    )
