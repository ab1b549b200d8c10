"""A corpus of any size enters; a folder of token shards and its manifest leaves, the same bytes however it was made.

Chunks of the corpus become pieces in ``.work``, by as many processes as there are cores; then duplicates are found and
sides drawn, from hashes alone; then pieces become shards. Each step leaves files that are whole or absent, and none
depends on how many workers there are or how often they were stopped.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from psannlm.config.files import WORK_FOLDER
from psannlm.data.corpus.documents import replaced_line
from psannlm.data.corpus.files import JSON_LINES_SUFFIXES
from psannlm.data.framing import unpack_origin
from psannlm.data.manifest import MANIFEST_FILE, Manifest, SourceEntry, SplitEntry, write_manifest
from psannlm.data.memory_store import token_dtype
from psannlm.data.shard_file import ShardEntry, write_shard
from psannlm.errors import ArtifactError, ConfigError, CorpusError, Interrupted, StorageError
from psannlm.io.atomic import explain_write_errors, remove_leftovers, write_bytes
from psannlm.io.limits import MAX_PARTS
from psannlm.io.lock import RunLock
from psannlm.prep.chunks import Chunk, chunk_bytes_for, gather
from psannlm.prep.encode_worker import setup_message
from psannlm.prep.encoded_chunk import piece_path, read_piece
from psannlm.prep.folder import refuse_foreign_files, refuse_foreign_work, remove_work
from psannlm.prep.job import STDIN, PrepSettings
from psannlm.prep.plan import Plan, damage_of, go_on, refuse_other, remove_finished, tokenizer_entry, write_plan
from psannlm.prep.pool import WorkerPool, usable_cores
from psannlm.prep.reader import Cut, Drops, SourceFile, Walk, deal, find_sources
from psannlm.prep.selection import SPLITS, OnlyOne, Selection, Surveyor
from psannlm.prep.shard_writer import DocumentStream, select_units
from psannlm.runtime.malloc import return_large_blocks
from psannlm.runtime.signals import stopping_on_signals
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer
from psannlm.tokenizers.roundtrip import folder_warning, is_lossy, loss_warning


class PrepReporter(Protocol):
    """Hears how far a preparation has come."""

    def notice(self, text: str) -> None:
        """Say something once."""

    def encoding(self, n_bytes: int, total_bytes: int | None, n_tokens: int) -> None:
        """So many of the corpus's stored bytes (None: unknown) are read, and gave so many tokens."""

    def writing(self, n_tokens: int, total_tokens: int) -> None:
        """So many tokens are in shards."""


class SilentPrepReporter:
    """Hears everything and says nothing."""

    def notice(self, text: str) -> None: ...
    def encoding(self, n_bytes: int, total_bytes: int | None, n_tokens: int) -> None: ...
    def writing(self, n_tokens: int, total_tokens: int) -> None: ...


