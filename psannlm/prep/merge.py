"""``prep --merge``: join the prepared parts of a corpus into one folder.

Shards are hard-linked, not copied. A shard is rewritten only if it holds a document that an earlier part holds too.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psannlm.config.files import WORK_FOLDER
from psannlm.data.framing import DocumentBatch, unpack_origin
from psannlm.data.manifest import MANIFEST_FILE, Manifest, SourceEntry, SplitEntry, read_manifest
from psannlm.data.remote_prepared import RemotePrepared, copy_files, find_remote_prepared
from psannlm.data.shard_file import Shard, ShardEntry, open_shard, write_shard
from psannlm.data.split import uniform_from_hash
from psannlm.errors import ConfigError, CorpusError, Interrupted
from psannlm.io.atomic import explain_write_errors, remove_leftovers, replacing
from psannlm.io.lock import RunLock
from psannlm.io.urls import is_remote
from psannlm.prep.dedup import Bits, DuplicateFinder
from psannlm.prep.folder import refuse_foreign_files, refuse_foreign_work, remove_work
from psannlm.prep.output import Output, open_output
from psannlm.prep.pipeline import PrepResult, shard_name
from psannlm.prep.plan import is_merge, merge_plan, source_differences, write_merge_plan
from psannlm.prep.selection import SPLITS, TRAIN, VALIDATION
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress
from psannlm.runtime.signals import stopping_on_signals
from psannlm.tokenizers.roundtrip import SMALLEST_FRACTION, folder_warning

log = logging.getLogger(__name__)

# Documents and tokens held at once; a longer document is written in several batches.
_DOCUMENTS_AT_ONCE = 1 << 16
_TOKENS_AT_ONCE = 1 << 22
_MISSING_SHOWN = 10
_Place = Path | RemotePrepared


@dataclass(frozen=True)
class _PartShard:
    """A shard of a part, and the number of its first document in the merged corpus."""

    shard: Shard
    split: str
    first: int


def merge_parts(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    on_progress: OnProgress = ignore_progress,
    cache_dir: Path | None = None,
) -> PrepResult:
    """Join the prepared parts of one corpus, given in any order, in the folder ``out``.

    Parts and ``out`` may be URLs, given as text. Parts at URLs are copied to ``cache_dir``, or the user's cache, first.

    The documents, and those that are held out, are the same as in one preparation of the whole corpus; their order is
    that of the parts. An interrupted merge starts again from the beginning: most of its work is linking files.

    Raises:
        ConfigError: a part is missing or named twice, the parts were prepared with different settings (all differences
            are named), or ``out`` is prepared already.
        ArtifactError: a manifest or a shard is damaged.
        CorpusError: the parts hold a single document, or none.
        StorageError: the folder cannot be written, or the disk is too small for copies of the parts.
    """
    began = time.monotonic()
    found = _in_order(folders)
    output = open_output(out, cache_dir)
    stop = threading.Event()
    with RunLock(output.folder, "--out"), stopping_on_signals(stop):
        if output.has_manifest():
            raise ConfigError(
                f"{output.name} is prepared already: {output.name}/{MANIFEST_FILE} is there; choose another folder "
                "with --out"
            )
        parts = [
            (place if isinstance(place, Path) else copy_files(place, SPLITS, cache_dir, on_progress), manifest)
            for place, manifest in found
        ]
        manifest = _Merge(parts, output, on_progress, stop).run()
    n_bytes = sum(source.bytes for source in manifest.sources)
    return PrepResult(output.name, manifest, time.monotonic() - began, n_bytes)


def _located(folder: Path | str) -> tuple[_Place, Manifest]:
    if isinstance(folder, Path) or not is_remote(folder):
        return Path(folder), read_manifest(Path(folder))
    source = find_remote_prepared(folder)
    if source is None:
        raise ConfigError(f"{folder} is not a prepared folder: there is no {MANIFEST_FILE} of psannlm prep")
    return source, source.manifest


def _in_order(folders: Sequence[Path | str]) -> list[tuple[_Place, Manifest]]:
    """Return the parts by number, each with its manifest, after checking that they belong to one preparation."""
    found: dict[int, tuple[_Place, Manifest]] = {}
    names: dict[int, Path | str] = {}
    first: tuple[Path | str, Manifest] | None = None
    for folder in folders:
        place, manifest = _located(folder)
        index, of = (int(number) for number in manifest.part.split("/"))
        if first is None:
            first = (folder, manifest)
        _refuse_unlike(first, (folder, manifest))
        if index in found:
            raise ConfigError(f"{folder} and {names[index]} are both part {manifest.part}; give each part once")
        found[index], names[index] = (place, manifest), folder
    if first is None:
        raise ConfigError("no parts to merge; name their folders")
    of = int(first[1].part.split("/")[1])
    if missing := [str(index) for index in range(1, of + 1) if index not in found]:
        shown = ", ".join(missing[:_MISSING_SHOWN])
        more = f" and {len(missing) - _MISSING_SHOWN:,} more" if len(missing) > _MISSING_SHOWN else ""
        raise ConfigError(f"of {of} parts these are missing: {shown}{more}; prepare them with --part I/{of}")
    return [found[index] for index in sorted(found)]


def _refuse_unlike(first: tuple[Path | str, Manifest], other: tuple[Path | str, Manifest]) -> None:
    (folder, one), (path, two) = first, other
    differing = []
    if one.tokenizer != two.tokenizer:
        differing.append(f"tokenizer: {one.tokenizer.fingerprint:.12} and {two.tokenizer.fingerprint:.12}")
    if one.part.split("/")[1] != two.part.split("/")[1]:
        differing.append(f"part: {one.part} and {two.part}")
    ours, theirs = vars(one.settings), vars(two.settings)
    differing += [f"{name}: {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    files = [[{"path": source.path, "bytes": source.bytes} for source in each.sources] for each in (one, two)]
    differing += source_differences(files[0], files[1])
    if differing:
        lines = "\n  ".join(differing)
        raise ConfigError(
            f"{folder} and {path} are not parts of one preparation:\n  {lines}\n"
            "Prepare all parts with the same settings, tokenizer and files."
        )


class _Merge:
    """One merge. Documents are numbered part by part, training before validation."""

    def __init__(
        self, parts: list[tuple[Path, Manifest]], output: Output, on_progress: OnProgress, stop: threading.Event
    ) -> None:
        self._parts, self._output, self._on_progress, self._stop = parts, output, on_progress, stop
        self._out = output.folder
        self._like = parts[0][1]
        self._shards: list[_PartShard] = []
        number = 0
        for folder, manifest in parts:
            for split, split_entry in ((TRAIN, manifest.train), (VALIDATION, manifest.validation)):
                for entry in split_entry.shards:
                    shard = open_shard(folder / entry.file, entry, manifest.tokenizer.fingerprint)
                    self._shards.append(_PartShard(shard, split, number))
                    number += entry.documents
        self._n = number

    def run(self) -> Manifest:
        work = self._out / WORK_FOLDER
        refuse_foreign_work(work)
        content = (self._parts[0][0] / self._like.tokenizer.file).read_bytes()
        refuse_foreign_files(self._out, self._like.tokenizer.file, content, has_work=is_merge(work))
        self._output.begin(merge_plan(self._like), self._like.tokenizer.file, content)
        remove_work(work)
        write_merge_plan(work, self._like)
        with explain_write_errors(self._out):
            remove_leftovers(self._out)
        dropped = self._repeated(work) if self._like.settings.dedupe else Bits(self._n)
        moved = self._moved(dropped)
        self._documents_of = np.zeros(len(self._like.sources), np.int64)
        splits = {split: self._write_split(split, dropped, moved) for split in SPLITS}
        manifest = self._manifest(splits)
        self._output.finish(manifest, content)
        if (warning := folder_warning(str(self._output.name), manifest.lost_fraction)) is not None:
            log.warning(warning)
        remove_work(work)
        self._output.close()
        return manifest

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted("interrupted; run the same command to merge from the beginning")

    def _hashes(self) -> Iterator[tuple[_PartShard, int, NDArray[np.uint8]]]:
        """Yield (shard, number of the first document, hashes) in groups of documents."""
        for part_shard in self._shards:
            for start in range(0, part_shard.shard.n_documents, _DOCUMENTS_AT_ONCE):
                self._raise_if_stopped()
                stop = min(start + _DOCUMENTS_AT_ONCE, part_shard.shard.n_documents)
                yield part_shard, part_shard.first + start, part_shard.shard.hashes(start, stop)

    def _repeated(self, work: Path) -> Bits:
        with DuplicateFinder(work, self._n) as finder:
            for _, first, hashes in self._hashes():
                finder.add(np.arange(first, first + len(hashes), dtype=np.int64), hashes)
            return finder.repeated()

    def _moved(self, dropped: Bits) -> int | None:
        """Return the number of the document to move so that neither split is empty, or None; only a merge can know."""
        settings = self._like.settings
        kept = dict.fromkeys(SPLITS, 0)
        lowest, highest = (2.0, -1), (-1.0, -1)
        for part_shard, first, hashes in self._hashes():
            is_kept = ~dropped.among(first, first + len(hashes))
            kept[part_shard.split] += int(is_kept.sum())
            at = np.flatnonzero(is_kept)
            if len(at):
                drawn = uniform_from_hash(hashes[at], settings.seed)
                low, high = int(np.argmin(drawn)), int(np.argmax(drawn))
                lowest = min(lowest, (float(drawn[low]), first + int(at[low])))
                if drawn[high] > highest[0]:
                    highest = (float(drawn[high]), first + int(at[high]))
        n_kept = sum(kept.values())
        if not n_kept:
            raise CorpusError("the parts hold no documents")
        if settings.val_split == 0 or all(kept.values()):
            return None
        if n_kept == 1:
            raise CorpusError(
                "the parts hold a single document; prepare the corpus without --part, which cuts it in two"
            )
        return lowest[1] if not kept[VALIDATION] else highest[1]

    def _write_split(self, split: str, dropped: Bits, moved: int | None) -> SplitEntry:
        entries: list[ShardEntry] = []
        for part_shard in self._shards:
            self._raise_if_stopped()
            shard, first = part_shard.shard, part_shard.first
            wanted = np.zeros(shard.n_documents, np.bool_)
            if part_shard.split == split:
                wanted = ~dropped.among(first, first + shard.n_documents)
            if moved is not None and first <= moved < first + shard.n_documents:
                wanted[moved - first] ^= True
            if wanted.any():
                path = self._out / shard_name(split, len(entries))
                if wanted.all():
                    entries.append(_link(shard, path))
                else:
                    log.info(f"rewriting {shard.path} without {int((~wanted).sum()):,} documents")
                    entries.append(_rewrite(shard, wanted, path, self._like.tokenizer.fingerprint))
                self._output.keep(entries[-1])
                self._count_origins(shard, wanted)
                done, total = sum(e.tokens for e in entries), sum(s.shard.n_framed_tokens for s in self._shards)
                self._on_progress(Progress("writing shards", done, total, "tokens"))
        return SplitEntry.of(tuple(entries))

    def _count_origins(self, shard: Shard, wanted: NDArray[np.bool_]) -> None:
        for start in range(0, shard.n_documents, _DOCUMENTS_AT_ONCE):
            stop = min(start + _DOCUMENTS_AT_ONCE, shard.n_documents)
            origins = shard.origins(start, stop)[wanted[start:stop]]
            sources, counts = np.unique(origins, return_counts=True)
            for origin, count in zip(sources.tolist(), counts.tolist(), strict=True):
                self._documents_of[unpack_origin(origin)[0]] += count

    def _manifest(self, splits: dict[str, SplitEntry]) -> Manifest:
        manifests = [manifest for _, manifest in self._parts]
        drops: dict[str, int] = {}
        for manifest in manifests:
            for reason, count in manifest.drops.items():
                drops[reason] = drops.get(reason, 0) + count
        sources = []
        for index, entries in enumerate(zip(*(manifest.sources for manifest in manifests), strict=True)):
            read = next((entry for entry in entries if entry.sha256), entries[0])
            sources.append(SourceEntry(read.path, read.bytes, read.sha256, int(self._documents_of[index])))
        n_kept = sum(split.documents for split in splits.values())
        return replace(
            self._like,
            part="1/1",
            sources=tuple(sources),
            train=splits[TRAIN],
            validation=splits[VALIDATION],
            drops=dict(sorted(drops.items())),
            duplicates=sum(manifest.duplicates for manifest in manifests) + self._n - n_kept,
            lost_fraction=_lost_fraction(manifests),
        )


def _lost_fraction(manifests: Sequence[Manifest]) -> float | None:
    """Return the mean over the text of the parts whose fraction is known; None if nothing is known to be lost."""
    known = [
        (manifest.lost_fraction, manifest.train.text_bytes + manifest.validation.text_bytes)
        for manifest in manifests
        if manifest.lost_fraction is not None
    ]
    lost = sum(fraction * n_bytes for fraction, n_bytes in known)
    if lost:
        return max(SMALLEST_FRACTION, round(lost / sum(n_bytes for _, n_bytes in known), 6))
    is_known = all(m.lost_fraction is not None or m.train.documents + m.validation.documents == 0 for m in manifests)
    return 0.0 if is_known and known else None


def _link(shard: Shard, path: Path) -> ShardEntry:
    """Verify a shard and hard-link it at ``path``; copy it if that is another file system."""
    shard.verify()
    # A hard link to a symbolic link would point nowhere from another folder.
    source = shard.path.resolve()
    with replacing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    return replace(shard.entry, file=path.name)


def _rewrite(shard: Shard, wanted: NDArray[np.bool_], path: Path, fingerprint: str) -> ShardEntry:
    n_tokens = 0
    for start in range(0, shard.n_documents, _DOCUMENTS_AT_ONCE):
        stop = min(start + _DOCUMENTS_AT_ONCE, shard.n_documents)
        n_tokens += int(np.diff(shard.starts(start, stop + 1))[wanted[start:stop]].sum())
    return write_shard(
        path,
        dtype=shard.dtype,
        fingerprint=fingerprint,
        n_tokens=n_tokens,
        n_documents=int(wanted.sum()),
        batches=_chosen(shard, wanted),
    )


def _chosen(shard: Shard, wanted: NDArray[np.bool_]) -> Iterator[DocumentBatch]:
    """Yield the wanted documents of a shard in batches of consecutive documents, bounded in size."""
    numbers = np.flatnonzero(wanted)
    at = 0
    while at < len(numbers):
        first = int(numbers[at])
        stop = min(len(numbers), at + _DOCUMENTS_AT_ONCE)
        run = numbers[at:stop]
        run = run[run - np.arange(len(run)) == first]
        starts = shard.starts(first, first + len(run) + 1)
        n = max(1, int(np.searchsorted(starts, starts[0] + _TOKENS_AT_ONCE, side="right")) - 1)
        n = min(n, len(run))
        yield from _run(shard, first, n, starts[: n + 1])
        at += n


def _run(shard: Shard, first: int, n: int, starts: NDArray[np.int64]) -> Iterator[DocumentBatch]:
    begin, end = int(starts[0]), int(starts[-1])
    none = np.zeros(0, np.int64)
    while end - begin > _TOKENS_AT_ONCE:
        tokens = shard.tokens(begin, begin + _TOKENS_AT_ONCE)
        yield DocumentBatch(tokens, none, none, np.zeros((0, 16), np.uint8), none)
        begin += _TOKENS_AT_ONCE
    yield DocumentBatch(
        shard.tokens(begin, end),
        np.diff(starts),
        shard.n_bytes(first, first + n),
        shard.hashes(first, first + n),
        shard.origins(first, first + n),
    )
