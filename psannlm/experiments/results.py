"""Results of an ablation study: loss by variant, paired differences with intervals, and selected learning rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from psannlm.errors import TrainingError
from psannlm.experiments.caveats import any_shares_gpu, conditions, notes_of
from psannlm.experiments.lr_selection import Choice, Halves, choose, reported_row
from psannlm.experiments.measures.activation_costs import RunActivations, activation_figures
from psannlm.experiments.measures.document_losses import (
    RunDocuments,
    half_losses,
    reported_documents,
    with_document_intervals,
)
from psannlm.experiments.model import Horizon, SizedVariant, Study, StudyRun
from psannlm.experiments.run_state import RunState, read_status
from psannlm.experiments.statistics import paired_difference
from psannlm.models.registry import build_model
from psannlm.reports.comparisons import compare_variants
from psannlm.reports.page_model import Table, format_value
from psannlm.reports.plateau import PlateauExit, plateau_exit
from psannlm.reports.runs import RunRecord
from psannlm.reports.schemas.measured import Mean, PairedDifference
from psannlm.reports.schemas.study import (
    AnswerScore,
    HorizonFigures,
    LossCurve,
    RunFigures,
    StudyCorpus,
    StudyMetrics,
    VariantAnswers,
    VariantFigures,
    VariantTask,
)
from psannlm.runtime.device import pick_precision
from psannlm.runtime.distributed import World
from psannlm.training.optim import build_optimizers
from psannlm.training.plan import build_loader
from psannlm.training.step import seed_step, train_step


def study_figures(
    study: Study,
    answers: Mapping[str, AnswerScore] | None = None,
    documents: Mapping[str, RunDocuments] | None = None,
    activations: Mapping[str, RunActivations] | None = None,
) -> StudyMetrics:
    """Return all results of a study, from the run folders alone.

    ``answers`` are the scores of runs by name, for the text of an algorithmic task (``score_runs``), ``documents``
    their losses by document (``measure_documents``), ``activations`` what quantized ones cost them
    (``measure_activations``).

    Each variant is reported at its best learning rate (``lr_selection.choose``). Differences are paired by seed.

    Raises:
        TrainingError: no run is finished.
    """
    states = [read_status(run) for run in study.runs]
    if not any(state.state == "done" for state in states):
        raise TrainingError(f"no run of the study is finished; the logs are in {study.folder}")
    halves, reported = half_losses(study, documents or {}), reported_documents(study)
    chosen = {sized.variant.name: choose(sized, states, study.plan, halves) for sized in study.variants}
    settings = study.plan.settings
    base = chosen[settings.baseline]
    is_shared = any_shares_gpu(states)
    metrics = StudyMetrics(
        study=study.plan.name,
        plan=str(study.plan.path),
        folder=str(study.folder),
        baseline=settings.baseline,
        measure=settings.measure,
        choose_on=settings.choose_on,
        reported_documents=None if reported is None else len(reported),
        task=settings.answers,
        budget=settings.budget.model_dump(mode="json"),
        seeds=list(settings.seeds),
        lr_seeds=list(study.plan.lr_seeds),
        corpus=_corpus(study),
        conditions=conditions(states),
        shared_gpus=is_shared,
        notes=notes_of(study, chosen, states),
        variants=[
            _variant_figures(study, sized, chosen[sized.variant.name], base, answers or {}, is_shared)
            for sized in study.variants
        ],
        runs=[_run_figures(study, state, answers or {}, is_shared, halves) for state in states],
        also_compare_to={name: _differences_to(name, chosen) for name in settings.also_compare_to},
        horizons=[
            figures for horizon in study.horizons for figures in _horizon_figures(study, horizon, states, halves)
        ],
        activations=activation_figures(study, chosen, activations or {}),
        curves=[curve for sized in study.variants for curve in _curves(chosen[sized.variant.name], is_shared)],
    )
    return replace(
        metrics, comparisons=with_document_intervals(compare_variants(metrics), chosen, documents or {}, reported)
    )


def _differences_to(other: str, chosen: Mapping[str, Choice]) -> dict[str, PairedDifference | None]:
    """Return the differences of all variants to ``other``, each at its own best learning rate."""
    theirs = chosen[other].losses
    return {name: paired_difference(choice.losses, theirs) for name, choice in chosen.items() if name != other}


def _horizon_figures(
    study: Study, horizon: Horizon, states: Sequence[RunState], halves: Halves
) -> Iterator[HorizonFigures]:
    """Yield every variant at a horizon; each learning rate is selected by the losses there."""
    chosen = {sized.variant.name: choose(sized, states, study.plan, halves) for sized in horizon.variants}
    base = chosen[study.plan.settings.baseline]
    for sized in horizon.variants:
        choice = chosen[sized.variant.name]
        yield HorizonFigures(
            variant=sized.variant.name,
            horizon=horizon.tokens,
            steps=sized.n_steps,
            tokens=sized.n_tokens,
            learning_rate=choice.lr,
            edge=choice.edge,
            provisional=choice.is_provisional,
            val_loss=Mean.of(list(choice.losses.values())) if choice.losses else None,
            val_loss_by_seed={str(seed): loss for seed, loss in sorted(choice.losses.items())},
            difference=None if choice is base else paired_difference(choice.losses, base.losses),
        )


def _variant_figures(
    study: Study, sized: SizedVariant, choice: Choice, base: Choice, answers: Mapping[str, AnswerScore], is_shared: bool
) -> VariantFigures:
    records = list(choice.done.values())
    timed = [] if is_shared else records
    rates = [record.tokens_per_s["median"] for record in timed if record.tokens_per_s is not None]
    peaks = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    losses = list(choice.losses.values())
    bits = [score["bits_per_byte"] for score in choice.scores.values() if "bits_per_byte" in score]
    return VariantFigures(
        name=sized.variant.name,
        settings=sized.variant.changes,
        learning_rate=choice.lr,
        edge=choice.edge,
        provisional=choice.is_provisional,
        learning_rates=choice.rates,
        parameters=sized.n_parameters,
        parameters_over_baseline=sized.n_parameters / study.baseline.n_parameters,
        parameters_by_group=sized.parameters,
        d_mlp=sized.model.d_mlp,
        d_mlp_was_solved=sized.was_solved,
        steps=sized.n_steps,
        tokens=sized.n_tokens,
        flops_per_token=sized.flops_per_token,
        val_loss=Mean.of(losses) if losses else None,
        val_loss_by_seed={str(seed): loss for seed, loss in sorted(choice.losses.items())},
        bits_per_byte=Mean.of(bits) if bits else None,
        lossy_tokenizer=any(score.get("lossy_tokenizer") for score in choice.scores.values()),
        difference=None if choice is base else paired_difference(choice.losses, base.losses),
        tokens_per_s=max(rates) if rates else None,
        training_s=sized.n_tokens / max(rates) if rates else None,
        peak_memory_bytes=max(peaks, default=None),
        answers=_answers(choice, base, answers),
        tasks=_tasks(choice, base),
    )


def _run_figures(
    study: Study, state: RunState, answers: Mapping[str, AnswerScore], is_shared: bool, halves: Halves
) -> RunFigures:
    record, measure = state.record, study.plan.settings.measure
    horizons = [horizon.tokens for horizon in study.horizons if state.run.variant in horizon.variants]
    timed = None if is_shared else record
    score = reported_row(record, measure, halves) if record is not None and state.state == "done" else {}
    left = _plateau_exit(record) if record is not None and state.state == "done" else PlateauExit(None)
    return RunFigures(
        run=state.run.name,
        variant=state.run.variant.variant.name,
        lr=state.run.lr,
        seed=state.run.seed,
        state="diverged" if state.is_diverged else state.state,
        reason=state.reason,
        val_loss=score.get("loss"),
        bits_per_byte=score.get("bits_per_byte"),
        lossy_tokenizer=score.get("lossy_tokenizer"),
        tokens=record.train_rows[-1].get("tokens") if record is not None and record.train_rows else None,
        tokens_per_s=timed.tokens_per_s["median"] if timed is not None and timed.tokens_per_s else None,
        training_s=timed.points("train")[-1][1] if timed is not None and timed.train_rows else None,
        peak_memory_bytes=None if record is None else record.peak_memory_bytes,
        folder=str(state.run.folder),
        answers=answers.get(state.run.name),
        reused_from=None if record is None else record.origin.get("report"),
        plateau_exit_tokens=left.tokens,
        plateau=left.reason,
        horizon=horizons[0] if horizons else None,
    )


def _plateau_exit(record: RunRecord) -> PlateauExit:
    """Return where a run's validation loss leaves its plateau, by all of its validations."""
    points: list[tuple[int, float]] = []
    for tokens, _, loss in record.points():
        # A log with steps of an earlier attempt may list tokens twice.
        if tokens > (points[-1][0] if points else 0):
            points.append((tokens, loss))
    return plateau_exit([tokens for tokens, _ in points], [loss for _, loss in points])


