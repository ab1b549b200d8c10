"""Loading of a corpus for training: read, split, fit or load the tokenizer, and encode.

The tokenizer is fitted on training documents only: entries learned from held-out text would improve the validation
loss unfairly.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from psannlm.config.data import DataConfig
from psannlm.data.corpus.documents import Document, ReadReport, keep_text, read_documents
from psannlm.data.framing import HASH_BYTES, text_hash
from psannlm.data.memory_store import encode_documents
from psannlm.data.prepared import PreparedSource, check_compatible, find_prepared
from psannlm.data.split import SEGMENT_BYTES, cut_text, held_out, held_out_by_number
from psannlm.data.stream import Stream
from psannlm.errors import ConfigError, CorpusError, Problem
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer, load_tokenizer
from psannlm.tokenizers.roundtrip import RoundTripMeter, check_roundtrip, folder_warning

log = logging.getLogger(__name__)

# Version of the split and of the encoding, stored in checkpoints. Version 1 split documents by their number instead of
# their text, and encoded a long document as a whole instead of in segments.
PREPARATION = 2

# Shorter paragraphs ("Example:", "See also") recur in all prose and are not evidence of duplicated text.
_PARAGRAPH_CHARACTERS = 60
_REPLACE_OPTION = "errors: replace in that entry of data.sources"
_PARAGRAPH_END = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class PreparedData:
    """A corpus encoded for training.

    ``val`` is None if nothing is held out. ``val_overlap``: fraction of the held-out text, in [0, 1], in paragraphs
    that also occur in training documents; the loss on such text says little about new text. ``preparation``: version of
    split and encoding, None if all versions give the same. ``lost_fraction``: fraction of the checked text that the
    tokenizer does not give back; None is unknown. ``first_documents``: for each source, the first of its documents in
    ``train``; empty for a prepared folder.
    """

    tokenizer: Tokenizer
    train: Stream
    val: Stream | None
    report: ReadReport
    val_overlap: float | None = None
    preparation: int | None = None
    lost_fraction: float | None = None
    first_documents: tuple[int, ...] = ()


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    preparation: int = PREPARATION,
    *,
    on_progress: OnProgress = ignore_progress,
) -> PreparedData:
    """Read the configured sources, split them, fit or load the tokenizer and encode.

    ``tokenizer`` and the version ``preparation`` are those of a run that is resumed. A prepared folder is opened
    instead, with its own tokenizer and validation split; from a URL it is copied to local disk first.

    ``on_progress`` gets the bytes copied so far.

    Raises:
        CorpusError: a source is missing or cannot be read, or there is no text.
        TokenizerError: the tokenizer cannot be fitted or read.
        ConfigError: the tokenizer file is of another backend than the configured one; or a prepared folder does not
            match the configuration, or is configured with other sources.
        ArtifactError: a prepared folder is damaged.
        StorageError: there is no space for the copy of a prepared folder.
    """
    source = find_prepared(config.sources)
    if source is not None:
        return _from_folder(source, config, on_progress)
    log.info("reading and tokenizing the corpus")
    report = ReadReport()
    documents = read_documents(config.sources, report, replace_option=_REPLACE_OPTION)
    return _load(documents, report, config, tokenizer, preparation)


def load_documents(
    documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Same as :func:`load_corpus` for given documents; a ``tokenizer`` given here is used as it is."""
    report = ReadReport()
    return _load(keep_text(documents, report), report, config, tokenizer)


def _load(
    documents: Iterable[Document],
    report: ReadReport,
    config: DataConfig,
    tokenizer: Tokenizer | None,
    preparation: int = PREPARATION,
) -> PreparedData:
    train_documents, val_documents = split_documents(list(documents), config.val_split, config.seed, preparation)
    for line in report.lines():
        log.info(line)
    if tokenizer is None:
        tokenizer = _tokenizer(train_documents, config)
    log.info(_describe(tokenizer))
    in_segments = preparation > 1
    is_long = any(document.n_bytes > SEGMENT_BYTES for document in (*train_documents, *val_documents))
    meter = RoundTripMeter()
    watched = check_roundtrip(tokenizer, train_documents, log.warning, meter)
    train = encode_documents(watched, tokenizer, in_segments=in_segments)
    log.info(f"train: {_size(train)}")
    _check_length(train, config.max_length)
    numbers = np.array([document.source for document in train_documents])
    firsts = tuple(np.searchsorted(numbers, np.arange(len(config.sources))).tolist())
    if not val_documents:
        made_by = preparation if is_long else None
        return PreparedData(tokenizer, train, None, report, None, made_by, meter.fraction, firsts)
    val = encode_documents(val_documents, tokenizer, in_segments=in_segments)
    overlap = shared_text(val_documents, train_documents)
    log.info(f"validation: {_size(val)}; {_describe_overlap(overlap)}")
    made_by = None if report.documents == 1 and not is_long else preparation
    return PreparedData(tokenizer, train, val, report, overlap, made_by, meter.fraction, firsts)


def _from_folder(source: PreparedSource, config: DataConfig, on_progress: OnProgress) -> PreparedData:
    folder = source.open(config.cache_dir, on_progress)
    check_compatible(config, folder)
    report, made = folder.report(), folder.manifest
    part = "" if made.part == "1/1" else f", part {made.part} of a corpus"
    log.info(f"prepared folder: {folder.path}{part}")
    for line in report.lines():
        log.info(line)
    log.info(_describe(folder.tokenizer))
    if (warning := folder_warning(str(folder.path), made.lost_fraction)) is not None:
        log.warning(warning)
    log.info(f"train: {_size(folder.train)}")
    _check_length(folder.train, config.max_length)
    if folder.validation is not None:
        overlap = "" if made.val_overlap is None else f"; {_describe_overlap(made.val_overlap)}"
        log.info(f"validation: {_size(folder.validation)}{overlap}")
    return PreparedData(
        folder.tokenizer, folder.train, folder.validation, report, made.val_overlap, None, made.lost_fraction
    )


