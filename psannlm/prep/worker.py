"""A process of its own that makes pieces of chunks: it hears of them on a connection and answers there.

It is started with ``python -c``, not through multiprocessing, which would run the program that uses the library again
in each worker; and it speaks bytes and JSON, never pickles.
"""

from __future__ import annotations

import json
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from psannlm.errors import CorpusError, PsannlmError, StorageError, TokenizerError
from psannlm.prep.chunks import Chunk
from psannlm.prep.encoding import ChunkEncoder
from psannlm.prep.piece import piece_path, write_piece
from psannlm.prep.settings import PrepSettings
from psannlm.prep.walk import Cut
from psannlm.runtime.malloc import return_large_blocks
from psannlm.runtime.processes import end_with
from psannlm.tokenizers.resolve import tokenizer_from_bytes

# What a worker may answer besides its figures; by name, since nothing else goes over the connection.
ERRORS: dict[str, type[PsannlmError]] = {kind.__name__: kind for kind in (CorpusError, StorageError, TokenizerError)}


def setup_message(folder: Path, settings: PrepSettings, cut: Cut | None) -> bytes:
    """Return the first message to a worker; the tokenizer's bytes are the second."""
    return json.dumps(
        {"folder": str(folder), "settings": settings.as_dict(), "cut": None if cut is None else vars(cut)}
    ).encode("utf-8")


def main() -> None:
    """Serve until the connection ends; ``sys.argv`` holds its file descriptor and the parent's process id."""
    handle, parent = int(sys.argv[1]), int(sys.argv[2])
    _end_when_gone(parent)
    return_large_blocks()
    with Connection(handle) as connection:
        try:
            setup = json.loads(connection.recv_bytes())
            cut = None if setup["cut"] is None else Cut(**setup["cut"])
            tokenizer = tokenizer_from_bytes(connection.recv_bytes())
            encoder = ChunkEncoder(tokenizer, PrepSettings(**setup["settings"]), cut)
            while True:
                chunk = Chunk.from_message(connection.recv_bytes(), connection.recv_bytes())
                connection.send_bytes(json.dumps(_answer(encoder, chunk, Path(setup["folder"]))).encode("utf-8"))
        except (EOFError, ConnectionError):
            return


def _answer(encoder: ChunkEncoder, chunk: Chunk, folder: Path) -> dict[str, Any]:
    try:
        piece = encoder.encode(chunk)
        n_bytes = write_piece(piece_path(folder, chunk.index), piece)
    except tuple(ERRORS.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"tokens": len(piece.tokens), "bytes": n_bytes}


def _end_when_gone(parent: int) -> None:
    """End when the parent does, however it ends: a worker must not write into a folder that nobody holds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent, signal.SIGKILL)
