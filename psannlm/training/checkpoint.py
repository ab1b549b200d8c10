"""Checkpoints: atomic and hashed save, load, search for the latest valid one, pruning.

``run/step_00000500/`` holds the model file, ``optimizer.safetensors`` and ``trainer.json``, and with ``train.ema`` the
model file ``ema.safetensors``. The folder is written under a temporary name, flushed and renamed. ``run/latest`` and
``run/best`` hold the names of such folders; they are updated afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from psannlm.data.loader import Position
from psannlm.errors import ArtifactError, StorageError
from psannlm.io.atomic import (
    explain_write_errors,
    is_plain_file,
    is_plain_folder,
    read_small,
    remove_leftovers,
    sync_file,
    temporary_beside,
    write_text,
)
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.limits import HASHED_FIRST_BYTES
from psannlm.io.safetensors_header import file_metadata
from psannlm.models.artifact import ISOLATED_NOTE, MODEL_FILE, present_names, refuse_oversize_file, save_model
from psannlm.models.tensorfile import read_head, read_tensors, stored_bytes, verify_tensors, write_tensors
from psannlm.models.tensorshards import has_only_shards, shard_folder
from psannlm.models.transformer import Transformer
from psannlm.runtime.distributed import World
from psannlm.runtime.shared_folder import shared_temporary
from psannlm.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from psannlm.training.averaging import WeightAverage

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
# A model file with the exponential moving average of the weights.
EMA_FILE = "ema.safetensors"
_TENSOR_FILES = (MODEL_FILE, OPTIMIZER_FILE, EMA_FILE)
LATEST, BEST = "latest", "best"
# 2: parameter names as of `models.artifact.FORMAT_VERSION` 2.
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)
_OPTIMIZER_METADATA = {"format": "psannlm-optimizer", "format_version": str(FORMAT_VERSION)}
_PREFIX = "step_"
_FOLDER = re.compile(_PREFIX + "(?:[0-9]{8}|[1-9][0-9]{8,17})")
_POINTER = re.compile(rb"step_(?:[0-9]{8}|[1-9][0-9]{8,17})\n")
_STATE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """State of a run after ``step`` optimiser steps: what the loop updates, and what a checkpoint keeps.

    The random numbers of a step depend on (train.seed, step, rank) alone, so that no generator state is needed.

    Attributes:
        position: the next window in the order of the data.
        tokens: labels trained on so far.
        config: the resolved run configuration, as plain data.
        corpus_sha256: hash of the training text; tokenizer_fingerprint: of the tokenizer.
        best: the evaluation with the lowest validation loss so far and its ``step``, or None.
        ema: the last evaluation of the averaged weights and its ``step``, or None without ``train.ema``.
        metrics: those of the last step and the last validation.
        scaler: state of the fp16 gradient scaler, else empty; filled in when a checkpoint is saved.
        skipped: steps skipped so far because they were not finite; skipped_in_a_row: the most recent of them.
        total_steps: last step of the learning rate schedule.
        data_order: version of the shuffling of windows; None in checkpoints from before version 2.
        preparation: version of the corpus preparation by ``data.load_corpus``; None likewise.
        lineage: the model file that ``train.init_from`` named when the run started (path, SHA-256, step), or None.
        source_windows: windows of each source seen so far, where sources have weights; else empty.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    config: dict[str, Any]
    corpus_sha256: str
    tokenizer_fingerprint: str
    best: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    total_steps: int | None = None
    data_order: str | None = None
    preparation: int | None = None
    lineage: dict[str, Any] | None = None
    source_windows: tuple[int, ...] = ()


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return run / f"{_PREFIX}{step:08d}"