def _answers(choice: Choice, base: Choice, answers: Mapping[str, AnswerScore]) -> VariantAnswers | None:
    """Return the accuracy of the runs at a variant's best learning rate, and the difference to the baseline's."""
    mine, theirs = (
        {seed: answers[record.name] for seed, record in sorted(each.done.items()) if record.name in answers}
        for each in (choice, base)
    )
    if not mine:
        return None
    right, theirs_right = ({seed: score.right for seed, score in each.items()} for each in (mine, theirs))
    return VariantAnswers(
        right=Mean.of(list(right.values())),
        right_by_seed={str(seed): fraction for seed, fraction in right.items()},
        difference=None if choice is base else paired_difference(right, theirs_right),
        documents_right=statistics.fmean(score.documents_right for score in mine.values()),
        nats_per_answer=statistics.fmean(score.nats_per_answer for score in mine.values()),
    )


def _tasks(choice: Choice, base: Choice) -> dict[str, VariantTask]:
    """Return the scores on ``train.eval_tasks`` at the validation that is measured, by task."""
    mine, theirs = _task_scores(choice), _task_scores(base)
    return {
        task: VariantTask(
            score=Mean.of(list(by_seed.values())),
            chance=chance,
            difference=None
            if choice is base or (task, chance) not in theirs
            else paired_difference(by_seed, theirs[task, chance]),
        )
        for (task, chance), by_seed in mine.items()
    }


