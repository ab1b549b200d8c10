"""Reader of the corpus on the nodes of a Ray cluster, for files and URLs that all of them see.

Tasks read the files, hash them and find the sections; this process gets positions, and the bytes of what cannot be read
again by position. Sections, and so chunks and shards, are those of :class:`~psannlm.prep.reader.CorpusReader`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from psannlm.errors import ConfigError, WorkerError
from psannlm.io.urls import is_remote, protocol_of
from psannlm.prep.chunks import Section
from psannlm.prep.encode_worker import ERRORS
from psannlm.prep.job import STDIN
from psannlm.prep.pool import WAIT_S
from psannlm.prep.ray_cluster import one_line, other_versions
from psannlm.prep.ray_worker import scan_on_ray
from psannlm.prep.reader import CorpusReader, Drops, SourceFile

_ATTEMPTS = 3
# Consecutive files that one task reads, and how many blocks of sections it may be ahead.
_SCAN_BYTES, _SCAN_FILES = 1 << 26, 256
BLOCKS_AHEAD = 4
# A task reads faster than this many cores encode.
CORES_PER_SCAN = 8
# Below this, a request for a range would take longer than sending the bytes. Tests set it lower.
SMALLEST_RANGE_BYTES = 1 << 16


def locate(sources: Sequence[SourceFile]) -> list[SourceFile]:
    """Return the sources with paths that do not depend on the working folder.

    Raises:
        ConfigError: a source exists in this process alone.
    """
    for source in sources:
        if source.path == STDIN or protocol_of(source.path) == "memory":
            raise ConfigError(
                f"--read-on workers: {source.path} exists in this process alone; save it to a file that every node "
                "sees, or give --read-on driver"
            )
    return [each if is_remote(each.path) else replace(each, path=os.path.abspath(each.path)) for each in sources]


class ClusterReader(CorpusReader):
    """Reads the sources ``indices`` in order, with the results of ``CorpusReader``.

    ``located``: the sources as :func:`locate` returns them. ``n_ahead``: files, or groups of small ones, that are read
    at once. ``raise_if_stopped`` is called while this process waits for sections.
    """

    def __init__(
        self,
        ray: Any,
        job: list[Any],
        located: Sequence[SourceFile],
        indices: Sequence[int],
        chunk_bytes: int,
        drops: Drops,
        n_ahead: int,
        raise_if_stopped: Callable[[], None],
    ) -> None:
        self._reset()
        self._ray, self._job, self._located, self._n_ahead = ray, job, located, n_ahead
        self._files, self._bytes_per_chunk, self._found_drops = indices, chunk_bytes, drops
        self._raise_if_stopped = raise_if_stopped
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": BLOCKS_AHEAD}
        # Retries are counted here. A task waits most of the time, so it takes no core from those that encode.
        self._scan = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD", **options)(scan_on_ray)

    def sections(self) -> Iterator[tuple[Section, bytes]]:
        """Yield sections, and the bytes of those that a worker does not read from their file.

        Raises:
            CorpusError: as ``CorpusReader`` raises it.
            WorkerError: reading the same files failed three times.
        """
        waiting = _groups(self._located, self._files)
        started: deque[tuple[list[int], Any]] = deque()
        while True:
            while len(started) < self._n_ahead and (group := next(waiting, None)) is not None:
                started.append((group, self._start(group, 0)))
            if not started:
                return
            n_before = self.n_bytes
            state: dict[str, Any] = {}
            for answer, content in self._blocks(*started.popleft()):
                state, at = answer["reader"], 0
                self.n_bytes = n_before + state["n_bytes"]
                sent = content.tobytes()
                for values in answer["sections"]:
                    section = Section(*values)
                    n_sent = 0 if section.is_in_file else section.n_bytes
                    yield section, sent[at : at + n_sent]
                    at += n_sent
            self._add(state)

    def _add(self, state: dict[str, Any]) -> None:
        """Add the results of files that are read."""
        self.byte_order_marks += state["byte_order_marks"]
        self.replaced.n_bytes += state["replaced"][0]
        self.replaced.names += state["replaced"][1]
        self.digests |= state["digests"]
        for reason, count, names in state["drops"]:
            self._found_drops.merge(reason, count, names)

    def _start(self, group: list[int], n_known: int) -> Any:
        files = {index: self._located[index] for index in group}
        return self._scan.remote(self._job, files, self._bytes_per_chunk, SMALLEST_RANGE_BYTES, n_known)

    def _blocks(self, group: list[int], answers: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the blocks of one task; one that is lost with its node is started again."""
        n_known = n_failures = 0
        while True:
            while not self._ray.wait([answers], timeout=WAIT_S)[0]:
                self._raise_if_stopped()
            try:
                answer, content = self._ray.get(next(answers))
            except StopIteration:
                return
            except self._ray.exceptions.RayError as error:
                n_failures += 1
                if n_failures == _ATTEMPTS:
                    raise self._failure(group, error) from None
                answers = self._start(group, n_known)
                continue
            if "versions" in answer:
                raise other_versions(answer["host"], answer["versions"])
            if "error" in answer:
                raise ERRORS[answer["error"]](answer["message"])
            n_known += 1
            yield answer, content

    def _failure(self, group: list[int], error: Exception) -> WorkerError:
        more = f" or one of the {len(group) - 1:,} files after it" if len(group) > 1 else ""
        return WorkerError(
            f"{self._located[group[0]].path}{more}: reading it failed {_ATTEMPTS} times on the cluster, at last "
            f"because: {one_line(error)} Finished chunks are kept: run the same command to resume, or with "
            "--read-on driver"
        )


def _groups(sources: Sequence[SourceFile], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield consecutive sources for one task each."""
    group: list[int] = []
    n_bytes = 0
    for index in indices:
        group.append(index)
        n_bytes += sources[index].n_bytes or 0
        if n_bytes >= _SCAN_BYTES or len(group) == _SCAN_FILES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group
