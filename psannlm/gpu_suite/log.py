"""Lines in; a file that holds each of them from the moment it was said, with the seconds since the start, out."""

from __future__ import annotations

import time
from pathlib import Path

from psannlm.io.atomic import explain_write_errors
from psannlm.io.filenames import utf8


class SuiteLog:
    """What a battery said, line by line: whole up to the last one even if the process is killed.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.monotonic()
        with explain_write_errors(path):
            path.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        """Add one line."""
        seconds = time.monotonic() - self._began
        self.add(f"{seconds:9.1f} s  {line}\n")

    def add(self, text: str) -> None:
        """Add text as it is, such as a table."""
        with explain_write_errors(self._path), open(self._path, "ab") as file:
            file.write(utf8(text))
