"""Ray task of ``prep``: encodes one chunk on any node of a cluster and returns the content of its file.

A task gets bytes and returns bytes: it neither reads nor writes a file, so the nodes need no common disk.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm import __version__
from psannlm.io.code_identity import sources_sha256
from psannlm.prep.chunks import Chunk
from psannlm.prep.encode_worker import ERRORS, ONE_THREAD, ChunkEncoder, encoder_of
from psannlm.prep.encoded_chunk import encoded_chunk_parts
from psannlm.runtime.malloc import trim_aggressively

# Libraries that decide the ids of a text, and psannlm's packages that decide the rest of an encoded chunk.
_LIBRARIES = ("sentencepiece", "tokenizers")
_SOURCES = ("data", "prep", "tokenizers")
_DIGITS = 12

# The encoder of the preparation that this process works for, by its key: one, since a tokenizer takes memory.
_encoders: dict[str, ChunkEncoder] = {}


def versions() -> dict[str, str]:
    """Return the versions of all that decides the bytes of an encoded chunk, by name."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"psannlm": __version__, "code of psannlm": sources_sha256(_SOURCES)[:_DIGITS], **libraries}


def differing_versions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Return the versions of a worker that differ from ours, for an error message; empty if none does."""
    return ", ".join(
        f"{name} {theirs.get(name, 'missing')} instead of {ours[name]}"
        for name in ours
        if theirs.get(name) != ours[name]
    )


def version_reporter() -> Callable[[], dict[str, Any]]:
    """Return a function that reports the versions of the node it is run on, also where psannlm is not installed.

    Ray sends functions that a module holds by their names, but this one by its code.
    """

    def report() -> dict[str, Any]:
        import importlib
        import platform

        try:
            worker = importlib.import_module("psannlm.prep.ray_worker")
        except ImportError as error:
            return {"host": platform.node(), "missing": str(error)}
        return {"host": platform.node(), "versions": worker.versions()}

    return report


def encode_on_ray(key: str, job: list[Any], header: bytes, payload: NDArray[np.uint8]) -> tuple[dict[str, Any], Any]:
    """Encode the chunk of ``header`` and ``payload``; return its figures and the content of its file.

    Args:
        key: identifies the preparation.
        job: a list that holds the reference to its (setup, tokenizer, versions), which is fetched once per process.

    Returns:
        ``tokens`` and (n_bytes,) uint8. The array is None where the chunk has an ``error``, or where this node has
        other ``versions``.
    """
    encoder = _encoders.get(key)
    if encoder is None:
        # The libraries read these when they first encode.
        os.environ.update(ONE_THREAD)
        trim_aggressively()
        setup, tokenizer, expected = import_module("ray").get(job[0])
        # A node may have joined the cluster since the versions of all nodes were compared.
        if differing := differing_versions(versions(), expected):
            return {"versions": differing, "host": platform.node()}, None
        _encoders.clear()
        encoder = _encoders[key] = encoder_of(setup, tokenizer)
    try:
        encoded = encoder.encode(Chunk.from_message(header, payload.data))
    except tuple(ERRORS.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}, None
    content = b"".join(encoded_chunk_parts(encoded))
    return {"tokens": len(encoded.tokens)}, np.frombuffer(content, np.uint8)
