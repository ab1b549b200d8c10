"""Ownership of a run folder: files that psannlm wrote, recognised by content, and foreign ones, never overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

import yaml
from pydantic import ValidationError

from psannlm.config.files import MANIFEST_FILE, is_own_manifest
from psannlm.config.run import RunConfig, to_yaml
from psannlm.errors import ConfigError, DivergedError, Interrupted, RankError, StorageError, describe
from psannlm.io.atomic import explain_write_errors, is_plain_folder, read_small, refuse_foreign
from psannlm.io.lock import LOCK_FILE
from psannlm.io.records import FIGURES_FILE, TABLE_FILE, is_own_file, is_own_log
from psannlm.io.run_metadata import write_json
from psannlm.training.checkpoint import BEST, LATEST, is_own_checkpoint, is_pointer, list_checkpoints, step_folder
from psannlm.training.metrics import BOARD_FOLDER, CURVE_FILE, METRICS_FILE

CONFIG_FILE = "config.yaml"
SYSTEM_FILE = "system.json"
STATUS_FILE = "status.json"
_STATUS_FORMAT = "psannlm-run-status"
_CONFIG_BYTES = 1 << 20
_STATUS_BYTES = 1 << 20
_PICTURE_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_EVENTS = "events.out.tfevents."


class RunStatus(str, Enum):
    """How a run ended, as recorded in ``status.json``. Without that file it is running, or its process was killed."""

    FINISHED = "finished"  # the last step was reached
    STOPPED = "stopped"  # a signal, the caller or the time budget ended it; it can resume
    DIVERGED = "diverged"  # a loss, gradient or parameter was not finite; it would diverge again
    FAILED = "failed"  # any other error


def write_status(folder: Path, status: RunStatus, message: str | None = None) -> None:
    """Write ``status.json``. Raises StorageError if that fails."""
    write_json(folder / STATUS_FILE, {"format": _STATUS_FORMAT, "status": status.value, "message": message})


def read_run_status(folder: Path) -> tuple[RunStatus, str | None] | None:
    """Return how the run in ``folder`` ended and its error message; None without a valid ``status.json``."""
    try:
        content = json.loads(read_small(folder / STATUS_FILE, _STATUS_BYTES) or b"")
        # Other programs write files of this name with a status and a message too.
        return (RunStatus(content["status"]), content["message"]) if content["format"] == _STATUS_FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


@contextmanager
def recording_failure(folder: Path) -> Iterator[None]:
    """Remove ``status.json`` of an earlier attempt, and write a new one if an exception leaves the context."""
    with explain_write_errors(folder):
        (folder / STATUS_FILE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        status = RunStatus.FAILED
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            status = RunStatus.STOPPED
        elif isinstance(error, DivergedError):
            status = RunStatus.DIVERGED
        # The error that ends the run matters more than a full disk that prevents its record.
        with suppress(StorageError):
            write_status(folder, status, describe(error))
        raise


@contextmanager
def recording_rank_failure(folder: Path) -> Iterator[None]:
    """Write into the ``status.json`` of a failed run which rank failed and why, if a RankError leaves the context.

    :func:`recording_failure` saw only what followed from it on this rank, such as a broken connection.
    """
    try:
        yield
    except RankError as error:
        found = read_run_status(folder)
        if found is not None and found[0] is RunStatus.FAILED:
            with suppress(StorageError):
                write_status(folder, RunStatus.FAILED, describe(error))
        raise


def is_own_status(path: Path) -> bool:
    """Whether the file is a ``status.json`` of a run."""
    return read_run_status(path.parent) is not None


def is_own_config(path: Path) -> bool:
    """Whether the file is a configuration exactly as psannlm writes it: no comments, every key."""
    text = read_small(path, _CONFIG_BYTES)
    if text is None:
        return False
    try:
        return to_yaml(RunConfig.model_validate(yaml.safe_load(text))).encode("utf-8") == text
    except (yaml.YAMLError, ValidationError, ConfigError, ValueError, RecursionError):
        return _has_sections(text)


def _has_sections(text: bytes) -> bool:
    """Whether ``text`` looks like a configuration that another version wrote: all sections, no comments."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    is_whole = isinstance(content, dict) and list(content) == ["model", "data", "train"] and b"#" not in text
    return is_whole and all(isinstance(section, dict) and len(section) > 8 for section in content.values())


