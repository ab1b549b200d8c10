"""Validation during training: loss, samples and task scores, logged and shown."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from psannlm.data.windows import Windows
from psannlm.errors import DivergedError
from psannlm.evaluation.loss import Evaluation, evaluate
from psannlm.evaluation.tasks.validation import task_figures
from psannlm.models.transformer import Transformer
from psannlm.training.callbacks import ValidationEvent
from psannlm.training.checkpoint import TrainerState
from psannlm.training.context import Run
from psannlm.training.failures import NOT_FINITE, describe_last_checkpoint
from psannlm.training.parallel import gather_into, is_sharded

log = logging.getLogger(__name__)


def validate_parent(run: Run, windows: Windows, name: str) -> None:
    """Report and log the validation loss of the weights that the run starts from, as rows of a kind of their own.

    It is not a validation of the run: no checkpoint has these weights, so that they cannot be its best.
    """
    result = evaluate(
        run.model, windows, precision=run.precision, batch_size=run.loader.micro_batch_size, world=run.world
    )
    if run.log is not None:
        run.log.write("parent", 0, replace(result, lost_fraction=run.lost_fraction).as_dict())
    log.info(f"before the first step: validation loss {result.loss:.4f} nats per token, with the weights of {name}")


def validate(run: Run, state: TrainerState, windows: Windows) -> tuple[TrainerState, bool]:
    """Evaluate and log; return the new state, and whether this is the lowest validation loss so far."""
    n_rows = run.loader.micro_batch_size
    result = evaluate(run.model, windows, precision=run.precision, batch_size=n_rows, world=run.world)
    result = replace(result, lost_fraction=run.lost_fraction)
    if not math.isfinite(result.loss):
        found = f"step {state.step}: validation loss {result.loss:g} is {NOT_FINITE}"
        raise DivergedError(f"{found}; {describe_last_checkpoint(run.folder)}.")
    is_best = state.best is None or result.loss < state.best["loss"]
    if run.log is not None:
        run.log.write("eval", state.step, result.as_dict())
    averaged = _evaluate_average(run, state.step, windows)
    event = ValidationEvent(state.step, result, is_best, averaged)
    log.info(event)
    run.notify(lambda callback: callback.on_validation(event))
    if run.precision.device.type != "mps":
        _sample_and_score(run, state.step)
    best = {"step": state.step, **result.as_dict()} if is_best else state.best
    metrics = {**state.metrics, **{f"val_{k}": v for k, v in result.as_dict().items()}}
    ema = None if averaged is None else {"step": state.step, **averaged.as_dict()}
    return replace(state, best=best, ema=ema, metrics=metrics), is_best


def _evaluate_average(run: Run, step: int, windows: Windows) -> Evaluation | None:
    """Evaluate and log the averaged weights, as rows of a kind of their own; None without ``train.ema``."""
    if run.average is None:
        return None
    n_rows = run.loader.micro_batch_size
    with run.average.applied():
        result = evaluate(run.model, windows, precision=run.precision, batch_size=n_rows, world=run.world)
    result = replace(result, lost_fraction=run.lost_fraction)
    if run.log is not None:
        run.log.write("ema", step, result.as_dict())
    return result


def _sample_and_score(run: Run, step: int) -> None:
    """Draw the samples and score the tasks on rank 0, with the gathered weights of a sharded model."""
    model: Transformer | None = run.model
    if is_sharded(run.model):
        # Every rank must gather, and only rank 0 knows all that was asked for.
        if not run.world.any(_draws_samples(run) or run.tasks is not None, run.precision.device):
            return
        gather_into(run.full_model, run.model)
        model = run.full_model
    if run.world.is_main and model is not None:
        _sample(run, model, step)
        _score_tasks(run, model, step)


def _draws_samples(run: Run) -> bool:
    return run.sampler is not None and run.tokenizer is not None and bool(run.config.train.sample_prompts)


def _sample(run: Run, model: Transformer, step: int) -> None:
    """Continue ``train.sample_prompts`` with the model; log and report the texts."""
    settings, prompts = run.config.train, run.config.train.sample_prompts
    if run.sampler is None or run.tokenizer is None or not prompts:
        return
    texts = run.sampler(model, run.tokenizer, prompts, settings.sample_tokens, settings.seed)
    for prompt, text in zip(prompts, texts, strict=True):
        if run.log is not None:
            run.log.write("sample", step, {"prompt": prompt, "text": text})
        # In one line; metrics.jsonl keeps the line breaks.
        log.info(f"sample at step {step}: {' '.join(f'{prompt}{text}'.split())}")


def _score_tasks(run: Run, model: Transformer, step: int) -> None:
    """Score the model on ``train.eval_tasks``; log and report the scores."""
    if run.tasks is None:
        return
    scores = run.tasks.score(model)
    if run.log is not None:
        run.log.write("tasks", step, task_figures(scores))
    for score in scores:
        error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        log.info(f"step {step}: {score.task} {score.value:.3f}{error} (chance {score.chance:.3f})")
