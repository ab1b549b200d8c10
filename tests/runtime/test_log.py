"""Messages: silent by default, received within a context, and no other handler gets more or less than before."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from psannlm.runtime.log import receiving_messages, without_messages

log = logging.getLogger("psannlm.tests")


@pytest.fixture
def root_handler() -> Iterator[list[str]]:
    """The texts that a handler of the root logger gets."""
    got: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            got.append(record.getMessage())

    handler = Handler()
    logging.getLogger().addHandler(handler)
    yield got
    logging.getLogger().removeHandler(handler)


def tell() -> None:
    log.debug("debug")
    log.info("info, 100%% literal %s")
    log.warning("warning")


TOLD = ["info, 100%% literal %s", "warning"]


def test_receiver_gets_messages_within_its_context_only() -> None:
    got: list[str] = []
    with receiving_messages(got.append):
        tell()
    tell()
    assert got == TOLD
    with pytest.raises(ZeroDivisionError), receiving_messages(lambda text: 1 / 0):  # type: ignore[arg-type, return-value]
        tell()


@pytest.mark.parametrize(
    ("level", "wanted"), [(logging.WARNING, ["warning"]), (logging.INFO, TOLD), (logging.DEBUG, ["debug", *TOLD])]
)
def test_receiver_changes_nothing_for_other_handlers(
    root_handler: list[str], monkeypatch: pytest.MonkeyPatch, level: int, wanted: list[str]
) -> None:
    former = logging.getLogger().level
    logging.getLogger().setLevel(level)
    try:
        for _ in range(2):
            root_handler.clear()
            tell()
            assert root_handler == wanted
            root_handler.clear()
            with receiving_messages(lambda text: None):
                tell()
            assert root_handler == wanted
    finally:
        logging.getLogger().setLevel(former)


def test_nested_receivers_both_get_messages() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with receiving_messages(outer.append), receiving_messages(inner.append):
        tell()
    assert outer == inner == TOLD


def test_messages_are_dropped_within_the_silent_context() -> None:
    got: list[str] = []
    with receiving_messages(got.append):
        with without_messages():
            tell()
        assert got == []
        tell()
    assert got == TOLD


def test_messages_are_silent_without_configuration() -> None:
    program = """
import logging
from psannlm.runtime.log import receiving_messages
log = logging.getLogger("psannlm.data")
log.warning("nobody listens")
with receiving_messages(print):
    log.warning("once")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("once\n", "")
