"""A study's choices and the states of its runs become what a reader must know before believing its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from psannlm.experiments.lr_selection import Choice
from psannlm.experiments.model import Study
from psannlm.experiments.runner import RunState
from psannlm.io.readers import flatten
from psannlm.models.accounting import WIDTH_TOLERANCE

# What of a run's system.json may explain a difference that is none of the models.
_CONDITIONS = ("commit", "processor", "threads", "packages.torch")
_MUCH_OVERLAP = 0.01
_APART = 0.1
_MOST_NAMED = 6


def notes_of(study: Study, chosen: Mapping[str, Choice], states: Sequence[RunState]) -> list[str]:
    """Return a sentence for each thing that qualifies the figures: how the rates were chosen, what is not done, ..."""
    return [*_of_losses(study, chosen), *_of_variants(study), *_of_runs(states), *_of_machines(chosen, states)]


def conditions(states: Sequence[RunState]) -> dict[str, dict[str, int]]:
    """Return how many of the runs that are done were made with each commit, processor, threads and torch."""
    counts: dict[str, dict[str, int]] = {key: {} for key in _CONDITIONS}
    for state in states:
        if state.state == "done" and state.record is not None:
            system: Mapping[str, Any] = flatten(state.record.system)
            for key, found in counts.items():
                value = str(system.get(key, "unknown"))
                value = value[:12] if key == "commit" else value
                found[value] = found.get(value, 0) + 1
    return counts


def _of_losses(study: Study, chosen: Mapping[str, Choice]) -> Iterator[str]:
    settings = study.plan.settings
    where = "at the last step" if settings.measure == "final" else "the lowest of each run"
    yield f"Validation loss {where}, mean over seeds; differences are paired by seed."
    if len(settings.seeds) == 1:
        yield "One seed: no interval, and no claim."
    if any(len(sized.variant.learning_rates) > 1 for sized in study.variants):
        seeds = ""
        if settings.lr_seeds is not None and len(settings.lr_seeds) < len(settings.seeds):
            seeds = f", those of seed {', '.join(map(str, settings.lr_seeds))} alone"
        yield f"Learning rates were chosen by these same losses{seeds}, which favours whoever tried more of them."
    if edges := [name for name, choice in chosen.items() if choice.edge in ("lowest", "highest")]:
        yield f"Best learning rate at the edge of its grid: {', '.join(edges)}; try more beyond it."
    if alone := [name for name, choice in chosen.items() if choice.edge == "only"]:
        whose = "each" if len(alone) == len(chosen) else ", ".join(alone)
        yield f"One learning rate was tried, which may not be the best: {whose}."
    if provisional := [name for name, choice in chosen.items() if choice.is_provisional and len(choice.rates) > 1]:
        yield f"Choice of the rate is provisional, runs are missing: {', '.join(provisional)}."


def _of_variants(study: Study) -> Iterator[str]:
    for sized in study.variants:
        excess = sized.n_parameters / study.baseline.n_parameters - 1
        if abs(excess) > WIDTH_TOLERANCE:
            yield f"{sized.variant.name} has {excess:+.1%} parameters.".replace("-", "−")
        if sized.variant.budget_fraction < 1:
            yield f"{sized.variant.name} was trained for {sized.variant.budget_fraction:.0%} of the others' budget."
        if sized.order_differs:
            yield f"{sized.variant.name} sees other text or another order: {'; '.join(sized.order_differs)}."
    overlap = study.data[study.plan.baseline.config.data].val_overlap
    if overlap is not None and overlap >= _MUCH_OVERLAP:
        yield f"{overlap:.0%} of the held-out text stands word for word in the training text too."


def _of_runs(states: Sequence[RunState]) -> Iterator[str]:
    if missing := sum(state.state in ("new", "stopped") for state in states):
        yield f"{missing} of {len(states)} runs are not done yet."
    diverged = [state.run.name for state in states if state.is_diverged]
    failed = [state.run.name for state in states if state.state == "failed" and not state.is_diverged]
    for words, names in (("Not finite, and out", diverged), ("Failed", failed)):
        if names:
            yield f"{words}: {', '.join(names[:_MOST_NAMED])}{' and more' if len(names) > _MOST_NAMED else ''}."


def _of_machines(chosen: Mapping[str, Choice], states: Sequence[RunState]) -> Iterator[str]:
    for key, found in conditions(states).items():
        if len(found) > 1:
            yield f"Runs differ in {key}: {', '.join(f'{value} ({n})' for value, n in found.items())}."
    yield "Tokens/s and seconds are those of each variant's fastest run."
    unsteady = [name for name, choice in chosen.items() if _is_unsteady(choice)]
    if unsteady:
        yield (
            f"Rates of one variant's runs are more than {_APART:.0%} apart ({', '.join(unsteady)}): the machine had "
            "other work, and tokens/s and seconds say little of models; psannlm bench-train measures them in turns."
        )


def _is_unsteady(choice: Choice) -> bool:
    rates = [record.tokens_per_s["median"] for record in choice.done.values() if record.tokens_per_s is not None]
    return len(rates) > 1 and max(rates) > (1 + _APART) * min(rates)