@dataclass(frozen=True)
class PrepResult:
    """What a preparation came to: ``n_corpus_bytes`` as stored were read; ``was_done`` if there was nothing to do."""

    folder: Path
    manifest: Manifest
    seconds: float
    n_corpus_bytes: int
    was_done: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the result for a JSON document."""
        manifest = self.manifest
        return {
            "folder": str(self.folder),
            "was_done": self.was_done,
            "seconds": round(self.seconds, 3),
            "corpus_bytes": self.n_corpus_bytes,
            "mb_per_s": None if self.was_done else round(self.n_corpus_bytes / 1e6 / max(1e-9, self.seconds), 3),
            "part": manifest.part,
            "dtype": manifest.dtype,
            "tokenizer": asdict(manifest.tokenizer),
            "train": asdict(manifest.train),
            "validation": asdict(manifest.validation),
            "drops": manifest.drops,
            "duplicates": manifest.duplicates,
            "lossy_tokenizer": is_lossy(manifest.lost_fraction),
            "lost_fraction": manifest.lost_fraction,
            "content_sha256": manifest.content_sha256,
        }


def prepare_corpus(
    patterns: Sequence[str],
    tokenizer_path: Path,
    out: Path,
    settings: PrepSettings,
    *,
    n_workers: int | None = None,
    part: tuple[int, int] | None = None,
    reporter: PrepReporter | None = None,
    chunk_bytes: int | None = None,
) -> PrepResult:
    """Prepare the files that ``patterns`` name into the folder ``out``; go on where an earlier call was stopped.

    A folder that is finished is checked whole, and made anew where something of it is missing or damaged.

    Args:
        n_workers: processes that encode; None takes one for each core that may be used.
        part: (i, n): prepare the i-th of n parts of the corpus, to be merged later.
        chunk_bytes: how much text a worker takes at a time; None chooses by the size of the corpus.

    Raises:
        ArtifactError: ``out`` is finished and damaged, and what it was made of came on standard input.
        CorpusError: a file is missing, damaged, not UTF-8, changed meanwhile, or there is no text.
        ConfigError: ``out`` holds other work, or an argument makes no sense.
        TokenizerError: the tokenizer cannot be read.
        StorageError: there is no room, no permission, or another process works in ``out``.
        WorkerError: a worker process ended.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    began = time.monotonic()
    return_large_blocks()
    reporter = reporter or SilentPrepReporter()
    if n_workers is not None and n_workers < 1:
        raise ConfigError(f"{n_workers} workers cannot do anything; give 1 or more")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ConfigError(f"there is no part {part[0]}/{part[1]}; parts are 1/{part[1]} to {part[1]}/{part[1]}")
    if part is not None and part[1] > MAX_PARTS:
        raise ConfigError(f"{part[1]:,} parts are more than {MAX_PARTS:,}; name fewer")
    tokenizer = load_tokenizer(tokenizer_path)
    drops = Drops()
    sources = find_sources(patterns, drops)
    plan = _plan(sources, settings, tokenizer, part, chunk_bytes)
    indices = list(range(len(sources))) if part is None else deal(sources, part[1])[part[0] - 1]
    stop = threading.Event()
    with RunLock(out, "--out"), stopping_on_signals(stop):
        work = out / WORK_FOLDER
        if (out / MANIFEST_FILE).is_file():
            manifest = refuse_other(out, plan)
            damage = damage_of(out)
            if damage is None:
                remove_work(work)
                n_bytes = _known_bytes(sources, indices)
                if (warning := folder_warning(str(out), manifest.lost_fraction)) is not None:
                    reporter.notice(warning)
                return PrepResult(out, manifest, time.monotonic() - began, n_bytes, was_done=True)
            if any(source.path == STDIN for source in sources):
                # What comes in now may be another text, and nobody could tell.
                raise ArtifactError(f"{damage} To prepare standard input anew, remove {out} first.")
            reporter.notice(f"{damage} Preparing it anew.")
            remove_finished(out, manifest)
        preparation = _Preparation(out, plan, indices, tokenizer, n_workers or usable_cores(), reporter, stop, drops)
        manifest = preparation.run()
        return PrepResult(out, manifest, time.monotonic() - began, preparation.n_bytes)


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
        # Whether a corpus is a single document, and how long its text is, is known at its end, but for the commonest
        # one: a plain file of text of which nothing is left out or replaced.
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
    """One run of the steps in one folder."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        indices: list[int],
        tokenizer: Tokenizer,
        n_workers: int,
        reporter: PrepReporter,
        stop: threading.Event,
        drops: Drops,
    ) -> None:
        self.n_bytes = 0
        self._out, self._work, self._plan, self._indices = out, out / WORK_FOLDER, plan, indices
        self._tokenizer, self._n_workers, self._reporter, self._stop = tokenizer, n_workers, reporter, stop
        self._found_drops = drops
        self._names = [source.path for source in plan.sources]
        is_known = all(plan.sources[index].n_bytes is not None for index in indices)
        self._total = _known_bytes(plan.sources, indices) if is_known else None

    def run(self) -> Manifest:
        self._begin()
        paths, walk, drops = self._encode()
        surveyor, selection = self._survey(paths, drops)
        if isinstance(selection, OnlyOne):
            self._reporter.notice("the corpus is one document: cutting it in two, to hold out its end")
            source, record = unpack_origin(selection.origin)
            if self._names[source] == STDIN:
                remove_work(self._work)
                raise CorpusError(
                    "standard input is a single document, and cannot be read twice to hold out its end; save it to a "
                    "file, or give --val-split 0"
                )
            self._begin_with_cut(paths, Cut(source, record, selection.n_bytes))
            paths, walk, drops = self._encode()
            surveyor, selection = self._survey(paths, drops)
            if isinstance(selection, OnlyOne):
                raise CorpusError("the corpus changed between two readings; prepare it anew when it is at rest")
        self._tell(surveyor, walk)
        splits = {side: self._write_side(paths, selection, side) for side in SPLITS}
        manifest = self._manifest(walk, surveyor, selection, splits)
        write_manifest(self._out, manifest)
        remove_work(self._work)
        return manifest

    def _begin(self) -> None:
        refuse_foreign_work(self._work)
        plan = go_on(self._work, self._plan) if self._has_pieces() else None
        entry = tokenizer_entry(self._tokenizer)
        refuse_foreign_files(self._out, entry.file, self._tokenizer.to_bytes(), has_work=plan is not None)
        if plan is None:
            remove_work(self._work)
            write_plan(self._work, self._plan)
        else:
            self._plan = plan
            self._reporter.notice(f"going on with the work in {self._out}")
        with explain_write_errors(self._work):
            remove_leftovers(self._work)
            remove_leftovers(self._out)

    def _has_pieces(self) -> bool:
        """Tell whether there is work to keep: a plan without a piece is one that failed at once, and forgotten."""
        return self._work.is_dir() and next(self._work.glob("piece_*"), None) is not None

    def _begin_with_cut(self, paths: Sequence[Path], cut: Cut) -> None:
        self._plan = self._plan.with_cut(cut)
        write_plan(self._work, self._plan)
        with explain_write_errors(self._work):
            for path in paths:
                path.unlink()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Interrupted("interrupted; the same command goes on from what is done")

    def _encode(self) -> tuple[list[Path], Walk, Drops]:
        plan = self._plan
        drops = Drops()
        for reason, count in self._found_drops.counts.items():
            drops.merge(reason, count, self._found_drops.examples[reason])
        walk = Walk(plan.sources, self._indices, plan.settings, plan.chunk_bytes, drops, plan.cut)
        gauge = _Gauge(self._out, self._total)
        n_chunks = n_tokens = 0

        def missing() -> Iterator[Chunk]:
            nonlocal n_chunks, n_tokens
            for chunk in gather(walk.sections(), self._names, plan.chunk_bytes):
                self._go_on()
                n_chunks += 1
                former = self._former(chunk)
                if former is None:
                    gauge.sent(chunk.index, len(chunk.payload), walk.n_bytes)
                    yield chunk
                else:
                    n_tokens += former
                    self._reporter.encoding(walk.n_bytes, self._total, n_tokens)

        def done(index: int, answer: dict[str, Any]) -> None:
            nonlocal n_tokens
            n_tokens += answer["tokens"]
            gauge.written(index, answer["bytes"])
            self._reporter.encoding(walk.n_bytes, self._total, n_tokens)

        setup = setup_message(self._work, plan.settings, plan.cut)
        try:
            with WorkerPool(self._n_workers, setup, self._tokenizer.to_bytes()) as pool:
                pool.encode(missing(), done, self._stop.is_set)
        except Interrupted:
            raise Interrupted(self._where_it_stopped(walk)) from None
        self.n_bytes = walk.n_bytes
        return [piece_path(self._work, index) for index in range(n_chunks)], walk, drops

    def _where_it_stopped(self, walk: Walk) -> str:
        of = "" if self._total is None else f" of {self._total / 1e6:,.1f}"
        return f"interrupted after {walk.n_bytes / 1e6:,.1f}{of} MB; the same command goes on from there"

    def _former(self, chunk: Chunk) -> int | None:
        """Return the tokens of the whole piece that an earlier run made of this chunk, or None.

        Raises:
            CorpusError: the piece was made of other bytes.
        """
        path = piece_path(self._work, chunk.index)
        if not path.exists():
            return None
        try:
            piece = read_piece(path)
        except ArtifactError:
            return None
        if piece.payload != hashlib.sha256(chunk.payload).hexdigest():
            names = list(chunk.names.values())
            more = f" or one of the {len(names) - 1:,} files after it" if len(names) > 1 else ""
            raise CorpusError(
                f"{names[0]}{more} changed since the work in {self._out} began; bring the former content back, or "
                f"remove {self._work} to begin anew"
            )
        return len(piece.tokens)

    def _survey(self, paths: list[Path], drops: Drops) -> tuple[Surveyor, Selection | OnlyOne]:
        surveyor = Surveyor(
            _Stoppable(paths, self._go_on),
            self._work,
            self._plan.settings,
            len(self._plan.sources),
            lambda source, record: f"{self._names[source]}:{record}" if record else self._names[source],
            drops,
            is_cut=self._plan.cut is not None,
            is_part=self._plan.part is not None,
        )
        selection = surveyor.select()
        if isinstance(selection, Selection) and not selection.documents_of.any() and self._plan.part is None:
            left_out = "".join(f"\n  {line}" for line in drops.lines())
            raise CorpusError(f"the corpus holds no text to keep; name files with text{left_out}")
        return surveyor, selection

    def _tell(self, surveyor: Surveyor, walk: Walk) -> None:
        for line in surveyor.drops.lines():
            self._reporter.notice(line)
        if n_marks := surveyor.byte_order_marks + walk.byte_order_marks:
            self._reporter.notice(f"took off {n_marks:,} byte order marks")
        n_bytes = surveyor.replaced_bytes + walk.replaced.n_bytes
        names = [*surveyor.replaced_in, *walk.replaced.names]
        if said := replaced_line(n_bytes, surveyor.replaced_surrogates, names):
            self._reporter.notice(said)
        if surveyor.lost is not None:
            self._reporter.notice(loss_warning(*surveyor.lost))

    def _write_side(self, paths: list[Path], selection: Selection, side: str) -> SplitEntry:
        plan = selection.plans[side]
        total = sum(each.total.n_tokens for each in selection.plans.values())
        done = 0 if side == SPLITS[0] else selection.plans[SPLITS[0]].total.n_tokens
        stream = DocumentStream(select_units(_Stoppable(paths, self._go_on), selection, side))
        entries: list[ShardEntry] = []
        for number, size in enumerate(plan.shards):
            entries.append(
                write_shard(
                    self._out / shard_name(side, number),
                    dtype=token_dtype(self._tokenizer.vocab_size),
                    fingerprint=self._plan.fingerprint,
                    n_tokens=size.n_tokens,
                    n_documents=size.n_documents,
                    batches=stream.take(size.n_documents),
                )
            )
            done += size.n_tokens
            self._reporter.writing(done, total)
        return SplitEntry.of(tuple(entries))

    def _manifest(
        self, walk: Walk, surveyor: Surveyor, selection: Selection, splits: dict[str, SplitEntry]
    ) -> Manifest:
        content = self._tokenizer.to_bytes()
        entry = tokenizer_entry(self._tokenizer)
        write_bytes(self._out / entry.file, content)
        part = self._plan.part or (1, 1)
        return Manifest(
            tokenizer=entry,
            dtype=np.dtype(token_dtype(self._tokenizer.vocab_size)).name,
            settings=self._plan.settings.for_manifest(),
            part=f"{part[0]}/{part[1]}",
            sources=tuple(
                SourceEntry(
                    source.path,
                    walk.n_bytes if source.path == STDIN and len(self._names) == 1 else source.n_bytes or 0,
                    walk.digests.get(index, ""),
                    int(selection.documents_of[index]),
                )
                for index, source in enumerate(self._plan.sources)
            ),
            train=splits[SPLITS[0]],
            validation=splits[SPLITS[1]],
            drops=dict(sorted(surveyor.drops.counts.items())),
            duplicates=selection.n_duplicates,
            lost_fraction=surveyor.meter.fraction,
        )


def shard_name(side: str, number: int) -> str:
    """Return the name of a shard's file."""
    return f"{side}_{number:05d}.safetensors"


