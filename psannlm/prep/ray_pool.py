"""Pool of the workers of a Ray cluster: chunks travel as arguments of tasks, encoded chunks as their results.

This process writes every file, and reads the corpus unless the workers do. Twice as many chunks as the cluster has
cores are on their way at once, so that each core has its next one and memory stays flat for a corpus of any size.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from psannlm.errors import StorageError, WorkerError
from psannlm.prep.chunks import LARGEST_CHUNK_BYTES, TEXT, Chunk, Section
from psannlm.prep.encoded_chunk import encoded_chunk_path, write_encoded_chunk
from psannlm.prep.job import PrepSettings
from psannlm.prep.pool import WAIT_S, ChunkPool
from psannlm.prep.ray_cluster import check_files, check_nodes, one_line, other_versions, ray_connection
from psannlm.prep.ray_reader import BLOCKS_AHEAD, CORES_PER_SCAN, ClusterReader, locate
from psannlm.prep.ray_worker import encode_on_ray, versions
from psannlm.prep.reader import CorpusReader, Cut, Drops, SourceFile

log = logging.getLogger(__name__)

# A chunk whose worker or node ends is sent again; one that ends this many of them is the cause itself.
_ATTEMPTS = 3
_PER_CORE = 2
# Chunk and encoded chunk, of which short lines make the larger one.
_STORE_BYTES = 4 * LARGEST_CHUNK_BYTES
_SMALLEST_STORE_BYTES = 256 << 20
_CORES_S = 5.0
_STALLED_S = 60.0


@dataclass
class _Task:
    """A chunk on its way. ``payload`` refers to its bytes in Ray's shared memory, for another attempt."""

    index: int
    header: bytes
    payload: Any
    files: dict[int, SourceFile]
    former: str
    n_failures: int = 0


