"""A corpus to a tokenizer file and its card: the figures that say how well it fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from psannlm.config.data import Source
from psannlm.data.documents import ReadReport, read_documents
from psannlm.data.prepare import split_documents
from psannlm.data.shards import encode_documents
from psannlm.errors import ConfigError
from psannlm.storage import write_text
from psannlm.tokenizers.resolve import fit_tokenizer

_HELD_OUT = 0.1
_SUFFIXES = {"sentencepiece": ".model", "tokenizers": ".json", "simple": ".json"}


def fit_with_card(
    sources: Sequence[Source],
    *,
    backend: str = "auto",
    vocab_size: int = 4096,
    out: Path | None = None,
    seed: int = 1337,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Fit a tokenizer on nine tenths of the documents, write it and its card, and return the card.

    Bytes per token are measured on the tenth that was held out; a single document is cut in two. ``out`` gets the
    suffix of the backend if it has none; by default it is ``tokenizer.model`` or ``tokenizer.json``, and the card
    stands beside it.

    Raises:
        CorpusError: a source is missing, cannot be read, or holds too little text.
        ConfigError: another tokenizer stands at ``out`` already, or an argument is refused.
        TokenizerError, StorageError: as the parts raise them.
    """
    report = ReadReport()
    train, held_out = split_documents(list(read_documents(sources, report)), _HELD_OUT, seed)
    for line in report.lines():
        notice(line)
    tokenizer = fit_tokenizer((d.text for d in train), backend, vocab_size, seed=seed, notice=notice)
    path = out or Path("tokenizer")
    if not path.suffix:
        path = path.with_suffix(_SUFFIXES[tokenizer.backend])
    if path.exists() and path.read_bytes() != tokenizer.to_bytes():
        raise ConfigError(f"{path} holds another tokenizer already; name a new file with --out, or remove that one")
    store = encode_documents(held_out, tokenizer)
    card = {
        "file": str(path),
        "backend": tokenizer.backend,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "held_out_bytes_per_token": round(store.n_bytes / max(1, store.n_tokens), 4),
        "held_out_bytes": store.n_bytes,
        "held_out_is_lossless": all(tokenizer.decode(tokenizer.encode(d.text)) == d.text for d in held_out),
        "corpus_bytes": report.bytes,
        "corpus_sha256": report.sha256,
    }
    tokenizer.save(path)
    card_path = path.with_suffix(".card.json")
    write_text(card_path, json.dumps(card, indent=2) + "\n")
    return {**card, "card": str(card_path)}
