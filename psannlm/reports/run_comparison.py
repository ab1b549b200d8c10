"""Comparison of two or more runs: loss curves, differing settings and differences of their figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from psannlm.io.readers import number
from psannlm.reports.gather import Unread
from psannlm.reports.page_model import (
    Block,
    Document,
    Headline,
    Origin,
    Section,
    Table,
    describe_machine,
    format_value,
    lossy_mark,
    signed,
)
from psannlm.reports.pages import CURVE_FILE, drawn, loss_picture, origins_table, runs_table
from psannlm.reports.plots import Curve, draw_curves
from psannlm.reports.runs import RunRecord
from psannlm.tokenizers.roundtrip import LOSSY_NOTE


def compare_runs(runs: Sequence[RunRecord], origin: Origin, unread: list[Unread]) -> Document:
    """Return the page of two or more runs, with differences against the first.

    A picture that cannot be drawn is added to ``unread``.
    """
    first, *others = runs
    blocks: list[Block] = [_deltas_table(first, others), *drawn(CURVE_FILE, lambda: [loss_picture(runs)], unread)]
    timed = [(run, run.points()) for run in runs]
    if any(points for _, points in timed):
        curves = [
            Curve(run.name, [point[1] for point in points], [point[2] for point in points]) for run, points in timed
        ]
        caption = "The same validations against the time that training took; validations and checkpoints left out."
        label = "validation loss (nats per token)"
        file = "loss_by_time.png"
        blocks += drawn(file, lambda: [draw_curves(file, curves, "seconds of training", label, caption)], unread)
    sections = [
        Section(f"Against {first.name}", blocks),
        Section("Settings that differ", [differences_table(runs)]),
        Section("The runs", [runs_table(runs), origins_table(runs)]),
    ]
    headlines = [headline for run in others for headline in _headlines(first, run)]
    title = f"{first.name} and {', '.join(run.name for run in others)}"
    machines = {describe_machine(run.system) for run in runs}
    lead = "One run each: psannlm compare measures the spread over seeds."
    if len(machines) > 1:
        lead += " They ran on different machines: do not compare their throughput."
    return Document(title, lead, headlines[:6], sections, origin)


def _headlines(first: RunRecord, run: RunRecord) -> list[Headline]:
    delta = _delta(first.row.val_loss, run.row.val_loss)
    found = []
    if delta is not None:
        spread = shared_validations(first, run)
        of = "" if spread is None else f"at shared validations {_spread(spread)}"
        found.append(Headline(signed(delta, 3), "nats per token", f"{run.name}: best validation loss", of))
    ratio = _ratio(run, first)
    if ratio is not None:
        found.append(Headline(f"{ratio:.2f} ×", "", f"{run.name}: training throughput", f"of {first.name}, medians"))
    return found


def shared_validations(first: RunRecord, run: RunRecord) -> dict[str, float] | None:
    """Return median, lowest and highest of the difference in validation loss at the steps that both runs validated.

    Only the later half of those steps counts: earlier ones are dominated by warm-up. None where the runs
    validated at no common step.
    """
    theirs = {row["step"]: row["loss"] for row in first.eval_rows}
    deltas = [row["loss"] - theirs[row["step"]] for row in run.eval_rows if row["step"] in theirs]
    late = deltas[len(deltas) // 2 :]
    if not late:
        return None
    return {"median": statistics.median(late), "lowest": min(late), "highest": max(late), "n": len(late)}


def deltas(first: RunRecord, run: RunRecord) -> dict[str, Any]:
    """Return the differences of the figures of ``run`` from those of ``first``, as plain data."""
    ours, theirs = run.row, first.row
    names = ("val_loss", "bits_per_byte", "train_loss", "final_val_loss", "parameters", "peak_memory_bytes")
    return {
        "run": run.name,
        "against": first.name,
        **{name: _delta(getattr(theirs, name), getattr(ours, name)) for name in names},
        "lossy_tokenizer": bool(ours.lossy_tokenizer or theirs.lossy_tokenizer),
        "val_loss_at_shared_steps": shared_validations(first, run),
        "tokens_per_s_ratio": _ratio(run, first),
    }


def _deltas_table(first: RunRecord, others: Sequence[RunRecord]) -> Table:
    headings = (
        "run",
        "best validation loss, nats per token",
        "at shared validations, later half",
        "bits per byte",
        "training loss, last step",
        "tokens/s, ratio of medians",
        "tokens/s, lowest to highest",
        "parameters",
        "peak memory, MB",
    )
    rows = []
    for run in others:
        delta = deltas(first, run)
        rates = run.tokens_per_s
        shared = delta["val_loss_at_shared_steps"]
        peak = delta["peak_memory_bytes"]
        rows.append(
            [
                f"{run.name} minus {first.name}",
                signed(delta["val_loss"]),
                "–" if shared is None else _spread(shared),
                signed(delta["bits_per_byte"]) + lossy_mark(delta["lossy_tokenizer"]),
                signed(delta["train_loss"]),
                "–" if delta["tokens_per_s_ratio"] is None else f"{delta['tokens_per_s_ratio']:.3f}",
                "–" if rates is None else f"{format_value(rates['lowest'], 3)} to {format_value(rates['highest'], 3)}",
                _signed_whole(delta["parameters"]),
                _signed_whole(None if peak is None else round(peak / 1e6)),
            ]
        )
    note = "Below zero is lower than in the first run. In brackets the lowest and highest difference, and of how many."
    if any(deltas(first, run)["lossy_tokenizer"] for run in others):
        note += LOSSY_NOTE
    return Table("", headings, rows, frozenset(range(1, len(headings))), note)


def _spread(spread: dict[str, float]) -> str:
    edges = f"{signed(spread['lowest'], 3)} to {signed(spread['highest'], 3)}"
    return f"{signed(spread['median'], 3)} ({edges}, of {spread['n']:.0f})"


def _signed_whole(value: int | None) -> str:
    return "–" if value is None else f"{value:+,}".replace("-", "−")


def _delta(former: object, now: object) -> Any:
    before, after = number(former), number(now)
    return None if before is None or after is None else after - before


def _ratio(run: RunRecord, first: RunRecord) -> float | None:
    ours, theirs = run.tokens_per_s, first.tokens_per_s
    return ours["median"] / theirs["median"] if ours and theirs and theirs["median"] else None


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return each setting that is not the same in all runs, with its value in each (None where it is not set)."""
    settings = [run.settings() for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def differences_table(runs: Sequence[RunRecord]) -> Table:
    """Return the table of :func:`differing_settings`."""
    rows = [[key, *(_setting(value) for value in row)] for key, row in differing_settings(runs).items()]
    note = "" if rows else "None: the runs have the same settings, seed included."
    if any(not run.config for run in runs):
        note = "The settings of " + ", ".join(run.name for run in runs if not run.config) + " cannot be read."
    return Table("", ["setting", *(run.name for run in runs)], rows, note=note)


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_setting(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else format_value(value)
