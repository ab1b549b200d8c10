"""Text to verify an exported model with: the run's held-out documents, and Python's own source code."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from psannlm.config.data import DataConfig
from psannlm.data.corpus.documents import Document, read_documents
from psannlm.data.prepare import split_documents
from psannlm.data.prepared import PreparedSource, find_prepared
from psannlm.errors import PsannlmError
from psannlm.io.atomic import read_small
from psannlm.tokenizers.base import SPECIALS, Tokenizer
from psannlm.training.checkpoint import STATE_FILE

TEXT_BYTES = 1_000_000
# Texts are compared in passages of this many characters, so that a difference can be shown and a tie be judged.
PASSAGE_CHARS = 2048
N_RANDOM = 10_000
_STATE_BYTES = 64 << 20
# A larger corpus is not read again for its held-out part.
_CORPUS_BYTES = 64 << 20
_TOKENS = 400_000
_SEED = 1337


@dataclass(frozen=True)
class VerificationText:
    """``held_out`` passages to compare logits on, ``passages`` of both origins to compare ids on, and a description."""

    held_out: list[str]
    passages: list[str]
    description: str


def verification_text(checkpoint: Path, tokenizer: Tokenizer) -> VerificationText:
    """Return about 1 MB of text: what the run of ``checkpoint`` held out, filled up with Python's standard library.

    The held-out text is read again from the sources of the run. Where that is impossible, the description says so, and
    the standard library takes its place.
    """
    held_out: list[str] = []
    try:
        documents, missing = _held_out_texts(checkpoint, tokenizer), ""
        held_out = list(_passages(documents, TEXT_BYTES))
    except (PsannlmError, ValidationError, OSError, LookupError, ValueError) as error:
        missing = " ".join(str(error).split())[:120]
    n_bytes = sum(len(passage.encode("utf-8")) for passage in held_out)
    library = list(_passages(_library_texts(), TEXT_BYTES - n_bytes)) if n_bytes < TEXT_BYTES else []
    description = f"{n_bytes:,} bytes of held-out text"
    if not held_out:
        description = f"no held-out text ({missing or 'the run holds none out'})"
    if library:
        description += f" and {sum(len(p.encode('utf-8')) for p in library):,} bytes of Python's standard library"
    return VerificationText(held_out or library, held_out + library, description)


def random_texts(count: int = N_RANDOM) -> list[str]:
    """Return ``count`` strings of random Unicode, with spelled special tokens, escapes and runs of spaces."""
    generator = random.Random(_SEED)
    spelled = [*SPECIALS, "<0x41>", "<0xFF>", "\u2581", "\uf8f0", "\uf8f01", "  ", "      ", "\r\n", "\0", "aaaaaaa"]
    alphabets = ("abcdefghij KLMNO 0123456789 .,;<>/\\", "".join(map(chr, range(0x20, 0x250))), "日本語かなカナ한국어")

    def draw() -> str:
        kind = generator.random()
        if kind < 0.15:
            return generator.choice(spelled)
        if kind < 0.6:
            return generator.choice(generator.choice(alphabets))
        point = generator.randrange(0x110000 - 0x800)
        return chr(point if point < 0xD800 else point + 0x800)

    return ["".join(draw() for _ in range(generator.randrange(1, 48))) for _ in range(count)]


def _held_out_texts(checkpoint: Path, tokenizer: Tokenizer) -> Iterator[str]:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    content = read_small(folder / STATE_FILE, _STATE_BYTES)
    if content is None:
        raise LookupError("a model file does not record its corpus")
    state: dict[str, Any] = json.loads(content)["state"]
    data = DataConfig.model_validate(state["config"]["data"])
    prepared = find_prepared(data.sources)
    if prepared is not None:
        return _prepared_texts(prepared, data, tokenizer)
    total, documents = 0, []
    for document in read_documents(data.sources):
        documents.append(document)
        total += document.n_bytes
        if total > _CORPUS_BYTES:
            raise LookupError(f"the corpus is larger than {_CORPUS_BYTES >> 20} MiB")
    return (document.text for document in _held_out(documents, data, state))


def _held_out(documents: list[Document], data: DataConfig, state: dict[str, Any]) -> list[Document]:
    preparation = state.get("preparation")
    version = {} if preparation is None else {"preparation": int(preparation)}
    return split_documents(documents, data.val_split, data.seed, **version)[1]


def _prepared_texts(prepared: PreparedSource, data: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    if not prepared.read_manifest().validation.documents:
        raise LookupError("the prepared folder holds no text out")
    validation = prepared.open_held_out(data.cache_dir).held_out
    ids = validation.tokens(0, min(_TOKENS, validation.n_framed_tokens)).tolist()
    starts = [at for at, token in enumerate(ids) if token == tokenizer.bos_id]
    spans = zip(starts, [*starts[1:], len(ids)], strict=True)
    return (tokenizer.decode(ids[start:end]) for start, end in spans)


def _library_texts() -> Iterator[str]:
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def _passages(texts: Iterator[str], n_bytes: int) -> Iterator[str]:
    """Yield the passages of ``texts`` until they have ``n_bytes`` bytes or more."""
    done = 0
    for text in texts:
        for start in range(0, len(text), PASSAGE_CHARS):
            passage = text[start : start + PASSAGE_CHARS]
            yield passage
            done += len(passage.encode("utf-8"))
            if done >= n_bytes:
                return


def windows_of(texts: list[str], tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Return up to ``count`` windows of ``length`` ids, each document framed by the ids that begin and end a text."""
    ids: list[int] = []
    for text in islice(texts, count * length):
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        if len(ids) >= count * length:
            break
    windows = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return [window for window in windows if len(window) > 1]
