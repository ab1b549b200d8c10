"""A run folder to the state a run goes on from: the checkpoint that fits, and room for what follows it."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from psannlm.config.non_semantic import NON_SEMANTIC_KEYS
from psannlm.config.run import RunConfig, differences
from psannlm.data.order import ORDER_VERSION
from psannlm.data.prepare import PREPARATION, PreparedData
from psannlm.errors import ArtifactError, ConfigError, Problem, StorageError
from psannlm.io.atomic import explain_write_errors
from psannlm.io.lock import RunLock
from psannlm.io.run_metadata import timestamp
from psannlm.models.transformer import Transformer
from psannlm.training.checkpoint import (
    BEST,
    LATEST,
    TrainerState,
    is_own_checkpoint,
    list_checkpoints,
    newest_whole,
    point,
    read_optimizer,
    read_state,
    step_folder,
    step_of,
)
from psannlm.training.loop import Progress
from psannlm.training.optim import OptimizerSet
from psannlm.training.progress import Reporter
from psannlm.training.run_folder import foreign_entry


def identity(data: PreparedData) -> dict[str, Any]:
    """Return what decides the windows of a run and their order, under the names that ``TrainerState`` has for it."""
    return {
        "corpus_sha256": data.report.sha256,
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "data_order": ORDER_VERSION,
        "preparation": data.preparation or PREPARATION,
    }


def preparation(found: tuple[Path, TrainerState] | None) -> int:
    """Return the version of the preparation of a run that resumes from ``found``: the one that it began with."""
    return PREPARATION if found is None else found[1].preparation or 1


def find_state(config: RunConfig, folder: Path, resume: str, reporter: Reporter) -> tuple[Path, TrainerState] | None:
    """Return the checkpoint to go on from, or None to start anew; ``resume`` as in ``run.train``.

    Raises:
        ConfigError: there is no such folder, or the checkpoint belongs to another configuration; the message lists the
            keys that differ.
        ArtifactError: the checkpoint asked for, or every one of the run, is damaged.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = newest_whole(folder, reporter.notice)
        if found is None:
            return None
    elif list_checkpoints(Path(resume)):
        raise ConfigError(
            f"{resume} is a run; --resume takes one of its checkpoints: {list_checkpoints(Path(resume))[-1]}"
        )
    elif not resume or not Path(resume).is_dir():
        raise ConfigError(
            f"{resume!r} is no checkpoint; --resume takes auto, never, or the path of a checkpoint folder"
        )
    else:
        found = (Path(resume), read_state(Path(resume)))
    try:
        # Not config_from_mapping: the Python API may have trained on validation data of its own.
        former = RunConfig.model_validate(found[1].config)
    except (ValidationError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{found[0]} holds a configuration this version cannot read: {reason:.300}") from error
    changed = [line for line in differences(former, config) if line.partition(":")[0] not in NON_SEMANTIC_KEYS]
    if resume != "auto":
        for line in changed:
            reporter.notice(f"changed since the checkpoint: {line}")
        changed = [line for line in changed if not line.startswith("train.")]
    if changed:
        what = "\n  ".join(changed)
        remedy = (
            "Restore the old values, choose another train.checkpoint_dir (--out), or start over with --resume never"
        )
        if resume == "auto":
            remedy += f" (it moves the old run aside); to change train settings in mid-run, --resume {found[0]}"
        raise ConfigError(f"{found[0]} was trained with other settings:\n  {what}\n{remedy}.")
    return found


def refuse_past_schedule(found: tuple[Path, TrainerState], total_steps: int) -> None:
    """Raise ConfigError where a run of ``total_steps`` cannot go on from the checkpoint.

    It stands past the last step; or in the cooldown of a ``wsd`` schedule that was to end at another step, where the
    learning rate has come down already.
    """
    folder, state = found
    if state.step > total_steps:
        raise ConfigError(
            f"{folder} stands after step {state.step}, and this run ends at {total_steps}; set train.max_steps to "
            f"{state.step} or more, or go on from an earlier checkpoint"
        )
    former = state.total_steps
    if former is None or former == total_steps:
        return
    flat = former - RunConfig.model_validate(state.config).train.cooldown_steps(former)
    if flat < min(state.step, former):
        raise ConfigError(
            f"{folder} stands in the cooldown of a schedule of {former} steps, which began after step {flat}; to train "
            f"{total_steps} steps, go on from a checkpoint of step {flat} or before, or set train.max_steps to {former}"
        )


def refuse_other_data(found: tuple[Path, TrainerState], data: PreparedData) -> None:
    """Raise ConfigError unless ``data`` is the text, in the tokens, that the checkpoint was trained on."""
    folder, state = found
    now = identity(data)
    if state.data_order != now["data_order"]:
        raise ConfigError(
            f"{folder} went through its data in an order that this psannlm draws no more "
            f"({state.data_order or 'list-1'} then, {now['data_order']} now): some windows would come twice and others "
            "never. Finish the run with the version that began it, or start anew with --resume never."
        )
    if data.preparation not in (None, preparation(found)):
        raise ConfigError(
            f"{folder} was begun by an older psannlm, which held out other documents and encoded long ones as a whole. "
            "Go on with psannlm train and its configuration, which prepares the corpus as then, or start anew with "
            "--resume never."
        )
    for name, former in (
        ("corpus_sha256", state.corpus_sha256),
        ("tokenizer_fingerprint", state.tokenizer_fingerprint),
    ):
        if now[name] != former:
            what = name.replace("_", " ")
            message = f"{folder} was trained on other data: {what} {former[:12]} then, {now[name][:12]} now"
            raise ConfigError(f"{message}. Bring the former text back, or start anew with --resume never.")


def same_model(loaded: Transformer, given: Transformer | None) -> Transformer:
    """Return the loaded weights, put into the caller's own model when there is one. Raises ConfigError if none fits."""
    if given is None:
        return loaded
    if given.config != loaded.config:
        raise ConfigError(Problem("model", "the checkpoint holds a model of another configuration"))
    given.load_state_dict(loaded.state_dict())
    return given


def restore(
    found: tuple[Path, TrainerState], folder: Path, optimizers: OptimizerSet, scaler: torch.amp.GradScaler
) -> Progress:
    """Put a checkpoint's state into the optimisers and the scaler, and return how far it had come.

    Raises:
        ArtifactError: the state is damaged, or of another optimiser or precision.
    """
    checkpoint, state = found
    optimizers.load_tensors(read_optimizer(checkpoint))
    if scaler.is_enabled():
        if not state.scaler:
            raise ArtifactError(
                f"{checkpoint} has no state of the fp16 gradient scaler: it was trained in another precision"
            )
        scaler.load_state_dict(state.scaler)
    # A best checkpoint that this run folder does not hold cannot be handed to anyone: the next validation sets it anew.
    best = state.best
    if best is not None and not (_is_in(checkpoint, folder) and step_folder(folder, best["step"]).is_dir()):
        best = None
    return Progress(
        state.step,
        state.position,
        state.tokens,
        best,
        state.metrics,
        skipped=state.skipped,
        skipped_in_a_row=state.skipped_in_a_row,
    )


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def make_way(lock: RunLock, checkpoint: Path, best: dict[str, Any] | None, reporter: Reporter) -> None:
    """Leave in the run folder what led to ``checkpoint`` and nothing later, which would pass for the newest state."""
    folder = lock.folder
    if not _is_in(checkpoint, folder):
        move_aside(lock, reporter)
        return
    later = [
        path
        for path in list_checkpoints(folder)
        if step_of(path) > step_of(checkpoint.resolve()) and is_own_checkpoint(path)
    ]
    if later:
        aside = _free_name(folder)
        with explain_write_errors(aside):
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
        reporter.notice(f"checkpoints after {checkpoint.name} are in {aside} now")
    # A kill between a save and the update of these names leaves them behind.
    point(folder, LATEST, step_of(checkpoint.resolve()))
    if best is not None:
        point(folder, BEST, best["step"])
    else:
        (folder / BEST).unlink(missing_ok=True)


def move_aside(lock: RunLock, reporter: Reporter) -> None:
    """Give a run folder that holds checkpoints another name.

    Raises:
        StorageError: that fails, or the folder holds something that no run wrote, which would be moved with it.
    """
    if not any(map(is_own_checkpoint, list_checkpoints(lock.folder))):
        return
    foreign = foreign_entry(lock.folder)
    if foreign is not None:
        raise StorageError(
            f"{foreign} would be moved with the run in {lock.folder}, and psannlm did not write it; move it, or choose "
            "another train.checkpoint_dir (--out)"
        )
    aside = _free_name(lock.folder)
    lock.move_folder(aside)
    reporter.notice(f"the run that was in {lock.folder} is in {aside} now")


def _free_name(folder: Path) -> Path:
    """A name beside ``folder`` that nothing has yet, dated."""
    folder = folder.resolve()
    stem = f"{folder.name}_until_{timestamp()}"
    names = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
    return next(path for path in map(folder.with_name, names) if not path.exists())