class RayPool(ChunkPool):
    """Context manager of a connection to a Ray cluster.

    Raises:
        ConfigError: ray is missing, the address is wrong, or a node has other versions than this machine.
        WorkerError: a node runs no task.
    """

    def __init__(
        self,
        n_workers: int | None,
        setup: bytes,
        tokenizer: bytes,
        work: Path,
        address: str | None,
        *,
        workers_read: bool = False,
    ) -> None:
        super().__init__()
        self._workers_read = workers_read
        self._located: list[SourceFile] = []
        self._n_workers, self._work, self._address = n_workers, work, address
        self._job = (setup, tokenizer, versions())
        self._key = hashlib.sha256(setup + tokenizer).hexdigest()
        self._connection = ExitStack()
        self._tasks: dict[Any, _Task] = {}
        self._changed = threading.Condition()
        self._is_ended = False
        self._limit, self._limit_until = 0, 0.0
        self._receiver: Future[None] | None = None

    def __enter__(self) -> RayPool:
        n_local = self._n_workers or 1
        store_bytes = max(_SMALLEST_STORE_BYTES, n_local * _PER_CORE * _STORE_BYTES)
        if self._workers_read:
            store_bytes += _n_scans(n_local) * BLOCKS_AHEAD * _STORE_BYTES
        with ExitStack() as stack:
            ray = self._ray = stack.enter_context(ray_connection(self._address, n_local, store_bytes))
            n_nodes = check_nodes(ray, self._job[2])
            # Retries are counted here: Ray repeats a task that runs out of memory without end.
            self._encode = ray.remote(num_cpus=1, max_retries=0)(encode_on_ray)
            self._shared = [ray.put(self._job)]
            n_cores = self._n_cores()
            log.info(f"encoding on a Ray cluster of {n_nodes} node{'s'[: n_nodes != 1]}, {n_cores} cores")
            threads = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(self._end)
            self._receiver = threads.submit(self._receive)
            self._connection = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def reader(
        self,
        sources: Sequence[SourceFile],
        indices: Sequence[int],
        settings: PrepSettings,
        chunk_bytes: int,
        drops: Drops,
        cut: Cut | None,
        raise_if_stopped: Callable[[], None],
    ) -> CorpusReader:
        """Return the reader of the corpus: this process, or the cluster.

        Raises:
            ConfigError: a node that is to read does not see a source, or sees another size or time.
        """
        if not self._workers_read:
            return super().reader(sources, indices, settings, chunk_bytes, drops, cut, raise_if_stopped)
        self._located = locate(sources)
        check_files(self._ray, [self._located[index] for index in indices])
        n_scans = _n_scans(self._n_cores())
        return ClusterReader(
            self._ray, self._shared, self._located, indices, chunk_bytes, drops, n_scans, raise_if_stopped
        )

    def _end(self) -> None:
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def _n_cores(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    def _most_tasks(self) -> int:
        """Return how many chunks may be on their way; nodes that join or leave change it."""
        now = time.monotonic()
        if now >= self._limit_until:
            # --workers bounds what a cluster of others does for us at once; a cluster of our own has as many cores.
            bound = self._n_workers if self._address is not None else None
            self._limit = bound or max(_PER_CORE, _PER_CORE * self._n_cores())
            self._limit_until = now + _CORES_S
        return self._limit

    def _put(self, chunk: Chunk) -> bool:
        limit = self._most_tasks()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._tasks) < limit, WAIT_S):
                return False
        # An array of bytes is written into the shared memory once, and read there without a copy.
        content = np.frombuffer(chunk.payload, np.uint8)
        payload = self._ray.put(content) if len(content) else content
        files = {section.source: self._located[section.source] for section in chunk.sections if section.is_in_file}
        self._n_open += 1
        self._send(_Task(chunk.index, chunk.header(), payload, files, chunk.former))
        return True

    def _send(self, task: _Task) -> None:
        reference = self._encode.remote(self._key, self._shared, task.header, task.payload, task.files, task.former)
        with self._changed:
            self._tasks[reference] = task
            self._changed.notify_all()

    def _collect(self, done: Callable[[int, dict[str, Any]], None], wait: bool = False) -> None:
        if self._receiver is not None and self._receiver.done():
            self._receiver.result()  # raises what ended it
        super()._collect(done, wait)

    def _drop_tasks(self) -> None:
        """Nothing is taken back: which tasks have begun is known to the nodes alone, and there are few."""

    def _receive(self) -> None:
        """Write encoded chunks as they arrive, in a thread of its own."""
        last, is_warned = time.monotonic(), False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._is_ended, WAIT_S)
                if self._is_ended:
                    return
                references = list(self._tasks)
            if not references:
                last = time.monotonic()
                continue
            ready, _ = self._ray.wait(references, num_returns=1, timeout=WAIT_S)
            for reference in ready:
                self._finish(reference)
            if ready:
                last, is_warned = time.monotonic(), False
            elif not is_warned and time.monotonic() - last > _STALLED_S:
                is_warned = True
                log.warning(
                    f"no chunk came back for {_STALLED_S:.0f} s; {len(references):,} are on their way, and the cluster "
                    f"has {self._n_cores():,} cores, which others may use too"
                )

    def _finish(self, reference: Any) -> None:
        """Write the result of a task, or send its chunk again."""
        task = self._tasks[reference]
        try:
            figures, content = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            task.n_failures += 1
            if task.n_failures < _ATTEMPTS:
                self._send(task)
            else:
                self._answers.put((task.index, _failure(task, error)))
        else:
            self._answers.put((task.index, self._answer(task, figures, content)))
        with self._changed:
            del self._tasks[reference]
            self._changed.notify_all()

    def _answer(self, task: _Task, figures: dict[str, Any], content: Any) -> Any:
        if "versions" in figures:
            return other_versions(figures["host"], figures["versions"])
        if content is None:
            return figures
        try:
            n_bytes = write_encoded_chunk(encoded_chunk_path(self._work, task.index), content.data)
        except StorageError as error:
            return error
        return {**figures, "bytes": n_bytes}


def _n_scans(n_cores: int) -> int:
    """Return how many tasks read files at once."""
    return 2 + n_cores // CORES_PER_SCAN


def _failure(task: _Task, error: Exception) -> WorkerError:
    where = describe_sections(Chunk.from_message(task.header, b""))
    return WorkerError(
        f"{where}: encoding it failed {_ATTEMPTS} times, at last because: {one_line(error)} Finished chunks are kept: "
        "run the same command to resume, with either --engine"
    )


def describe_sections(chunk: Chunk) -> str:
    """Return the sources of a chunk, with the range of bytes in each, for an error message."""
    first, last = chunk.sections[0], chunk.sections[-1]
    if first.source == last.source and first.record == last.record and first.kind == TEXT:
        return _range(chunk.names, first, last)
    if first.source == last.source and first.kind != TEXT:
        return _range(chunk.names, first, last)
    return f"{_range(chunk.names, first, first)}, to {_range(chunk.names, last, last)}"


def _range(names: dict[int, str], first: Section, last: Section) -> str:
    """Return the range of bytes from one section to another of the same source."""
    name, of = names[first.source], ""
    if first.kind == TEXT and first.record:
        # The offset is one in the document, not in the file.
        name, of = f"{name}:{first.record}", " of its text"
    return f"{name}, bytes {first.offset:,} to {last.offset + last.n_bytes:,}{of}"
