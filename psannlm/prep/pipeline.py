"""``psannlm prep``: a corpus of any size to a folder of token shards and its manifest.

Worker processes encode chunks of the corpus into files in ``.work``. Then duplicates and the train/validation split are
decided from hashes alone, and the selected documents are written to shards. Every file is written atomically, and the
result does not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from psannlm.config.files import WORK_FOLDER
from psannlm.data.corpus.documents import replaced_line
from psannlm.data.corpus.files import JSON_LINES_SUFFIXES
from psannlm.data.framing import unpack_origin
from psannlm.data.manifest import Manifest, SourceEntry, SplitEntry
from psannlm.data.memory_store import token_dtype
from psannlm.data.record_figures import PrepRecord
from psannlm.data.shard_file import ShardEntry, write_shard
from psannlm.errors import ArtifactError, ConfigError, CorpusError, Interrupted, StorageError
from psannlm.io.atomic import explain_write_errors, remove_leftovers
from psannlm.io.limits import MAX_PARTS
from psannlm.io.lock import RunLock
from psannlm.prep.chunks import Chunk, chunk_bytes_for, gather
from psannlm.prep.encode_worker import setup_message
from psannlm.prep.encoded_chunk import EncodedChunk, encoded_chunk_path, read_encoded_chunk
from psannlm.prep.engine import Engine
from psannlm.prep.folder import refuse_foreign_files, refuse_foreign_work, remove_work
from psannlm.prep.job import STDIN, PrepSettings
from psannlm.prep.output import Output, open_output
from psannlm.prep.plan import Plan, resume_plan, tokenizer_entry, write_plan
from psannlm.prep.reader import CorpusReader, Cut, Drops, SourceFile, deal, find_sources
from psannlm.prep.selection import SPLITS, DocumentSelector, Selection, SingleDocument
from psannlm.prep.shard_writer import DocumentStream, select_units
from psannlm.runtime.malloc import trim_aggressively
from psannlm.runtime.progress import OnProgress, Progress, ProgressCounter, ignore_progress
from psannlm.runtime.signals import stopping_on_signals
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer
from psannlm.tokenizers.roundtrip import folder_warning, is_lossy, roundtrip_warning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepResult:
    """Result of a preparation. ``n_corpus_bytes``: stored bytes read; ``was_done``: the folder was finished before.

    ``folder`` is a path, or the text of a URL.
    """

    folder: Path | str
    manifest: Manifest
    seconds: float
    n_corpus_bytes: int
    was_done: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        manifest = self.manifest
        return PrepRecord(
            folder=str(self.folder),
            was_done=self.was_done,
            seconds=round(self.seconds, 3),
            corpus_bytes=self.n_corpus_bytes,
            mb_per_s=None if self.was_done else round(self.n_corpus_bytes / 1e6 / max(1e-9, self.seconds), 3),
            part=manifest.part,
            dtype=manifest.dtype,
            tokenizer=manifest.tokenizer,
            train=manifest.train,
            validation=manifest.validation,
            drops=manifest.drops,
            duplicates=manifest.duplicates,
            lossy_tokenizer=is_lossy(manifest.lost_fraction),
            lost_fraction=manifest.lost_fraction,
            content_sha256=manifest.content_sha256,
        ).as_dict()


def prepare_corpus(
    patterns: Sequence[str],
    tokenizer_path: Path,
    out: Path | str,
    settings: PrepSettings,
    *,
    n_workers: int | None = None,
    part: tuple[int, int] | None = None,
    on_progress: OnProgress = ignore_progress,
    chunk_bytes: int | None = None,
    cache_dir: Path | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    read_on: str = "driver",
) -> PrepResult:
    """Prepare the files that ``patterns`` match into the folder ``out``; resume an interrupted call.

    A finished folder is verified, and rebuilt if a file is missing or damaged.

    Args:
        out: a folder, or the text of a URL, to which shards are copied as they are written.
        n_workers: number of encoding processes; None takes one per usable core. With ``ray_address``, the number of
            chunks that the cluster encodes at once; None takes all of its cores.
        part: (i, n): prepare the i-th of n parts of the corpus, to be merged later.
        on_progress: gets the stored bytes read and encoded so far, then the tokens written to shards.
        chunk_bytes: bytes of text per chunk; None depends on the size of the corpus.
        cache_dir: folder for unfinished work while ``out`` is a URL; None is the user's cache.
        engine: what encodes: ``local`` processes, or ``ray``; an interrupted call may be resumed with the other one.
        ray_address: host:port of a Ray cluster; None starts one on this machine for the time of the call.
        read_on: what reads the corpus with the engine ``ray``: this process (``driver``), or the ``workers``, which
            must all see the same files.

    Raises:
        ArtifactError: ``out`` is finished and damaged, and its corpus came from standard input.
        CorpusError: a file is missing, damaged, not UTF-8 or changed while it was read, or there is no text.
        ConfigError: ``out`` holds other work, an argument is out of range, or a Ray cluster cannot be used.
        TokenizerError: the tokenizer cannot be read.
        StorageError: the disk is full, permission is missing, or another process works in ``out``.
        WorkerError: a worker process died; of a Ray cluster: three times at the same chunk.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.
    """
    began = time.monotonic()
    trim_aggressively()
    encoding = Engine(engine, n_workers, ray_address, read_on)
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ConfigError(f"part {part[0]}/{part[1]} does not exist; parts are 1/{part[1]} to {part[1]}/{part[1]}")
    if part is not None and part[1] > MAX_PARTS:
        raise ConfigError(f"{part[1]:,} parts are more than the maximum of {MAX_PARTS:,}; use fewer")
    tokenizer = load_tokenizer(tokenizer_path)
    drops = Drops()
    sources = find_sources(patterns, drops)
    plan = _plan(sources, settings, tokenizer, part, chunk_bytes)
    indices = list(range(len(sources))) if part is None else deal(sources, part[1])[part[0] - 1]
    stop = threading.Event()
    output = open_output(out, cache_dir)
    with RunLock(output.folder, "--out"), stopping_on_signals(stop):
        manifest = output.finished(plan)
        if manifest is not None:
            remove_work(output.folder / WORK_FOLDER)
            output.close()
            n_bytes = _known_bytes(sources, indices)
            if (warning := folder_warning(str(output.name), manifest.lost_fraction)) is not None:
                log.warning(warning)
            return PrepResult(output.name, manifest, time.monotonic() - began, n_bytes, was_done=True)
        preparation = _Preparation(output, plan, indices, tokenizer, encoding, on_progress, stop, drops)
        manifest = preparation.run()
        return PrepResult(output.name, manifest, time.monotonic() - began, preparation.n_bytes)


def _plan(
    sources: list[SourceFile],
    settings: PrepSettings,
    tokenizer: Tokenizer,
    part: tuple[int, int] | None,
    chunk_bytes: int | None,
) -> Plan:
    cut = None
    if settings.val_split > 0 and part is None and len(sources) == 1 and not settings.per_line:
        only = sources[0]
        # A corpus is known to be a single document only at its end. The exception is the most common corpus: one plain
        # text file of which nothing is left out or replaced; its length is known beforehand too.
        is_text = only.kind not in (*JSON_LINES_SUFFIXES, ".parquet")
        keeps_all = settings.errors == "strict" and settings.min_chars <= 1 and settings.max_chars is None
        if only.n_bytes and is_text and keeps_all and not only.is_compressed:
            cut = Cut(0, 0, None)
    total = None if any(source.n_bytes is None for source in sources) else _known_bytes(sources, range(len(sources)))
    chunk_bytes = chunk_bytes or chunk_bytes_for(total)
    return Plan(tuple(sources), settings, tokenizer.fingerprint, part, chunk_bytes, cut)


def _known_bytes(sources: Sequence[SourceFile], indices: Sequence[int]) -> int:
    return sum(sources[index].n_bytes or 0 for index in indices)


class _Preparation:
    """One preparation of one folder."""

    def __init__(
        self,
        output: Output,
        plan: Plan,
        indices: list[int],
        tokenizer: Tokenizer,
        engine: Engine,
        on_progress: OnProgress,
        stop: threading.Event,
        drops: Drops,
    ) -> None:
        self.n_bytes = 0
        self._output, self._out, self._work = output, output.folder, output.folder / WORK_FOLDER
        self._plan, self._indices = plan, indices
        self._tokenizer, self._engine, self._on_progress, self._stop = tokenizer, engine, on_progress, stop
        self._found_drops = drops
        self._names = [source.path for source in plan.sources]
        is_known = all(plan.sources[index].n_bytes is not None for index in indices)
        self._total = _known_bytes(plan.sources, indices) if is_known else None

    def run(self) -> Manifest:
        self._begin()
        paths, reader, drops = self._encode()
        selector, selection = self._select(paths, drops)
        if isinstance(selection, SingleDocument):
            log.info("the corpus is a single document: cutting it in two, to hold out its end")
            source, record = unpack_origin(selection.origin)
            if self._names[source] == STDIN:
                remove_work(self._work)
                raise CorpusError(
                    "standard input is a single document, and cannot be read twice to hold out its end; save it to a "
                    "file, or give --val-split 0"
                )
            self._begin_with_cut(paths, Cut(source, record, selection.n_bytes))
            paths, reader, drops = self._encode()
            selector, selection = self._select(paths, drops)
            if isinstance(selection, SingleDocument):
                raise CorpusError(
                    "the corpus changed between two readings; run prep again once its files no longer change"
                )
        self._report_text_issues(selector, reader)
        splits = {split: self._write_split(paths, selection, split) for split in SPLITS}
        manifest = self._manifest(reader, selector, selection, splits)
        self._output.finish(manifest, self._tokenizer.to_bytes())
        remove_work(self._work)
        self._output.close()
        return manifest

    def _begin(self) -> None:
        refuse_foreign_work(self._work)
        plan = resume_plan(self._work, self._plan) if self._has_encoded_chunks() else None
        entry = tokenizer_entry(self._tokenizer)
        refuse_foreign_files(self._out, entry.file, self._tokenizer.to_bytes(), has_work=plan is not None)
        self._output.begin(self._plan.as_dict(), entry.file, self._tokenizer.to_bytes())
        if plan is None:
            remove_work(self._work)
            write_plan(self._work, self._plan)
        else:
            self._plan = plan
            log.info(f"resuming the preparation in {self._output.name}")
        with explain_write_errors(self._work):
            remove_leftovers(self._work)
            remove_leftovers(self._out)

    def _has_encoded_chunks(self) -> bool:
        """Return whether there is work to resume; a plan without an encoded chunk is discarded."""
        return self._work.is_dir() and next(self._work.glob("piece_*"), None) is not None

    def _begin_with_cut(self, paths: Sequence[Path], cut: Cut) -> None:
        self._plan = self._plan.with_cut(cut)
        write_plan(self._work, self._plan)
        with explain_write_errors(self._work):
            for path in paths:
                path.unlink()

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted("interrupted; run the same command to resume")

    def _encode(self) -> tuple[list[Path], CorpusReader, Drops]:
        plan = self._plan
        drops = Drops()
        for reason, count in self._found_drops.counts.items():
            drops.merge(reason, count, self._found_drops.examples[reason])
        disk_space = _DiskSpaceCheck(self._output, self._total)
        report = ProgressCounter(self._on_progress, "encoding", "bytes", self._total)
        n_chunks = n_tokens = 0
        compared: dict[int, tuple[Chunk, int]] = {}  # chunks whose bytes a worker compares, and their tokens

        def missing() -> Iterator[Chunk]:
            nonlocal n_chunks, n_tokens
            for chunk in gather(reader.sections(), self._names, plan.chunk_bytes):
                self._raise_if_stopped()
                n_chunks += 1
                former = self._former(chunk)
                if former is None:
                    disk_space.chunk_sent(chunk.index, chunk.n_bytes, reader.n_bytes)
                    yield chunk
                elif not chunk.is_whole:
                    compared[chunk.index] = replace(chunk, payload=b""), len(former.tokens)
                    yield replace(chunk, former=former.payload)
                elif former.payload == hashlib.sha256(chunk.payload).hexdigest():
                    n_tokens += len(former.tokens)
                    report.at(reader.n_bytes, f"{n_tokens:,} tokens")
                else:
                    raise self._changed(chunk)

        def done(index: int, answer: dict[str, Any]) -> None:
            nonlocal n_tokens
            if index in compared:
                chunk, n_former = compared.pop(index)
                if not answer["is_former"]:
                    raise self._changed(chunk)
                n_tokens += n_former
            else:
                n_tokens += answer["tokens"]
                disk_space.chunk_encoded(index, answer["bytes"])
            report.at(reader.n_bytes, f"{n_tokens:,} tokens")

        setup = setup_message(self._work, plan.settings, plan.cut)
        with self._engine.pool(setup, self._tokenizer.to_bytes(), self._work) as pool:
            reader = pool.reader(
                plan.sources, self._indices, plan.settings, plan.chunk_bytes, drops, plan.cut, self._raise_if_stopped
            )
            try:
                pool.encode(missing(), done, self._stop.is_set)
            except Interrupted:
                raise Interrupted(self._interruption(reader)) from None
        self.n_bytes = reader.n_bytes
        return [encoded_chunk_path(self._work, index) for index in range(n_chunks)], reader, drops

    def _interruption(self, reader: CorpusReader) -> str:
        of = "" if self._total is None else f" of {self._total / 1e6:,.1f}"
        return f"interrupted after {reader.n_bytes / 1e6:,.1f}{of} MB; run the same command to resume"

    def _former(self, chunk: Chunk) -> EncodedChunk | None:
        """Return what an earlier run encoded of a chunk of this number, or None."""
        path = encoded_chunk_path(self._work, chunk.index)
        if not path.exists():
            return None
        try:
            return read_encoded_chunk(path)
        except ArtifactError:
            return None

    def _changed(self, chunk: Chunk) -> CorpusError:
        """Return the error for a chunk of which an earlier run encoded other bytes."""
        names = list(chunk.names.values())
        more = f" or one of the {len(names) - 1:,} files after it" if len(names) > 1 else ""
        return CorpusError(
            f"{names[0]}{more} changed since the preparation in {self._output.name} began; restore the former "
            f"content, or remove {self._work} to start from scratch"
        )

    def _select(self, paths: list[Path], drops: Drops) -> tuple[DocumentSelector, Selection | SingleDocument]:
        selector = DocumentSelector(
            _Interruptible(paths, self._raise_if_stopped),
            self._work,
            self._plan.settings,
            len(self._plan.sources),
            lambda source, record: f"{self._names[source]}:{record}" if record else self._names[source],
            drops,
            is_cut=self._plan.cut is not None,
            is_part=self._plan.part is not None,
        )
        selection = selector.select()
        if isinstance(selection, Selection) and not selection.documents_of.any() and self._plan.part is None:
            left_out = "".join(f"\n  {line}" for line in drops.lines())
            raise CorpusError(f"no document of the corpus is kept; name files with text{left_out}")
        return selector, selection

    def _report_text_issues(self, selector: DocumentSelector, reader: CorpusReader) -> None:
        for omitted in selector.drops.lines():
            log.info(omitted)
        if n_marks := selector.byte_order_marks + reader.byte_order_marks:
            log.info(f"removed {n_marks:,} byte order marks")
        n_bytes = selector.replaced_bytes + reader.replaced.n_bytes
        names = [*selector.replaced_in, *reader.replaced.names]
        if line := replaced_line(n_bytes, selector.replaced_surrogates, names):
            log.info(line)
        if selector.roundtrip_error is not None:
            log.warning(roundtrip_warning(*selector.roundtrip_error))

    def _write_split(self, paths: list[Path], selection: Selection, split: str) -> SplitEntry:
        plan = selection.plans[split]
        total = sum(each.total.n_tokens for each in selection.plans.values())
        done = 0 if split == SPLITS[0] else selection.plans[SPLITS[0]].total.n_tokens
        stream = DocumentStream(select_units(_Interruptible(paths, self._raise_if_stopped), selection, split))
        entries: list[ShardEntry] = []
        for number, size in enumerate(plan.shards):
            entries.append(
                write_shard(
                    self._out / shard_name(split, number),
                    dtype=token_dtype(self._tokenizer.vocab_size),
                    fingerprint=self._plan.fingerprint,
                    n_tokens=size.n_tokens,
                    n_documents=size.n_documents,
                    batches=stream.take(size.n_documents),
                )
            )
            self._output.keep(entries[-1])
            done += size.n_tokens
            self._on_progress(Progress("writing shards", done, total, "tokens"))
        return SplitEntry.of(tuple(entries))

    def _manifest(
        self, reader: CorpusReader, selector: DocumentSelector, selection: Selection, splits: dict[str, SplitEntry]
    ) -> Manifest:
        part = self._plan.part or (1, 1)
        return Manifest(
            tokenizer=tokenizer_entry(self._tokenizer),
            dtype=np.dtype(token_dtype(self._tokenizer.vocab_size)).name,
            settings=self._plan.settings.for_manifest(),
            part=f"{part[0]}/{part[1]}",
            sources=tuple(
                SourceEntry(
                    source.path,
                    reader.n_bytes if source.path == STDIN and len(self._names) == 1 else source.n_bytes or 0,
                    reader.digests.get(index, ""),
                    int(selection.documents_of[index]),
                )
                for index, source in enumerate(self._plan.sources)
            ),
            train=splits[SPLITS[0]],
            validation=splits[SPLITS[1]],
            drops=dict(sorted(selector.drops.counts.items())),
            duplicates=selection.n_duplicates,
            lost_fraction=selector.meter.fraction,
        )


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:05d}.safetensors"


class _Interruptible(Sequence[Path]):
    """Paths of encoded chunks; taking one raises Interrupted if the preparation is to stop."""

    def __init__(self, paths: list[Path], raise_if_stopped: Callable[[], None]) -> None:
        self._paths, self._raise_if_stopped = paths, raise_if_stopped

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        self._raise_if_stopped()
        return self._paths[index]


class _DiskSpaceCheck:
    """Estimates from the first encoded chunk the disk space of the whole preparation, and checks that it is free."""

    def __init__(self, output: Output, total: int | None) -> None:
        self._output, self._total = output, total
        self._sent: dict[int, tuple[int, int]] = {}
        self._is_done = total is None

    def chunk_sent(self, index: int, n_bytes: int, stored_bytes: int) -> None:
        """Note that a chunk of ``n_bytes`` was sent to a worker, ``stored_bytes`` of the corpus being read so far."""
        if not self._is_done:
            self._sent[index] = (n_bytes, stored_bytes)

    def chunk_encoded(self, index: int, n_bytes: int) -> None:
        """Note that a chunk takes ``n_bytes`` encoded. Raises StorageError if the disk is too small for the rest."""
        if self._is_done or self._total is None:
            return
        self._is_done = True
        content, _ = self._sent[index]
        read = max(stored for _, stored in self._sent.values())
        unpacked = sum(content for content, _ in self._sent.values())
        left = max(0, self._total - read) * max(1.0, unpacked / max(1, read))
        needed = int(self._output.n_copies * (left + unpacked) * n_bytes / max(1, content))
        folder = self._output.folder
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(
                f"{folder} needs about {needed / 1e6:,.0f} MB for encoded chunks and shards, and "
                f"{free / 1e6:,.0f} MB are free. Free some space, {self._output.disk_advice}, or prepare "
                "the corpus in parts on several disks"
            )
