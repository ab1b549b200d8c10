"""Engine of ``prep``: what encodes the chunks of a corpus, processes of this machine or the nodes of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psannlm.errors import ConfigError, nearest
from psannlm.prep.pool import ChunkPool, WorkerPool
from psannlm.runtime.cores import usable_workers

ENGINES = ("local", "ray")
READERS = ("driver", "workers")
# A worker with its tokenizer and the texts and tokens of a chunk; by default there are no more than fit into memory.
_WORKER_BYTES = {"local": 256 << 20, "ray": 512 << 20}


@dataclass(frozen=True)
class Engine:
    """What encodes chunks: ``local`` processes or ``ray``. It changes no byte of a prepared folder.

    ``n_workers``: processes of this machine, or chunks that a cluster at an address encodes at once; None: one per
    core. ``ray_address``: host:port of a Ray cluster; None: one on this machine that ends with the preparation.
    ``read_on``: what reads the corpus: this process (``driver``), or the ``workers`` of the cluster.

    Raises:
        ConfigError: a value is out of range, or an address or ``workers`` is given without ``ray``.
    """

    name: str = "local"
    n_workers: int | None = None
    ray_address: str | None = None
    read_on: str = "driver"

    def __post_init__(self) -> None:
        if self.n_workers is not None and self.n_workers < 1:
            raise ConfigError(f"n_workers is {self.n_workers}; it must be 1 or more")
        if self.name not in ENGINES:
            raise ConfigError(f"engine: {self.name!r} is not one of {', '.join(ENGINES)}{nearest(self.name, ENGINES)}")
        if self.ray_address is not None and self.name != "ray":
            raise ConfigError(f"--ray-address {self.ray_address} needs --engine ray")
        if self.read_on not in READERS:
            known = ", ".join(READERS)
            raise ConfigError(f"read_on: {self.read_on!r} is not one of {known}{nearest(self.read_on, READERS)}")
        if self.read_on == "workers" and self.name != "ray":
            raise ConfigError("--read-on workers needs --engine ray")

    def pool(self, setup: bytes, tokenizer: bytes, work: Path) -> ChunkPool:
        """Return the pool that encodes the chunks of one preparation into the folder ``work``.

        Args:
            setup, tokenizer: the first two messages to a worker.
        """
        n_workers = self.n_workers
        if n_workers is None and self.ray_address is None:
            n_workers = usable_workers(_WORKER_BYTES[self.name])
        if self.name == "ray":
            # Not before it is asked for: most preparations need nothing of it.
            from psannlm.prep.ray_pool import RayPool

            are_readers = self.read_on == "workers"
            return RayPool(n_workers, setup, tokenizer, work, self.ray_address, workers_read=are_readers)
        assert n_workers is not None
        return WorkerPool(n_workers, setup, tokenizer)