class _Stoppable(Sequence[Path]):
    """Paths that can be gone through as long as nobody wants to stop."""

    def __init__(self, paths: list[Path], go_on: Any) -> None:
        self._paths, self._go_on = paths, go_on

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        self._go_on()
        return self._paths[index]


class _Gauge:
    """Tells from the first pieces how much room all of them and the shards will take, and whether it is there."""

    def __init__(self, out: Path, total: int | None) -> None:
        self._out, self._total = out, total
        self._sent: dict[int, tuple[int, int]] = {}
        self._is_done = total is None

    def sent(self, index: int, n_bytes: int, stored_bytes: int) -> None:
        """A chunk of ``n_bytes`` goes to a worker, after ``stored_bytes`` of the corpus in all."""
        if not self._is_done:
            self._sent[index] = (n_bytes, stored_bytes)

    def written(self, index: int, n_bytes: int) -> None:
        """Its piece takes ``n_bytes``. Raises StorageError if the rest will not fit."""
        if self._is_done or self._total is None:
            return
        self._is_done = True
        content, _ = self._sent[index]
        read = max(stored for _, stored in self._sent.values())
        unpacked = sum(content for content, _ in self._sent.values())
        left = max(0, self._total - read) * max(1.0, unpacked / max(1, read))
        # Every token is in a piece first, and then in a shard beside it.
        needed = int(2 * (left + unpacked) * n_bytes / max(1, content))
        free = shutil.disk_usage(self._out).free
        if needed > free:
            raise StorageError(
                f"{self._out} needs about {needed / 1e6:,.0f} MB for pieces and shards, and {free / 1e6:,.0f} MB are "
                "free. Free some space, choose another --out, or prepare the corpus in parts on several disks"
            )