def save_checkpoint(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    optimizer_tensors: dict[str, Tensor],
    state: TrainerState,
    average: WeightAverage | None = None,
    world: World | None = None,
) -> Path:
    """Write a checkpoint and make it the ``latest``; return its folder.

    Rank 0 calls it. If the model is sharded, every rank of ``world`` must, and all write their shards at the same time;
    rank 0 writes everything else.

    Raises:
        StorageError: it could not be written. Its files are removed, and earlier checkpoints are unchanged.
        RankError: the same, on the ranks that did write their shards while another could not.
    """
    final, world = step_folder(run, state.step), world or World()
    if world.is_main:
        with explain_write_errors(final):
            run.mkdir(parents=True, exist_ok=True)
            remove_leftovers(run)
    try:
        with explain_write_errors(final), shared_temporary(final, world, next(model.parameters()).device) as temporary:
            _write_checkpoint(temporary, model, tokenizer, optimizer_tensors, state, average, world)
            if world.is_main:
                sync_file(temporary)
                if os.path.lexists(final):  # the same step is saved again after a resume from an older checkpoint
                    remove_checkpoint(final)
                os.replace(temporary, final)
                sync_file(run)
        if world.is_main:
            point(run, LATEST, state.step)
    except StorageError as error:
        raise StorageError(f"{final} was not saved: {error}") from error
    return final


def _write_checkpoint(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    optimizer_tensors: dict[str, Tensor],
    state: TrainerState,
    average: WeightAverage | None,
    world: World,
) -> None:
    """Write the files of a checkpoint into ``folder``; the state comes last, with the hashes of the others."""
    # Only where it is on, so that the files of other runs keep their bytes.
    isolated = {ISOLATED_NOTE: True} if state.config.get("data", {}).get("isolate_documents") else {}
    metadata = {"step": state.step, "tokens": state.tokens, **state.metrics, **isolated}
    hashes = {MODEL_FILE: save_model(folder / MODEL_FILE, model, tokenizer, metadata)}
    # Before its first step an optimizer has no tensors that would be sharded.
    if world.is_main or optimizer_tensors:
        hashes[OPTIMIZER_FILE] = write_tensors(folder / OPTIMIZER_FILE, optimizer_tensors, _OPTIMIZER_METADATA)
    if average is not None:
        notes = {"step": state.step, "tokens": state.tokens, **average.notes(), **_ema_figures(state), **isolated}
        hashes[EMA_FILE] = save_model(folder / EMA_FILE, model, tokenizer, notes, average.tensors())
    if world.is_main:
        write_text(folder / STATE_FILE, _dump_with_checksum({"files": hashes, "state": asdict(state)}))


def _ema_figures(state: TrainerState) -> dict[str, Any]:
    """Return the validation of the averaged weights as notes of their file, if it is that of this very step."""
    if state.ema is None or state.ema["step"] != state.step:
        return {}
    return {f"val_{name}": value for name, value in state.ema.items() if name != "step"}


def is_own_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint that psannlm wrote, valid or damaged, without any other file.

    Its content decides: the state with its own hash, or if that is damaged, the header of one of the tensor files.
    """
    if not is_plain_folder(folder) or not _FOLDER.fullmatch(folder.name):
        return False
    shards = {shard_folder(folder / name): folder / name for name in _TENSOR_FILES}
    for path in folder.iterdir():
        if path in shards and not has_only_shards(shards[path]):
            return False
        if path not in shards and not (path.name in (STATE_FILE, *_TENSOR_FILES) and is_plain_file(path)):
            return False
    return _is_own_state(folder / STATE_FILE) or any(
        str(file_metadata(folder / name).get("format", "")).startswith("psannlm-") for name in _TENSOR_FILES
    )


def _is_own_state(path: Path) -> bool:
    """Whether the file at ``path`` is the state of a checkpoint and matches its own hash."""
    try:
        content = json.loads(read_small(path, _STATE_BYTES) or b"")
        return bool(content.pop("sha256") == _digest(content)) and "state" in content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def is_pointer(path: Path) -> bool:
    """Whether the file at ``path`` is a ``latest`` or ``best`` as :func:`point` writes it."""
    return _POINTER.fullmatch(read_small(path, 64) or b"") is not None


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a killed process leaves no half-deleted checkpoint.

    Raises:
        StorageError: it cannot be removed, or it holds files that psannlm did not write; then it is unchanged.
    """
    if not is_own_checkpoint(folder):
        raise StorageError(
            f"{folder} is in the way: it holds files that psannlm did not write, so it is not removed. Move it."
        )
    with explain_write_errors(folder), temporary_beside(folder) as doomed:
        os.replace(folder, doomed)


