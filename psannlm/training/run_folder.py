"""What a run writes into its folder, told by content from what is somebody else's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from psannlm.config.files import MANIFEST_FILE, is_own_manifest
from psannlm.config.run import RunConfig, to_yaml
from psannlm.errors import ConfigError, StorageError
from psannlm.io.atomic import is_plain_folder, read_small, refuse_foreign
from psannlm.io.lock import LOCK_FILE
from psannlm.io.records import FIGURES_FILE, TABLE_FILE, is_own_file, is_own_log
from psannlm.training.checkpoint import BEST, LATEST, is_own_checkpoint, is_pointer, list_checkpoints, step_folder
from psannlm.training.metrics import CURVE_FILE, METRICS_FILE
from psannlm.training.tensorboard import BOARD_FOLDER

CONFIG_FILE = "config.yaml"
SYSTEM_FILE = "system.json"
_CONFIG_BYTES = 1 << 20
_PICTURE_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_EVENTS = "events.out.tfevents."


def is_own_config(path: Path) -> bool:
    """Whether the file is a configuration exactly as psannlm writes it, without comments and with every key."""
    text = read_small(path, _CONFIG_BYTES)
    if text is None:
        return False
    try:
        return to_yaml(RunConfig.model_validate(yaml.safe_load(text))).encode("utf-8") == text
    except (yaml.YAMLError, ValidationError, ConfigError, ValueError, RecursionError):
        return _has_sections(text)


def _has_sections(text: bytes) -> bool:
    """Whether ``text`` has the form of a configuration that another version wrote: all sections, and no comment."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    is_whole = isinstance(content, dict) and list(content) == ["model", "data", "train"] and b"#" not in text
    return is_whole and all(isinstance(section, dict) and len(section) > 8 for section in content.values())


def is_own_curve(path: Path) -> bool:
    """Whether the picture says in its own metadata that psannlm drew it, or Matplotlib beside the log of a run."""
    content = read_small(path, _PICTURE_BYTES)
    if content is None or not content.startswith(_PNG):
        return False
    head = content[:2048]
    is_run = (path.parent / METRICS_FILE).is_file() and is_own_log(path.parent / METRICS_FILE)
    return b"Software\x00psannlm" in head or (is_run and b"Software\x00Matplotlib" in head)


_OWN: dict[str, Callable[[Path], bool]] = {
    CONFIG_FILE: is_own_config,
    SYSTEM_FILE: is_own_file,
    METRICS_FILE: is_own_log,
    LATEST: is_pointer,
    BEST: is_pointer,
    CURVE_FILE: is_own_curve,
}
_REMEDY = "or choose another train.checkpoint_dir (--out)"


def refuse_foreign_files(folder: Path, config: RunConfig, n_steps: int | None = None) -> None:
    """Make sure that a run in ``folder`` will write over nothing but what an earlier run wrote there.

    A configuration of the user's own that says the same as ``config`` may stand there: it is left as it is.

    Args:
        n_steps: the last step of the run, whose checkpoint must have room.

    Raises:
        StorageError: something foreign is in the way; the message names it.
    """
    manifest = folder / MANIFEST_FILE
    if manifest.is_file() and is_own_manifest(manifest):
        raise StorageError(
            f"{folder} is a folder that psannlm prep made, and a run would replace its records; choose another "
            "train.checkpoint_dir (--out)"
        )
    for name, is_ours in _OWN.items():
        if name == CONFIG_FILE and says_the_same(folder / name, config):
            continue
        refuse_foreign(folder / name, is_ours, _REMEDY)
    for path in list_checkpoints(folder):
        if not is_own_checkpoint(path):
            raise StorageError(f"{path} is in the way: it is not a checkpoint of psannlm alone. Move it, {_REMEDY}.")
    if n_steps is not None and os.path.lexists(step_folder(folder, n_steps)):
        path = step_folder(folder, n_steps)
        if not is_own_checkpoint(path):
            raise StorageError(f"{path} is in the way: it is not a checkpoint of psannlm. Move it, {_REMEDY}.")
    board = folder / BOARD_FOLDER
    if config.train.tensorboard and os.path.lexists(board) and not is_own_board(board):
        raise StorageError(f"{board} is in the way: it holds more than TensorBoard's event files. Move it, {_REMEDY}.")


def says_the_same(path: Path, config: RunConfig) -> bool:
    """Whether the file is a configuration that equals ``config``, however it is written."""
    text = read_small(path, _CONFIG_BYTES)
    if text is None:
        return False
    try:
        return RunConfig.model_validate(yaml.safe_load(text)) == config
    except (yaml.YAMLError, ValidationError, ConfigError, ValueError, RecursionError):
        return False


def is_own_board(folder: Path) -> bool:
    """Whether ``folder`` holds event files of TensorBoard and nothing else."""
    return is_plain_folder(folder) and all(path.name.startswith(_EVENTS) for path in folder.iterdir())


def foreign_entry(folder: Path) -> Path | None:
    """Return something in a run folder that no run wrote, or None where all of it is a run's own."""
    for path in sorted(folder.iterdir()):
        if path.name == LOCK_FILE or is_own_checkpoint(path):
            continue
        if path.name == BOARD_FOLDER and is_own_board(path):
            continue
        is_ours = {**_OWN, FIGURES_FILE: is_own_file, TABLE_FILE: is_own_file}.get(path.name)
        if is_ours is None or path.is_symlink() or not path.is_file() or not is_ours(path):
            return path
    return None
