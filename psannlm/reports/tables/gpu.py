"""Tables and headlines of a GPU validation (``reports/gpu/<ts>/summary.json``)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from psannlm.reports.page_model import Headline, Table, format_value
from psannlm.reports.schemas.gpu import CheckResult, Measure, SuiteReport

# Throughput that others published for this model size: a headline where it was measured.
_PUBLISHED_FOR = ("respsann, 131,072 tokens: forward", "waveresnet, 131,072 tokens: forward")
# "respsann, 131,072 tokens: forward"
_RATE_NAME = re.compile(r"(?P<base>[a-z]+), (?P<tokens>[0-9,]{1,20}) tokens: (?P<figure>.+)")
_BYTES = {"MB": 1e6, "GB": 1e9}
_HEADINGS = ("measured", "value", "limit", "unit", "verdict", "why this limit")


def suite_tables(report: SuiteReport) -> list[Table]:
    """Return the verdict of each check, regressions against the baseline, and every value with its limit.

    The values of a failed check are shown, those of other checks are folded.
    """
    measured = [check for check in report.checks if check.measures or check.notes]
    return [_checks(report), *_regressions(report), *(_measures(check) for check in measured)]


def _checks(summary: SuiteReport) -> Table:
    machine = summary.machine
    rows = [
        [check.check, check.title, check.status, format_value(check.seconds, 3), _result(check)]
        for check in summary.checks
    ]
    title = f"{machine['n_devices']} × {machine['name']}, torch {machine['torch']}: {summary.verdict}"
    dry_run = "A dry run at small sizes: no throughput limit applies. " if summary.is_dry_run else ""
    baseline = f" Compared with {summary.baseline}." if summary.baseline else ""
    headings = ("check", "subject", "verdict", "seconds", "result")
    note = f"{dry_run}The tables below hold each value and its limit.{baseline}"
    return Table(title, headings, rows, frozenset({3}), note)


def _result(check: CheckResult) -> str:
    if check.error is not None:
        return check.error
    if check.skipped is not None:
        return check.skipped
    if check.missed:
        return "; ".join(f"{_name(m)}: {_number(m.value)} {m.unit} ({_limit(m)})" for m in check.missed)
    return f"{len(check.measures)} limits met" if check.measures else "nothing was measured"


def _regressions(summary: SuiteReport) -> Iterator[Table]:
    if summary.regressions:
        yield Table("Worse than the baseline", ("what",), [[line] for line in summary.regressions])


def _measures(check: CheckResult) -> Table:
    rows = [[_name(m), _value(m), _limit(m), m.unit, "ok" if m.is_met else "missed", m.reason] for m in check.measures]
    is_open = check.status in ("failed", "error")
    title = f"{check.check}, {check.title}: {check.status}"
    return Table(title, _HEADINGS, rows, frozenset({1, 2}), "; ".join(check.notes), is_folded=not is_open)


def _name(measure: Measure) -> str:
    return f"{measure.name} ({measure.detail})" if measure.detail else measure.name


def _value(measure: Measure) -> str:
    if measure.spread is None:
        return _number(measure.value)
    lowest, highest = measure.spread
    return format_value({"median": measure.value, "lowest": lowest, "highest": highest})


def _number(value: float) -> str:
    return format_value(value) if math.isfinite(value) else str(value)


def _limit(measure: Measure) -> str:
    return f"{'≤' if measure.side == 'at most' else '≥'} {format_value(measure.limit)}"


def suite_headlines(summary: SuiteReport) -> list[Headline]:
    """Return the number of checks that passed, and throughput beside published figures."""
    ran = [check for check in summary.checks if check.status != "skipped"]
    n_passed = sum(check.status == "ok" for check in ran)
    kind = "dry run on " if summary.is_dry_run else ""
    n_skipped = len(summary.checks) - len(ran)
    skipped = f"; {n_skipped} skipped" if n_skipped else ""
    of = f"{kind}{summary.machine['n_devices']} × {summary.machine['name']}: {summary.verdict}{skipped}"
    found = [Headline(f"{n_passed} of {len(ran)}", "checks", "GPU validation", of)]
    for check in summary.checks:
        for measure in check.measures:
            # A dry run has a limit of 0.
            if measure.name in _PUBLISHED_FOR and measure.limit > 0:
                why = f"at least {format_value(measure.limit)}: {measure.reason}"
                found.append(Headline(format_value(measure.value), measure.unit, measure.name, why))
    return found


def suite_rates(report: SuiteReport) -> Iterator[dict[str, Any]]:
    """Yield a row, as :func:`psannlm.reports.tables.generic.rate_rows` does, of every value in tokens per second."""
    for check, measure in _finite_measures(report):
        if measure.unit == "tokens/s":
            named = _RATE_NAME.fullmatch(measure.name)
            lowest, highest = measure.spread or (None, None)
            yield {
                "name": f"{check.check} / {measure.name}",
                "base": named["base"] if named else None,
                "batch_tokens": int(named["tokens"].replace(",", "")) if named else None,
                "figure": f"{named['figure'].replace(' ', '_') if named else 'rate'}_tokens_per_s",
                "tokens_per_s": measure.value,
                "tokens_per_s_lowest": lowest,
                "tokens_per_s_highest": highest,
            }


def suite_memory(report: SuiteReport) -> Iterator[dict[str, Any]]:
    """Yield ``name``, ``figure`` and ``bytes`` of every value that is an amount of memory; else as for rates."""
    for check, measure in _finite_measures(report):
        if measure.unit in _BYTES:
            n_bytes = measure.value * _BYTES[measure.unit]
            yield {
                "name": f"{check.check} / {measure.name}",
                "figure": "peak_bytes",
                "bytes": round(n_bytes) if math.isfinite(n_bytes) else None,
                "grad_checkpoint": _recomputes(measure.name),
                "wall_time_s": check.seconds,
                "wall_time_of": "the check",
            }


def _recomputes(name: str) -> bool | None:
    """Whether activations were recomputed, by the name of a memory measurement; None where it does not mention them."""
    return True if "recomputing activations" in name else False if "keeping activations" in name else None


def _finite_measures(report: SuiteReport) -> Iterator[tuple[CheckResult, Measure]]:
    for check in report.checks:
        for measure in check.measures:
            if math.isfinite(measure.value):
                yield check, measure