def point(run: Path, name: str, step: int) -> None:
    """Write the name of the checkpoint of ``step`` to ``run/latest`` or ``run/best``."""
    write_text(run / name, step_folder(run, step).name + "\n")


def _dump_with_checksum(content: dict[str, Any], format_version: int = FORMAT_VERSION) -> str:
    """Return JSON whose first entry is the SHA-256 of the rest in canonical form."""
    body = {"format_version": format_version, **content}
    return json.dumps({"sha256": _digest(body), **body}, indent=1) + "\n"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8")).hexdigest()


def read_state(folder: Path) -> TrainerState:
    """Read ``trainer.json`` of a checkpoint and check every file beside it against its hash.

    Raises:
        ArtifactError: something is missing, damaged, or of another format version.
    """
    path = folder / STATE_FILE
    refuse_pointer(path, ArtifactError)
    if path.exists() and not path.is_file():  # reading a FIFO would block forever
        raise ArtifactError(f"{path} is not a regular file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        recorded = content.pop("sha256")
        version = content["format_version"]
    except OSError as error:
        raise ArtifactError(f"{path} is missing or cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not the JSON of a checkpoint") from error
    if type(version) is not int or version not in _READABLE_VERSIONS:
        readable = " and ".join(map(str, _READABLE_VERSIONS))
        raise ArtifactError(f"{path} has format version {version!r:.40}, this psannlm reads {readable}")
    # Changed bytes that JSON ignores, such as white space, are damage too: the text must be the one that was written.
    body = {name: value for name, value in content.items() if name != "format_version"}
    if recorded != _digest(content) or text != _dump_with_checksum(body, version):
        raise ArtifactError(f"{path} is damaged: its content does not match its hash")
    try:
        hashes = {name: content["files"][name] for name in (MODEL_FILE, OPTIMIZER_FILE)}
        hashes |= {name: digest for name, digest in content["files"].items() if name == EMA_FILE}
        stored = content["state"]
        seen = tuple(stored["source_windows"]) if "source_windows" in stored else ()
        state = TrainerState(**{**stored, "position": Position(**stored["position"]), "source_windows": seen})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not the state of a checkpoint: an entry is missing or unknown") from error
    _refuse_oversize(folder)
    for name, digest in hashes.items():
        if verify_tensors(folder / name).sha256 != digest:
            raise ArtifactError(f"{folder / name} belongs to another checkpoint")
    return state


def _refuse_oversize(folder: Path) -> None:
    """Check large files of a checkpoint by their headers before they are hashed, which takes minutes.

    Raises:
        ArtifactError: a file does not fit the model's configuration, or needs more memory than the machine has.
    """
    refuse_oversize_file(folder / MODEL_FILE)
    refuse_oversize_file(folder / EMA_FILE)
    path = folder / OPTIMIZER_FILE
    if stored_bytes(path) <= HASHED_FIRST_BYTES:
        return
    model = read_head(folder / MODEL_FILE)
    n_elements = sum(math.prod(shape) for shape in model.shapes.values())
    n_bytes = read_head(path).n_bytes
    # At most two float32 moments per element, and one step count per parameter.
    if n_bytes > 8 * n_elements + 64 * len(model.shapes):
        raise ArtifactError(
            f"{path} does not fit its model: {n_bytes / 1e9:,.1f} GB of optimizer state for {n_elements:,} parameters"
        )


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """Return the optimiser's tensors of a checkpoint. Raises ArtifactError if they are damaged or missing."""
    path = folder / OPTIMIZER_FILE
    content = read_tensors(path)
    return present_names(path, content.tensors, content.metadata)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, valid or damaged."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _FOLDER.fullmatch(path.name) and is_plain_folder(path)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step number in the name of a checkpoint folder."""
    return int(folder.name[len(_PREFIX) :])


def latest_valid_checkpoint(run: Path) -> tuple[Path, TrainerState] | None:
    """Return the newest valid checkpoint of ``run`` and its state; log a warning for each damaged one.

    Raises:
        ArtifactError: every checkpoint is damaged; or a file is a Git LFS pointer that was not fetched, which must not
            be skipped as damaged.
    """
    folders = list_checkpoints(run)
    for folder in reversed(folders):
        shards = (file for name in _TENSOR_FILES for file in shard_folder(folder / name).glob("*.safetensors"))
        for path in (*(folder / name for name in (STATE_FILE, *_TENSOR_FILES)), *shards):
            refuse_pointer(path, ArtifactError)
        try:
            return folder, read_state(folder)
        except ArtifactError as error:
            log.warning(f"skipping a damaged checkpoint: {error}")
    if folders:
        raise ArtifactError(f"all {len(folders)} checkpoints under {run} are damaged")
    return None


def prune(run: Path, keep: int, kept_steps: Collection[int]) -> None:
    """Remove all but the newest ``keep`` checkpoints and those of ``kept_steps``. Folders of other origin are kept.

    Raises:
        StorageError: a checkpoint cannot be removed.
    """
    for folder in [path for path in list_checkpoints(run) if is_own_checkpoint(path)][:-keep]:
        if step_of(folder) not in kept_steps:
            remove_checkpoint(folder)


def read_pointer(run: Path, name: str) -> Path | None:
    """Return the checkpoint folder named in ``run/latest`` or ``run/best``; None if either is missing."""
    if not (run / name).is_file():  # reading a FIFO would block forever
        return None
    try:
        target = (run / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return run / target if _FOLDER.fullmatch(target) and (run / target).is_dir() else None


def find_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint to use under ``root``, a run or a folder of runs; None if there is none.

    Of several runs it takes the one that saved last; within it the best checkpoint by validation loss, or without
    validation the latest one. If ``best`` and ``latest`` are missing (a copy of the ``step_*`` folders alone), it takes
    the newest one whose model file is valid.

    Raises:
        ArtifactError: the model file of every checkpoint of that run is damaged.
    """
    runs = [root, *(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    runs = [run for run in runs if list_checkpoints(run)]
    if not runs:
        return None
    newest = max(runs, key=_saved_at)
    return read_pointer(newest, BEST) or read_pointer(newest, LATEST) or _latest_valid_model(newest)


def ema_file(checkpoint: Path) -> Path:
    """Return the model file with the averaged weights of a checkpoint folder. Raises ArtifactError if it has none."""
    if not (checkpoint / EMA_FILE).is_file():
        raise ArtifactError(
            f"{checkpoint} has no averaged weights: {EMA_FILE} is in the checkpoint folders of runs with train.ema"
        )
    return checkpoint / EMA_FILE


def _saved_at(run: Path) -> int:
    """Return the time of a run's last save in ns: that of ``latest``, or without it of its newest checkpoint."""
    latest = run / LATEST
    return (latest if latest.is_file() else list_checkpoints(run)[-1]).stat().st_mtime_ns


def _latest_valid_model(run: Path) -> Path:
    """Return the newest checkpoint whose model file is valid. Raises ArtifactError if none is."""
    first: ArtifactError | None = None
    for folder in reversed(list_checkpoints(run)):
        try:
            refuse_oversize_file(folder / MODEL_FILE)
            verify_tensors(folder / MODEL_FILE)
        except ArtifactError as error:
            first = first or error
            continue
        return folder
    raise ArtifactError(f"no checkpoint under {run} has a valid model file: {first}")