def _task_scores(choice: Choice) -> dict[tuple[str, float | None], dict[int, float]]:
    """Return the scores by task and chance level, then by seed."""
    found: dict[tuple[str, float | None], dict[int, float]] = {}
    for seed, record in sorted(choice.done.items()):
        step = choice.scores.get(seed, {}).get("step")
        for task, (score, _, chance) in record.task_scores(step).items():
            found.setdefault((task, chance), {})[seed] = score
    return found


def _curves(choice: Choice, is_shared: bool) -> list[LossCurve]:
    """Return the validation curve of each run, in seconds at the throughput of the fastest of them, as in the table."""
    found = []
    rates = [record.tokens_per_s["median"] for record in choice.done.values() if record.tokens_per_s is not None]
    for seed, record in sorted(choice.done.items()):
        points = record.points()
        seconds = [point[0] / max(rates) for point in points] if rates else [point[1] for point in points]
        found.append(
            LossCurve(
                variant=record.name.rpartition("_lr")[0],
                seed=seed,
                tokens=[point[0] for point in points],
                seconds=[] if is_shared else seconds,
                loss=[point[2] for point in points],
            )
        )
    return found


def _corpus(study: Study) -> StudyCorpus:
    prepared = study.data[study.plan.baseline.config.data]
    return StudyCorpus(
        sha256=prepared.report.sha256,
        tokenizer_fingerprint=prepared.tokenizer.fingerprint,
        train_tokens=prepared.train.n_tokens,
        val_tokens=None if prepared.val is None else prepared.val.n_tokens,
        val_overlap=prepared.val_overlap,
    )