def _describe(tokenizer: Tokenizer) -> str:
    entries = f"{tokenizer.vocab_size:,} entries"
    return f"tokenizer: {tokenizer.backend}, {entries}, fingerprint {tokenizer.fingerprint[:12]}"


def _describe_overlap(overlap: float) -> str:
    return f"{overlap:.1%} of its text occurs verbatim in the training text"


def _tokenizer(train_documents: Sequence[Document], config: DataConfig) -> Tokenizer:
    if config.tokenizer_model_path is not None:
        tokenizer = load_tokenizer(Path(os.path.expanduser(config.tokenizer_model_path)))
        if config.tokenizer not in ("auto", tokenizer.backend):
            message = (
                f"{config.tokenizer} is configured, but {config.tokenizer_model_path} is a file of "
                f"{tokenizer.backend}; leave data.tokenizer at auto"
            )
            raise ConfigError(Problem("data.tokenizer", message))
        return tokenizer
    texts = (document.text for document in train_documents)
    return fit_tokenizer(texts, config.tokenizer, config.vocab_size, seed=config.seed)


def _size(store: Stream) -> str:
    noun = "document" if store.n_documents == 1 else "documents"
    # The tokens that a model learns to predict: BOS is never a label. psannlm prep and eval print the same number.
    n_tokens = store.n_framed_tokens - store.n_documents
    per_token = f"{store.n_bytes / n_tokens:.2f} bytes per token" if n_tokens else "no tokens"
    return f"{store.n_documents:,} {noun}, {store.n_bytes:,} bytes, {n_tokens:,} tokens ({per_token})"


def _check_length(train: Stream, max_length: int) -> None:
    """Log a warning if the training text is shorter than one window; raise CorpusError if there is nothing to predict.

    Padding costs time without any effect: its labels are ignored.
    """
    # BOS, the first id of every document, is never predicted.
    if train.n_framed_tokens <= train.n_documents:
        raise CorpusError("the training text holds no token to predict; add text")
    if train.n_framed_tokens <= max_length:
        log.warning(
            f"note: the training text is shorter than one window: its {train.n_framed_tokens:,} tokens, BOS "
            f"and EOS included, are padded to data.max_length {max_length:,}; a data.max_length of "
            f"{train.n_framed_tokens - 1:,} needs no padding"
        )


def split_documents(
    documents: Sequence[Document], val_split: float, seed: int, preparation: int = PREPARATION
) -> tuple[list[Document], list[Document]]:
    """Return (training, validation) documents, both in reading order.

    Each document is held out or not by its own text and ``seed``, at least one and never all (:func:`split.held_out`);
    ``preparation`` 1 uses the numbers of documents instead. A single document is cut in two, and its end is held out.

    Raises:
        CorpusError: a single document is too short to be cut.
    """
    if val_split <= 0:
        return list(documents), []
    if len(documents) == 1:
        return _cut(documents[0], val_split)
    if not documents:
        return [], []
    if preparation == 1:
        is_out = held_out_by_number(len(documents), val_split, seed)
    else:
        hashes = b"".join(text_hash(document.text.encode("utf-8")) for document in documents)
        is_out = held_out(np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES), val_split, seed)
    splits: tuple[list[Document], list[Document]] = [], []
    for document, is_held_out in zip(documents, is_out.tolist(), strict=True):
        splits[is_held_out].append(document)
    return splits


def _cut(document: Document, val_split: float) -> tuple[list[Document], list[Document]]:
    parts = cut_text(document.text, val_split)
    if parts is None:
        raise CorpusError(
            f"{document.name}: {len(document.text):,} characters are too few to hold out {val_split:g} of them; "
            "add text, or set data.val_split to 0"
        )
    first, last = parts
    return [Document(first, f"{document.name} [first part]")], [Document(last, f"{document.name} [last part]")]


def shared_text(held_out: Iterable[Document], train: Iterable[Document]) -> float:
    """Return the fraction of held-out bytes in paragraphs that also occur in a training document, in [0, 1].

    Paragraphs end at blank lines; white space is normalized before they are compared; only those of 60 characters or
    more can count as shared. Memory grows with the held-out text, not with the training text.
    """
    sizes: dict[bytes, int] = {}
    total = 0
    for paragraph in _paragraphs(held_out):
        n_bytes = len(paragraph.encode("utf-8"))
        total += n_bytes
        if len(paragraph) >= _PARAGRAPH_CHARACTERS:
            key = _key(paragraph)
            sizes[key] = sizes.get(key, 0) + n_bytes
    shared = 0
    for paragraph in _paragraphs(train):
        if len(paragraph) >= _PARAGRAPH_CHARACTERS:
            shared += sizes.pop(_key(paragraph), 0)
    return shared / total if total else 0.0


def _paragraphs(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        for paragraph in _PARAGRAPH_END.split(document.text):
            if words := " ".join(paragraph.split()):
                yield words


def _key(paragraph: str) -> bytes:
    return hashlib.blake2b(paragraph.encode("utf-8"), digest_size=16).digest()
