"""Standard streams: broken pipes, closed or full streams, and terminals without UTF-8."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from psannlm.display import printable
from psannlm.errors import StreamError

# Errors of a write to a closed terminal, and to a pipe without a reader.
_LOST = (errno.EIO, errno.EPIPE)


@contextmanager
def discarding_lost_output(on_loss: Callable[[], None]) -> Iterator[None]:
    """Within the context, discard output to a closed terminal or pipe and call ``on_loss``, instead of raising.

    Later output to that stream is discarded too, until the process ends.
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
    """Text stream that survives the loss of its reader."""

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
        _discard(self._stream)
        self._on_loss()


@contextmanager
def guarding_streams() -> Iterator[None]:
    """Within the context, raise a clear error for closed or full streams, and replace characters they cannot encode.

    Writing to a closed or full standard output, and reading from a closed standard input, raises StreamError. Messages
    to a closed or full standard error are discarded.
    """
    former = sys.stdin, sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    # Python sets a stream that was closed at its start to None.
    sys.stdin = cast(TextIO, _ClosedInput()) if former[0] is None else former[0]
    sys.stdout = cast(TextIO, _Guarded(former[1], "standard output", is_vital=True))
    sys.stderr = cast(TextIO, _Guarded(former[2], "standard error", is_vital=False))
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = former


def _occupy_closed_descriptors() -> None:
    """Open the null device on the descriptors of closed standard streams.

    Otherwise the next opened file gets the descriptor, and C libraries would print into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)


def flush_output() -> None:
    """Flush standard output.

    Raises:
        StreamError: it cannot be written.
        BrokenPipeError: its reader has closed it; the buffer is discarded.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        raise


def print_error_line(text: str) -> None:
    """Print a line on standard error with visible escapes. Never fails, because no stream is left to report it on."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{printable(text, keep=chr(10))}\n")
        sys.stderr.flush()


def write_output(text: str) -> None:
    """Write text to standard output: literally, or with visible escapes on a terminal."""
    sys.stdout.write(printable(text, keep="\n\t") if is_terminal(sys.stdout) else text)


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal, whatever the environment says."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError, OSError):
        return False


def _discard(stream: Any) -> None:
    """Redirect a stream, with its buffered and later output, to the null device."""
    # A stream without a file descriptor, or a closed one, has nothing that could still be written.
    with suppress(OSError, ValueError, AttributeError):
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, stream.fileno())
        os.close(null_device)


class _Guarded:
    """Output stream whose errors name it, and which replaces characters that its encoding lacks."""

    def __init__(self, stream: Any, name: str, *, is_vital: bool, is_text: bool = True) -> None:
        self._stream, self._name, self._is_vital, self._is_text = stream, name, is_vital, is_text
        self._fault = "closed" if stream is None else ""

    def __getattr__(self, name: str) -> Any:
        if self._stream is not None:
            return getattr(self._stream, name)
        # Attributes that callers read before they write.
        if name in _OF_A_CLOSED_STREAM:
            return _OF_A_CLOSED_STREAM[name]
        raise AttributeError(name)

    @property
    def buffer(self) -> _Guarded:
        """The bytes below the text."""
        return _Guarded(getattr(self._stream, "buffer", None), self._name, is_vital=self._is_vital, is_text=False)

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return is_terminal(self._stream)

    def write(self, content: Any) -> int:
        """Write as the stream does."""
        if self._is_text is not isinstance(content, str):
            raise TypeError(f"{self._name} does not take {type(content).__name__} here")
        if not content:
            return 0
        if self._fault:
            self._fail()
            return len(content)
        try:
            try:
                return int(self._stream.write(content) or 0)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return int(self._stream.write(content.encode(encoding, "replace").decode(encoding)) or 0)
        except OSError as error:
            self._lose(error)
            return len(content)

    def writelines(self, lines: Any) -> None:
        """Write as the stream does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush as the stream does."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno in _LOST:
            raise error
        _discard(self._stream)
        self._fault = (error.strerror or str(error)).lower()
        self._fail()

    def _fail(self) -> None:
        if self._is_vital:
            raise StreamError(f"{self._name}: {self._fault}; its output is lost")


_OF_A_CLOSED_STREAM = {"encoding": "utf-8", "errors": "strict", "closed": False}


class _ClosedInput:
    """Standard input that was closed before the program began."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal: never."""
        return False

    def close(self) -> None:
        """Do nothing: it is closed."""

    def fileno(self) -> int:
        """Return the descriptor, which is the null device."""
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StreamError("standard input: closed; name a file, or pipe the output of another command into it")
