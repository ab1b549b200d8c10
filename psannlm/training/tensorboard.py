"""Rows of metrics to TensorBoard's event files, where they are asked for and its package is there."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from psannlm.errors import ConfigError, Problem
from psannlm.io.atomic import explain_write_errors

BOARD_FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Raise ConfigError, with the line that installs it, where the package tensorboard is missing."""
    if find_spec("tensorboard") is None:
        message = "needs the package tensorboard: pip install -c constraints.txt '.[tensorboard]'; or set it to false"
        raise ConfigError(Problem("train.tensorboard", message))


class TensorBoardLog:
    """Writes every number of a row as a scalar ``kind/name``, and samples as texts, to ``tensorboard/`` in a run."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        """Open the log of a run that goes on after ``after_step``; later events of an earlier run count no more.

        Raises:
            StorageError: the files cannot be written.
        """
        # Its import sets a handler on the root logger where there is none, which would print other libraries' notes.
        had_handlers = list(logging.getLogger().handlers)
        from torch.utils.tensorboard import SummaryWriter

        logging.getLogger().handlers[:] = had_handlers
        path = folder / BOARD_FOLDER
        with explain_write_errors(path):
            # TensorBoard drops what it read before of the step named here and of later ones: they are made again.
            self._writer = SummaryWriter(path, purge_step=after_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row, so that it can be seen at once."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "sample":
            text = f"{values['prompt']}{values['text']}"
            # Indented, Markdown leaves it as it is.
            page = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(f"sample/{values['prompt'][:40]}", page, step)
        self._writer.flush()

    def close(self) -> None:
        """Let go of the files."""
        self._writer.close()
