"""Pauses of Python's garbage collection."""

from __future__ import annotations

import gc

import pytest

from psannlm.runtime.collection import pausing_collection


def fail_inside() -> None:
    with pausing_collection():
        assert not gc.isenabled()
        raise ValueError("broken")


def test_paused_collection_continues_after_an_error() -> None:
    with pytest.raises(ValueError, match="broken"):
        fail_inside()
    assert gc.isenabled()
    gc.unfreeze()


def test_pausing_leaves_a_disabled_collection_disabled() -> None:
    gc.disable()
    try:
        with pausing_collection():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
