"""A battery's results and the summary of an earlier one in; what has become worse, in lines for people, out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psannlm.errors import ArtifactError, ConfigError
from psannlm.gpu_suite.report import CheckResult, Measure
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.reports.gpu_tables import is_dry_run_summary

# What must be the same for two sets of figures to be comparable.
_IDENTITY = ("device", "name", "n_devices", "threads")


def read_baseline(path: Path, machine: dict[str, Any], *, is_dry_run: bool, any_machine: bool) -> dict[str, Any]:
    """Return the content of an earlier ``summary.json`` (or of the folder that holds one).

    Raises:
        ArtifactError: it cannot be read, or is no such summary.
        ConfigError: it comes from another kind of machine and ``any_machine`` is not set, or one of the two is a
            rehearsal, whose sizes are others.
    """
    if path.is_dir():
        path = path / "summary.json"
    refuse_pointer(path, ArtifactError)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        former, was_dry_run = content["machine"], is_dry_run_summary(content)
        for check in content["checks"]:
            for measure in check["measures"]:
                measure["name"], measure["value"], check["check"], check["status"]
    except OSError as error:
        raise ArtifactError(f"the baseline {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is no summary.json of psannlm gpu-validate") from error
    if was_dry_run != is_dry_run:
        kinds = ("a dry run", "a run at full size")
        mine, theirs = (kinds[0 if flag else 1] for flag in (is_dry_run, was_dry_run))
        raise ConfigError(f"the baseline {path} is {theirs} and this is {mine}: their figures mean different things")
    differing = [
        f"{key} {former.get(key)} then, {machine[key]} now" for key in _IDENTITY if former.get(key) != machine[key]
    ]
    if differing and not any_machine:
        raise ConfigError(
            f"the baseline {path} comes from another machine ({'; '.join(differing)}); its figures say nothing about "
            "this one. Take --baseline-any-machine to compare all the same"
        )
    return dict(content)


def regressions(results: Sequence[CheckResult], baseline: dict[str, Any]) -> list[str]:
    """Return one line for each check that stopped working, each value that is gone, and each that is too much worse.

    Only checks that ran this time are compared; one that ran then and is skipped now is a line too.
    """
    former = {check["check"]: check for check in baseline["checks"]}
    lines = []
    for result in results:
        if result.check not in former or former[result.check]["status"] not in ("ok", "failed"):
            continue
        if result.status == "skipped":
            lines.append(f"{result.check}: ran in the baseline, and is skipped now: {result.skipped}")
            continue
        values = {measure["name"]: measure["value"] for measure in former[result.check]["measures"]}
        now = {measure.name: measure for measure in result.measures}
        if result.status != "error":
            gone = [name for name in values if name not in now]
            lines += [f"{result.check}: {name}: measured in the baseline, and not now" for name in gone]
        for name, measure in now.items():
            earlier = values.get(name)
            if isinstance(earlier, (int, float)) and (line := _worse(measure, float(earlier))):
                lines.append(f"{result.check}: {line}")
    return lines


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
