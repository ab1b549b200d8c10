"""New folder that all ranks write to together, made by rank 0, on a file system that they must share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from psannlm.errors import StorageError
from psannlm.io.atomic import explain_write_errors, named_temporary, temporary_beside, token_of
from psannlm.runtime.distributed import World

# Digits of the random part of a temporary folder's name.
_TOKEN_BYTES = 16


@contextmanager
def shared_temporary(final: Path, world: World, device: torch.device) -> Iterator[Path]:
    """Yield a new folder beside ``final`` to every rank of ``world``; rank 0 makes it, and removes it at the end.

    Raises:
        OSError: rank 0 cannot make it.
        StorageError: this rank does not see it.
    """
    if world.is_main:
        with temporary_beside(final) as temporary:
            temporary.mkdir()
            world.broadcast_bytes(token_of(temporary).encode("ascii"), device)
            yield temporary
        return
    temporary = named_temporary(final, world.broadcast_bytes(bytes(_TOKEN_BYTES), device).decode("ascii"))
    if not temporary.is_dir():
        raise StorageError(
            f"{final.parent} is not the folder that rank 0 writes to: the ranks of a sharded run write its checkpoints "
            "together. Put train.checkpoint_dir (--out) on a file system that all machines share"
        )
    yield temporary


def require_shared(folder: Path, world: World, device: torch.device) -> None:
    """Check that every rank sees ``folder`` as rank 0 does. Raises StorageError as :func:`shared_temporary` does."""
    with explain_write_errors(folder), shared_temporary(folder / "shared", world, device):
        world.wait()
