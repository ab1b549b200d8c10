"""Standard output and error that survive their reader: a terminal that is closed, a connection that is lost."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# What a write to a terminal that is gone gives, and to a pipe that nobody reads.
_LOST = (errno.EIO, errno.EPIPE)


@contextmanager
def bearing_loss(on_loss: Callable[[], None]) -> Iterator[None]:
    """Within the context, drop what is printed to a reader that is gone, and call ``on_loss``, instead of raising.

    What is printed there afterwards is dropped too, until the process ends.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream, on_loss) if stream is not None else None for stream in former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Output):
                stream.flush()
        sys.stdout, sys.stderr = former


class _Output:
    """A text stream, but for a reader that is gone."""

    def __init__(self, stream: TextIO, on_loss: Callable[[], None]) -> None:
        self._stream, self._on_loss = stream, on_loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write as the stream does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush as the stream does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno not in _LOST:
            raise error
        # What is in the buffers still, and all that comes later, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._on_loss()
