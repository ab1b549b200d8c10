"""Messages of the library, which its modules log with the standard ``logging``: who receives them within a context.

Every module logs to ``logging.getLogger(__name__)``, below the logger ``psannlm``. Without a receiver they are silent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Receiver(logging.Handler):
    """Handler that calls ``take`` with the text of a message, and passes records from ``others_level`` on to others."""

    def __init__(self, take: Callable[[str], None], others_level: int | None) -> None:
        super().__init__(logging.INFO)
        self._take, self._others_level = take, others_level

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())
        root = logging.getLogger()
        # Without handlers, the root logger would print warnings by its last resort.
        if self._others_level is not None and record.levelno >= self._others_level and root.handlers:
            root.callHandlers(record)


@contextmanager
def receiving_messages(take: Callable[[str], None]) -> Iterator[None]:
    """Call ``take`` with the text of each message within the context; what ``take`` raises, the logging module raises.

    The handlers of the root logger get the records that they would have got without this context.
    """
    logger = logging.getLogger("psannlm")
    level, propagates, others_level = logger.level, logger.propagate, logger.getEffectiveLevel()
    is_hidden = others_level > logging.INFO
    handler = _Receiver(take, others_level if is_hidden and propagates else None)
    logger.addHandler(handler)
    if is_hidden:
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


@contextmanager
def without_messages() -> Iterator[None]:
    """Drop all messages within the context."""
    logger = logging.getLogger("psannlm")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