def is_own_curve(path: Path) -> bool:
    """Whether the image metadata name psannlm as the author, or Matplotlib next to the log of a run."""
    content = read_small(path, _PICTURE_BYTES)
    if content is None or not content.startswith(_PNG):
        return False
    head = content[:2048]
    is_run = (path.parent / METRICS_FILE).is_file() and is_own_log(path.parent / METRICS_FILE)
    return b"Software\x00psannlm" in head or (is_run and b"Software\x00Matplotlib" in head)


_OWN: dict[str, Callable[[Path], bool]] = {
    CONFIG_FILE: is_own_config,
    SYSTEM_FILE: is_own_file,
    STATUS_FILE: is_own_status,
    METRICS_FILE: is_own_log,
    LATEST: is_pointer,
    BEST: is_pointer,
    CURVE_FILE: is_own_curve,
}
_REMEDY = "or choose another train.checkpoint_dir (--out)"


def refuse_foreign_files(folder: Path, config: RunConfig, n_steps: int | None = None) -> None:
    """Check that a run in ``folder`` overwrites only files that an earlier run wrote.

    A hand-written configuration with the values of ``config`` is accepted and not overwritten.

    Args:
        n_steps: the last step of the run, whose checkpoint folder must be free.

    Raises:
        StorageError: a foreign file is in the way; the message names it.
    """
    manifest = folder / MANIFEST_FILE
    if manifest.is_file() and is_own_manifest(manifest):
        raise StorageError(
            f"{folder} is the output of psannlm prep, and a run would replace its records; choose another "
            "train.checkpoint_dir (--out)"
        )
    for name, is_ours in _OWN.items():
        if name == CONFIG_FILE and has_same_config(folder / name, config):
            continue
        refuse_foreign(folder / name, is_ours, _REMEDY)
    for path in list_checkpoints(folder):
        if not is_own_checkpoint(path):
            raise StorageError(f"{path} is in the way: it holds files that psannlm did not write. Move it, {_REMEDY}.")
    if n_steps is not None and os.path.lexists(step_folder(folder, n_steps)):
        path = step_folder(folder, n_steps)
        if not is_own_checkpoint(path):
            raise StorageError(f"{path} is in the way: it is not a checkpoint of psannlm. Move it, {_REMEDY}.")
    board = folder / BOARD_FOLDER
    if config.train.tensorboard and os.path.lexists(board) and not is_own_board(board):
        raise StorageError(f"{board} is in the way: it holds more than TensorBoard's event files. Move it, {_REMEDY}.")


def has_same_config(path: Path, config: RunConfig) -> bool:
    """Whether the file is a configuration equal to ``config``, whatever its formatting."""
    text = read_small(path, _CONFIG_BYTES)
    if text is None:
        return False
    try:
        return RunConfig.model_validate(yaml.safe_load(text)) == config
    except (yaml.YAMLError, ValidationError, ConfigError, ValueError, RecursionError):
        return False


def is_own_board(folder: Path) -> bool:
    """Whether ``folder`` holds TensorBoard event files only."""
    return is_plain_folder(folder) and all(path.name.startswith(_EVENTS) for path in folder.iterdir())


def foreign_entry(folder: Path) -> Path | None:
    """Return the first entry of a run folder that psannlm did not write, or None."""
    for path in sorted(folder.iterdir()):
        if path.name == LOCK_FILE or is_own_checkpoint(path):
            continue
        if path.name == BOARD_FOLDER and is_own_board(path):
            continue
        is_ours = {**_OWN, FIGURES_FILE: is_own_file, TABLE_FILE: is_own_file}.get(path.name)
        if is_ours is None or path.is_symlink() or not path.is_file() or not is_ours(path):
            return path
    return None