def seconds_per_step(run: StudyRun, study: Study, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the seconds of a training step of ``run``: the faster of two, after a warm-up step."""
    config = run.config
    device = World().pick_device(config.train.device)
    precision = pick_precision(config.train.amp, device)
    model = build_model(run.variant.model, seed=run.seed).to(device).train()
    model.grad_checkpoint = config.train.grad_checkpoint
    optimizers = build_optimizers(model, config.train)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.needs_scaler)
    loader = build_loader(config, study.data[run.variant.variant.config.data], World())
    times = []
    for step, batch in zip(range(1, 4), loader.steps(), strict=False):
        began = clock()
        seed_step(run.seed, step, 0)
        train_step(model, batch.micro_batches, optimizers, precision=precision, scaler=scaler, lr=run.lr)
        times.append(clock() - began)
    return min(times[1:] or times)


def plan_tables(study: Study, seconds: Mapping[str, float], jobs: int = 1) -> list[Table]:
    """Return the tables of variants and of runs, with training times estimated from ``seconds`` per step.

    Validation, start-up and the slowdown by concurrent runs are not included.
    """
    states = [read_status(run) for run in study.runs]
    left = [seconds[s.run.variant.variant.name] * s.run.steps_left(s.step) for s in states if s.state != "done"]
    variants = [
        [
            sized.variant.name,
            format_value(sized.n_parameters),
            f"{sized.n_parameters / study.baseline.n_parameters - 1:+.2%}".replace("-", "−"),
            f"{format_value(sized.model.d_mlp)}{' (solved)' if sized.was_solved else ''}",
            format_value(sized.n_steps),
            format_value(sized.n_tokens),
            f"{1e3 * seconds[sized.variant.name]:,.0f}",
        ]
        for sized in study.variants
        if sized.variant.name in seconds
    ]
    headings = (
        "variant",
        "parameters",
        f"against {study.plan.settings.baseline}",
        "d_mlp",
        "steps",
        "tokens",
        "step, ms",
    )
    orders = [
        f"{sized.variant.name} sees other text or another order: {'; '.join(sized.order_differs)}"
        for sized in study.variants
        if sized.order_differs
    ]
    runs = [
        [
            state.run.name,
            f"{state.run.lr:g}",
            format_value(state.run.seed),
            format_value(state.run.variant.n_tokens),
            f"{seconds[state.run.variant.variant.name] * state.run.steps_left(state.step):,.0f}",
            state.state,
        ]
        for state in states
    ]
    is_compiled = any(run.config.train.compile is True for run in study.runs)
    others = set(study.plan.settings.seeds) - set(study.plan.lr_seeds)
    variants_here = {run.variant.variant.name for run in study.runs}
    n_others = len(others) * len(variants_here) - sum(run.seed in others for run in study.runs)
    note = (
        f"{len(left)} of {len(states)} runs to train: about {sum(left) / 60:,.1f} minutes, one at a time"
        f"{f', with {jobs} at a time at best {sum(left) / 60 / jobs:,.1f}' if jobs > 1 else ''}"
        f"{'; timed without compilation, which saves more than it takes' if is_compiled else ''}"
        f"{f'; then {n_others} more, of the other seeds at the selected learning rates' if n_others else ''}"
    )
    return [
        Table(
            f"{study.plan.name}: variants",
            headings,
            variants,
            frozenset(range(1, 7)),
            "\n".join(orders) or "all variants see the same text in the same order",
        ),
        Table(
            "runs",
            ("run", "learning rate", "seed", "tokens", "time left, s", "state"),
            runs,
            frozenset((1, 2, 3, 4)),
            note,
        ),
    ]
