"""Caveats of an ablation study: what a reader must know before trusting its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from psannlm.experiments.lr_selection import Choice
from psannlm.experiments.model import Study
from psannlm.experiments.run_state import RunState
from psannlm.io.code_identity import CODE_KEY
from psannlm.io.readers import flatten
from psannlm.io.run_metadata import GPU_IS_SHARED
from psannlm.models.accounting import WIDTH_TOLERANCE

# Keys of a run's system.json that may explain a difference that is not due to the models.
_CONDITIONS = ("commit", CODE_KEY, "processor", "threads", "packages.torch")
_MUCH_OVERLAP = 0.01
_UNSTEADY = 0.1
_MOST_NAMED = 6


def notes_of(study: Study, chosen: Mapping[str, Choice], states: Sequence[RunState]) -> list[str]:
    """Return one sentence per caveat: how learning rates were selected, which runs are missing, and so on."""
    return [*_of_losses(study, chosen), *_of_variants(study), *_of_runs(states), *_of_machines(chosen, states)]


def conditions(states: Sequence[RunState]) -> dict[str, dict[str, int]]:
    """Count the finished runs by commit, hashes of the code that trained them, processor, threads and torch version."""
    counts: dict[str, dict[str, int]] = {key: {} for key in _CONDITIONS}
    for state in states:
        if state.state == "done" and state.record is not None:
            system: Mapping[str, Any] = flatten(state.record.system)
            for key, found in counts.items():
                value = _shortened(key, state.record.system.get(key) if key == CODE_KEY else system.get(key))
                found[value] = found.get(value, 0) + 1
    return counts


def _shortened(key: str, value: object) -> str:
    if key == CODE_KEY:
        # Several where a run was resumed under changed code.
        return " then ".join(str(each)[:12] for each in value) if isinstance(value, list) and value else "unknown"
    text = "unknown" if value is None else str(value)
    # A commit ends with + if files were modified.
    return text[:12] + "+" * text.endswith("+") if key == "commit" else text


def any_shares_gpu(states: Sequence[RunState]) -> bool:
    """Whether a finished run used a GPU together with others, which makes throughput incomparable."""
    records = [state.record for state in states if state.state == "done" and state.record is not None]
    return any(record.system.get(GPU_IS_SHARED) is True for record in records)


def _of_losses(study: Study, chosen: Mapping[str, Choice]) -> Iterator[str]:
    settings = study.plan.settings
    where = "at the last step" if settings.measure == "final" else "the lowest of each run"
    yield f"Validation loss {where}, mean over seeds; differences are paired by seed."
    if settings.choose_on == "tune":
        yield (
            "Losses, answers and their intervals are those of one half of the held-out documents (choose_on: tune); "
            "loss curves, token ratios and costs of quantized activations are those of all of them."
        )
    if len(settings.seeds) == 1:
        yield "One seed: there is no interval, and no conclusion."
    if any(len(sized.variant.learning_rates) > 1 for sized in study.variants):
        seeds = ""
        if settings.lr_seeds is not None and len(settings.lr_seeds) < len(settings.seeds):
            seeds = f", of seed {', '.join(map(str, settings.lr_seeds))} only"
        by = "these losses" if settings.choose_on == "all" else "the losses of the other half of the held-out documents"
        favours = (
            ", and the seeds that selected do not count"
            if settings.report_seeds == "others"
            else ", and the seeds that selected count too, which favours variants that tried more of them"
        )
        yield f"Learning rates were selected by {by}{seeds}{favours}."
    if edges := [name for name, choice in chosen.items() if choice.edge in ("lowest", "highest")]:
        yield f"Best learning rate at the edge of its grid: {', '.join(edges)}; extend the grid."
    if alone := [name for name, choice in chosen.items() if choice.edge == "only"]:
        whose = "each" if len(alone) == len(chosen) else ", ".join(alone)
        yield f"Only one learning rate was tried, which may not be the best: {whose}."
    if provisional := [name for name, choice in chosen.items() if choice.is_provisional and len(choice.rates) > 1]:
        yield f"Learning rate is provisional, because runs are missing: {', '.join(provisional)}."


def _of_variants(study: Study) -> Iterator[str]:
    for sized in study.variants:
        excess = sized.n_parameters / study.baseline.n_parameters - 1
        if abs(excess) > WIDTH_TOLERANCE:
            yield f"{sized.variant.name} has {excess:+.1%} parameters.".replace("-", "−")
        if sized.variant.budget_fraction < 1:
            yield f"{sized.variant.name} was trained for {sized.variant.budget_fraction:.0%} of the budget."
        if sized.order_differs:
            yield f"{sized.variant.name} sees other text or another order: {'; '.join(sized.order_differs)}."
    overlap = study.data[study.plan.baseline.config.data].val_overlap
    if overlap is not None and overlap >= _MUCH_OVERLAP:
        yield f"{overlap:.0%} of the held-out text is verbatim in the training text too."


def _of_runs(states: Sequence[RunState]) -> Iterator[str]:
    if missing := sum(state.state in ("new", "stopped") for state in states):
        yield f"{missing} of {len(states)} runs are not done yet."
    reused: dict[str, list[str]] = {}
    for state in states:
        if state.record is not None and (report := state.record.origin.get("report")):
            reused.setdefault(str(report), []).append(state.run.name)
    for report, names in reused.items():
        yield f"{len(names)} of {len(states)} runs were reused from {report}: {', '.join(names)}."
    diverged = [state.run.name for state in states if state.is_diverged]
    failed = [state.run.name for state in states if state.state == "failed" and not state.is_diverged]
    for words, names in (("Diverged (non-finite) and excluded", diverged), ("Failed", failed)):
        if names:
            yield f"{words}: {', '.join(names[:_MOST_NAMED])}{' and more' if len(names) > _MOST_NAMED else ''}."


def _of_machines(chosen: Mapping[str, Choice], states: Sequence[RunState]) -> Iterator[str]:
    for key, found in conditions(states).items():
        if len(found) > 1:
            yield f"Runs differ in {key}: {', '.join(f'{value} ({n})' for value, n in found.items())}."
    if any_shares_gpu(states):
        yield "Runs shared a GPU (--share-gpus), so throughput and times are left out."
        return
    yield "Tokens/s and seconds are of each variant's fastest run."
    unsteady = [name for name, choice in chosen.items() if _is_unsteady(choice)]
    if unsteady:
        yield (
            f"Throughput differs by more than {_UNSTEADY:.0%} between runs of one variant ({', '.join(unsteady)}): the "
            "machine had other load, and tokens/s and seconds are not comparable; psannlm bench-train interleaves them."
        )


def _is_unsteady(choice: Choice) -> bool:
    rates = [record.tokens_per_s["median"] for record in choice.done.values() if record.tokens_per_s is not None]
    return len(rates) > 1 and max(rates) > (1 + _UNSTEADY) * min(rates)
