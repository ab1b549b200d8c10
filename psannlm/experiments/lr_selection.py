"""Learning-rate selection: each variant's best rate, its caveats, and the runs at it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psannlm.experiments.model import SizedVariant, Study
from psannlm.experiments.plan import StudyPlan
from psannlm.experiments.run_state import RunState, read_status
from psannlm.experiments.sizing import with_best_lrs
from psannlm.reports.runs import RunRecord
from psannlm.reports.schemas.study import LrScore


@dataclass(frozen=True)
class HalfLosses:
    """A run's losses in nats per token: of the held-out documents that select learning rates, and of the others."""

    tuning: float
    reported: float


# By the name of the run; None where the loss of all held-out documents both selects and is reported.
Halves = Mapping[str, HalfLosses] | None


@dataclass(frozen=True)
class Choice:
    """A variant's best learning rate, and the finished runs at it by seed.

    Attributes:
        lr: the learning rate; None if no run is finished.
        edge: ``lowest`` or ``highest`` of the learning rates tried, ``only`` if there is one, else empty.
        is_provisional: whether missing runs may change it.
        rates: mean loss and number of runs by learning rate, over the plan's ``lr_seeds``.
        halves: with ``choose_on: tune``, the losses of both halves of the held-out documents.
    """

    lr: float | None
    edge: str
    is_provisional: bool
    rates: list[LrScore]
    done: dict[int, RunRecord]
    measure: str
    halves: Halves = None

    @property
    def scores(self) -> dict[int, dict[str, Any]]:
        """The validation row that counts, by seed: the last, or the one with the lowest loss; see ``reported_row``."""
        return {seed: reported_row(record, self.measure, self.halves) for seed, record in self.done.items()}

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed."""
        return {seed: row["loss"] for seed, row in self.scores.items()}


def score_of(record: RunRecord, measure: str) -> dict[str, Any]:
    """Return the validation row that counts: the last (``final``), or the one with the lowest loss (``best``)."""
    return (record.best or {}) if measure == "best" else record.eval_rows[-1]


def reported_row(record: RunRecord, measure: str, halves: Halves) -> dict[str, Any]:
    """Return the validation row that counts; with ``halves``, its loss is that of the reported half alone.

    Bits per byte are then left out: the row has those of all held-out documents. Empty for a run without halves, which
    another process finished since.
    """
    row = score_of(record, measure)
    if halves is None or record.name not in halves:
        return row if halves is None else {}
    return {
        **{key: value for key, value in row.items() if key != "bits_per_byte"},
        "loss": halves[record.name].reported,
    }


def with_selected_lrs(study: Study, halves: Halves = None) -> Study:
    """Add the runs of the remaining seeds, for all variants whose learning rate is selected.

    It is selected once all runs of the plan's ``lr_seeds`` are finished.

    Raises:
        ConfigError: the folder holds runs of another plan under their names.
    """
    states = [read_status(run) for run in study.runs]
    found = {sized.variant.name: choose(sized, states, study.plan, halves) for sized in study.variants}
    best = {name: choice.lr for name, choice in found.items() if choice.lr is not None and not choice.is_provisional}
    return with_best_lrs(study, best)


def choose(sized: SizedVariant, states: Sequence[RunState], plan: StudyPlan, halves: Halves = None) -> Choice:
    """Select a variant's learning rate: the lowest mean loss over the seeds that all its learning rates have finished.

    Only the plan's ``lr_seeds`` take part. A learning rate at which a seed diverged (non-finite) is excluded, unless
    there is no other; a run that failed for another reason counts as missing. With ``report_seeds: others`` they are
    not among the runs that are reported. If the learning rates share no finished
    seed, those with the most finished seeds are compared. With ``halves``, the losses are those of the tuning half.
    """
    measure = plan.settings.measure
    mine = [state for state in states if state.run.variant is sized]
    searching = [state for state in mine if state.run.seed in plan.lr_seeds]
    by_rate = {lr: [state for state in searching if state.run.lr == lr] for lr in sized.variant.learning_rates}
    losses = {lr: _losses(here, measure, halves) for lr, here in by_rate.items()}
    diverged = {lr for lr, here in by_rate.items() if any(state.is_diverged for state in here)}
    scored = [lr for lr in by_rate if losses[lr]]
    candidates = [lr for lr in scored if lr not in diverged] or scored
    rates = [
        LrScore(
            lr=lr,
            mean=statistics.fmean(losses[lr].values()) if losses[lr] else None,
            done=len(losses[lr]),
            failed=sum(state.state == "failed" for state in here),
            missing=sum(state.state in ("new", "stopped") for state in here),
        )
        for lr, here in by_rate.items()
    ]
    if not candidates:
        return Choice(None, "", True, rates, {}, measure, halves)
    shared = set.intersection(*(set(losses[lr]) for lr in candidates))
    if not shared:
        most = max(len(losses[lr]) for lr in candidates)
        candidates = [lr for lr in candidates if len(losses[lr]) == most]
    best = min(
        candidates,
        key=lambda lr: statistics.fmean(loss for seed, loss in losses[lr].items() if seed in shared or not shared),
    )
    to_make = any(not state.is_settled for state in searching)
    hidden = plan.lr_seeds if plan.settings.report_seeds == "others" else ()
    return Choice(
        lr=best,
        edge=_edge(best, sorted(set(scored) | diverged), len(by_rate)),
        is_provisional=to_make,
        rates=rates,
        done={
            state.run.seed: state.record
            for state in mine
            if state.run.lr == best and state.run.seed not in hidden
            if _counts(state, halves) and state.record is not None
        },
        measure=measure,
        halves=halves,
    )


def _losses(states: Sequence[RunState], measure: str, halves: Halves) -> dict[int, float]:
    return {
        state.run.seed: score_of(state.record, measure)["loss"] if halves is None else halves[state.run.name].tuning
        for state in states
        if _counts(state, halves) and state.record is not None
    }


def _counts(state: RunState, halves: Halves) -> bool:
    return state.state == "done" and (halves is None or state.run.name in halves)


def _edge(best: float, tried: Sequence[float], n_rates: int) -> str:
    if n_rates == 1:
        return "only"
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(best, "") if len(tried) > 1 else ""
