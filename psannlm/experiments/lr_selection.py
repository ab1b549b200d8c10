"""The states of a variant's runs become its best learning rate, what speaks against it, and the runs made at it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psannlm.experiments.model import SizedVariant, Study
from psannlm.experiments.plan import StudyPlan
from psannlm.experiments.runner import RunState, read_status
from psannlm.experiments.sizing import with_best_lrs
from psannlm.reports.runs import RunRecord


@dataclass(frozen=True)
class Choice:
    """A variant's best learning rate and the runs at it that came to their end, by seed.

    Attributes:
        lr: the rate; None where no run is done.
        edge: ``lowest`` or ``highest`` of the rates tried, ``only`` where there is one, else empty.
        is_provisional: whether runs that are still to be made may change it.
        rates: mean loss and number of runs by rate, over the seeds that look for it, as plain data.
    """

    lr: float | None
    edge: str
    is_provisional: bool
    rates: list[dict[str, Any]]
    done: dict[int, RunRecord]
    measure: str

    @property
    def scores(self) -> dict[int, dict[str, Any]]:
        """The validation that counts, by seed: that of the last step, or the lowest."""
        return {seed: score_of(record, self.measure) for seed, record in self.done.items()}

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed."""
        return {seed: row["loss"] for seed, row in self.scores.items()}


def score_of(record: RunRecord, measure: str) -> dict[str, Any]:
    """Return the validation that counts: that of the last step (``final``), or the lowest (``best``)."""
    return (record.best or {}) if measure == "best" else record.eval_rows[-1]


def with_selected_lrs(study: Study) -> Study:
    """Return the study with the runs of its other seeds, for the variants whose learning rate has been looked for.

    That is once no run of the seeds that look for it is left to be made; see ``lr_seeds`` of a plan.

    Raises:
        ConfigError: the folder holds such runs of another plan.
    """
    states = [read_status(run) for run in study.runs]
    found = {sized.variant.name: choose(sized, states, study.plan) for sized in study.variants}
    best = {name: choice.lr for name, choice in found.items() if choice.lr is not None and not choice.is_provisional}
    return with_best_lrs(study, best)


def choose(sized: SizedVariant, states: Sequence[RunState], plan: StudyPlan) -> Choice:
    """Return the choice among the rates of a variant: the lowest mean loss over the seeds that all of them have done.

    Only seeds that look for the rate take part (``lr_seeds`` of the plan); the runs of the others are done at it.
    A rate at which a seed came to numbers that are not finite is out, however well the others did, unless there is no
    other; a run that failed for another reason is one still to be made. Where the rates share no seed, those with the
    most are compared.
    """
    measure = plan.settings.measure
    mine = [state for state in states if state.run.variant is sized]
    looking = [state for state in mine if state.run.seed in plan.lr_seeds]
    by_rate = {lr: [state for state in looking if state.run.lr == lr] for lr in sized.variant.learning_rates}
    losses = {lr: _losses(here, measure) for lr, here in by_rate.items()}
    diverged = {lr for lr, here in by_rate.items() if any(state.is_diverged for state in here)}
    scored = [lr for lr in by_rate if losses[lr]]
    candidates = [lr for lr in scored if lr not in diverged] or scored
    rates = [
        {
            "lr": lr,
            "mean": statistics.fmean(losses[lr].values()) if losses[lr] else None,
            "done": len(losses[lr]),
            "failed": sum(state.state == "failed" for state in here),
            "missing": sum(state.state in ("new", "stopped") for state in here),
        }
        for lr, here in by_rate.items()
    ]
    if not candidates:
        return Choice(None, "", True, rates, {}, measure)
    shared = set.intersection(*(set(losses[lr]) for lr in candidates))
    if not shared:
        most = max(len(losses[lr]) for lr in candidates)
        candidates = [lr for lr in candidates if len(losses[lr]) == most]
    best = min(
        candidates,
        key=lambda lr: statistics.fmean(loss for seed, loss in losses[lr].items() if seed in shared or not shared),
    )
    to_make = any(not state.is_settled for state in looking)
    return Choice(
        lr=best,
        edge=_edge(best, sorted(set(scored) | diverged), len(by_rate)),
        is_provisional=to_make,
        rates=rates,
        done={
            state.run.seed: state.record
            for state in mine
            if state.run.lr == best and state.state == "done" and state.record is not None
        },
        measure=measure,
    )


def _losses(states: Sequence[RunState], measure: str) -> dict[int, float]:
    return {
        state.run.seed: score_of(state.record, measure)["loss"]
        for state in states
        if state.state == "done" and state.record is not None
    }


def _edge(best: float, tried: Sequence[float], n_rates: int) -> str:
    if n_rates == 1:
        return "only"
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(best, "") if len(tried) > 1 else ""
