"""Fitting a tokenizer on a corpus of any size, with a card of figures measured on held-out text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psannlm.config.data import Source
from psannlm.data.corpus.documents import Document, ReadReport, read_documents
from psannlm.data.prepare import split_documents
from psannlm.data.record_figures import TokenizerCard
from psannlm.data.split import cut_text
from psannlm.display import json_text
from psannlm.errors import ConfigError, TokenizerError
from psannlm.io.atomic import read_small, refuse_foreign, require_writable, write_text
from psannlm.runtime.progress import OnProgress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import MODEL_TYPES, check_fit, file_suffix, fit_passages, load_tokenizer
from psannlm.tokenizers.sample import SAMPLE_CHARS, PassageSample

_HELD_OUT = 0.1
# Longer documents are cut and their end is held out: a few long documents as wholes would miss a tenth by far.
_LONG_CHARACTERS = 1 << 16
# Bytes per token converge long before this.
HELD_OUT_CHARS = 2_000_000
# Longer documents are cut into segments, each of which is held out or fitted on like a document.
SAMPLE_SEGMENT_BYTES = 1 << 20
_LONGEST_SHOWN = 12

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """Passages of a corpus: those to fit on, and those held out for measuring."""

    fitted_on: list[str]
    held_out: list[str]


def fit_with_card(
    sources: Sequence[Source],
    *,
    backend: str = "auto",
    vocab_size: int = 4096,
    model_type: str | None = None,
    out: Path | None = None,
    seed: int = 1337,
    sample_chars: int = SAMPLE_CHARS,
    replace_option: str = "",
    on_progress: OnProgress | None = None,
) -> TokenizerCard:
    """Fit a tokenizer on a sample of about nine tenths of the corpus, write it and its card, and return the card.

    Figures are measured on the rest. Memory depends on ``sample_chars``, ``vocab_size`` and the longest line, not on
    the size of the corpus. ``out`` gets the suffix of the backend if it has none; by default it is ``tokenizer.model``
    or ``tokenizer.json``, and the card is beside it. ``on_progress`` gets the bytes read so far; ``replace_option``:
    the remedy in errors about bytes that are not UTF-8.

    Raises:
        CorpusError: a source is missing, cannot be read, or holds too little text.
        ConfigError: ``out`` is another tokenizer, or an argument is invalid.
        TokenizerError, StorageError: as the parts raise them.
    """
    backend = check_fit(backend, vocab_size, model_type, sample_chars)
    path = out or Path("tokenizer")
    if not path.suffix:
        path = path.with_suffix(file_suffix(backend))
    require_writable(path)
    # The whole name, because tokenizer.model and tokenizer.json may be in one folder.
    card_path = path.with_name(f"{path.name}.card.json")
    require_writable(card_path)
    remedy = "or name a new file with --out"
    refuse_foreign(card_path, _is_own_card, remedy)
    refuse_foreign(path, _is_tokenizer, remedy)
    report = ReadReport()
    documents = read_documents(
        sources, report, segment_bytes=SAMPLE_SEGMENT_BYTES, on_progress=on_progress, replace_option=replace_option
    )
    sampled = sample_corpus(documents, seed=seed, sample_chars=sample_chars)
    for line in report.lines():
        log.info(line)
    kind = f" ({model_type or MODEL_TYPES[0]})" if backend == "sentencepiece" else ""
    n_chars = sum(map(len, sampled.fitted_on))
    log.info(f"fitting {backend}{kind} on {n_chars:,} characters")
    tokenizer = fit_passages(sampled.fitted_on, backend, vocab_size, model_type=model_type)
    if path.exists() and path.read_bytes() != tokenizer.to_bytes():
        raise ConfigError(f"{path} holds another tokenizer already; name a new file with --out, or remove that one")
    card = TokenizerCard(
        file=str(path),
        backend=tokenizer.backend,
        model_type=(model_type or MODEL_TYPES[0]) if backend == "sentencepiece" else None,
        vocab_size=tokenizer.vocab_size,
        vocab_size_asked=vocab_size,
        fingerprint=tokenizer.fingerprint,
        **held_out_figures(tokenizer, sampled.held_out),
        longest_pieces=longest_pieces(tokenizer),
        corpus_documents=report.documents,
        corpus_bytes=report.bytes,
        corpus_sha256=report.sha256,
        fitted_on_chars=n_chars,
        sample_chars=sample_chars,
        seed=seed,
    )
    tokenizer.save(path)
    write_text(card_path, json_text(card.as_dict(), indent=2) + "\n")
    return replace(card, card=str(card_path))


def _is_tokenizer(path: Path) -> bool:
    """Return whether the file is a tokenizer; whether it equals the fitted one is checked later."""
    try:
        load_tokenizer(path)
    except TokenizerError:
        return False
    return True


def _is_own_card(path: Path) -> bool:
    """Return whether the file is the card of a tokenizer fitted by psannlm."""
    try:
        content = json.loads(read_small(path, 1 << 20) or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"backend", "fingerprint", "corpus_sha256"} <= content.keys()


def sample_corpus(
    documents: Iterable[Document],
    *,
    seed: int,
    sample_chars: int = SAMPLE_CHARS,
    held_out_chars: int = HELD_OUT_CHARS,
) -> Sampled:
    """Return passages to fit on and held-out passages, sampled in one pass.

    A document (or segment) is held out if the hash of ``seed`` and its text is in the lowest tenth, so that equal
    documents are in the same split. A single document, and each document or segment of 65,536 characters or more, is
    cut in two, and its last tenth is held out. If none is cut, the document with the lowest hash is held out and that
    with the highest is not, so that neither split is empty.

    Raises:
        CorpusError: a single document is too short to be cut.
    """
    fit, held_out = PassageSample(seed, sample_chars), PassageSample(seed, held_out_chars)
    edges: list[tuple[float, Document]] = []  # lowest and highest so far, undecided until the end

    def assign(number: float, document: Document) -> None:
        (held_out if number < _HELD_OUT else fit).add(document.text)

    has_cut = False
    for document in documents:
        halves = cut_text(document.text, _HELD_OUT) if len(document.text) >= _LONG_CHARACTERS else None
        if halves is not None:
            fit.add(halves[0])
            held_out.add(halves[1])
            has_cut = True
            continue
        edges.append((_hash_number(document.text, seed), document))
        edges.sort(key=lambda edge: edge[0])
        if len(edges) > 2:
            assign(*edges.pop(1))
    if has_cut:
        for edge in edges:
            assign(*edge)
    elif len(edges) == 1:
        first, last = split_documents([edges[0][1]], _HELD_OUT, seed)
        fit.add(first[0].text)
        held_out.add(last[0].text)
    else:
        held_out.add(edges[0][1].text)
        fit.add(edges[1][1].text)
    fit.log_size()
    return Sampled(fit.passages(), held_out.passages())


def _hash_number(text: str, seed: int) -> float:
    """Return a number in [0, 1), a pure function of ``text`` and ``seed``."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return float(int.from_bytes(digest, "big") / 2**64)


def held_out_figures(tokenizer: Tokenizer, held_out: Sequence[str]) -> dict[str, Any]:
    """Return figures on held-out text: bytes per token, fraction of byte tokens, and whether it round-trips."""
    rows = tokenizer.encode_batch(held_out)
    n_tokens = sum(map(len, rows))
    n_bytes = sum(len(text.encode("utf-8")) for text in held_out)
    byte_ids = tokenizer.byte_ids
    n_byte_tokens = sum(i in byte_ids for row in rows for i in row)
    return {
        "held_out_bytes_per_token": round(n_bytes / max(1, n_tokens), 4),
        "held_out_bytes": n_bytes,
        "held_out_tokens": n_tokens,
        "held_out_byte_fallback_share": round(n_byte_tokens / max(1, n_tokens), 6),
        "held_out_is_lossless": tokenizer.decode_batch(rows) == list(held_out),
    }


def longest_pieces(tokenizer: Tokenizer, count: int = _LONGEST_SHOWN) -> list[str]:
    """Return the texts of the longest entries, the longest first."""
    texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
    return sorted(texts, key=lambda text: (-len(text), text))[:count]
