"""A backend's name, texts or a file in; a tokenizer out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from psannlm.errors import ConfigError, TokenizerError, nearest
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, N_BYTES, SPECIALS, Tokenizer
from psannlm.tokenizers.char import FORMAT as CHAR_FORMAT
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.sample import sample_passages

# Backend -> the package it needs, in the order that "auto" tries them.
_PACKAGES: dict[str, str | None] = {"sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "simple": None}


def available_backends() -> dict[str, str | None]:
    """Return each backend with None if its package can be imported, else with what the import said."""
    return {name: _import_failure(name) for name in _PACKAGES}


def _import_failure(backend: str) -> str | None:
    package = _PACKAGES[backend]
    if package is None:
        return None
    try:
        import_module(package)
    except ImportError as error:
        return str(error)
    return None


def resolve_backend(name: str) -> str:
    """Return the backend that ``name`` stands for: itself, or for ``auto`` the first whose package can be imported.

    Raises:
        ConfigError: no backend is called ``name``.
        TokenizerError: the backend was asked for by name and its package cannot be imported.
    """
    if name == "auto":
        return next(backend for backend in _PACKAGES if _import_failure(backend) is None)
    if name not in _PACKAGES:
        known = ["auto", *_PACKAGES]
        raise ConfigError(f"unknown tokenizer '{name}'{nearest(name, known)}; choose one of {', '.join(known)}")
    failure = _import_failure(name)
    if failure is not None:
        message = f"tokenizer '{name}' needs the package '{_PACKAGES[name]}' ({failure}); install it, or use 'auto'"
        raise TokenizerError(message)
    return name


def _ignore(message: str) -> None:
    pass


def fit_tokenizer(
    texts: Iterable[str],
    backend: str = "auto",
    vocab_size: int = 4096,
    *,
    seed: int = 1337,
    notice: Callable[[str], None] = _ignore,
) -> Tokenizer:
    """Fit a lossless tokenizer; the same texts, backend, size and seed give the same bytes.

    Args:
        texts: the corpus, read once. Of a large one a random sample is used, chosen by ``seed``.
        backend: ``auto``, ``sentencepiece``, ``tokenizers`` or ``simple``.
        vocab_size: entries at most, specials and bytes included. A small corpus fills fewer, and ``notice`` is told.

    Raises:
        ConfigError: ``vocab_size`` is too small, or the backend unknown.
        CorpusError: the corpus is empty or blank.
        TokenizerError: the backend's package is missing, or a text holds a lone surrogate.
    """
    backend = resolve_backend(backend)
    if vocab_size < MIN_VOCAB_SIZE:
        parts = f"{N_BYTES} bytes, {len(SPECIALS)} specials and one piece of text"
        raise ConfigError(f"vocab_size {vocab_size} is too small: {parts} take {MIN_VOCAB_SIZE}")
    sample = sample_passages(texts, seed, notice=notice)
    tokenizer: Tokenizer
    if backend == "sentencepiece":
        from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer.fit(sample, vocab_size)
    elif backend == "tokenizers":
        from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer.fit(sample, vocab_size)
    else:
        tokenizer = CharTokenizer.fit(sample, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        notice(f"the corpus fills {tokenizer.vocab_size:,} of the {vocab_size:,} vocabulary entries asked for")
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer file: a SentencePiece ``.model``, or a ``.json`` of ours or of Hugging Face tokenizers.

    Raises:
        TokenizerError: the file is unreadable, damaged or of an unknown kind, or lacks a special.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    try:
        return tokenizer_from_bytes(content)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def tokenizer_from_bytes(content: bytes) -> Tokenizer:
    """Return the tokenizer whose file holds ``content``; the kind is told from the bytes, not from a name.

    Raises:
        TokenizerError: as :func:`load_tokenizer` does.
    """
    if not content:
        raise TokenizerError("the tokenizer file is empty")
    if content.lstrip()[:1] != b"{":
        resolve_backend("sentencepiece")
        from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(content)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"damaged JSON: {error}") from error
    if data.get("format") == CHAR_FORMAT:
        return CharTokenizer.from_json(data)
    if "model" not in data:
        raise TokenizerError("JSON of an unknown kind: neither ours nor a tokenizer.json of Hugging Face tokenizers")
    resolve_backend("tokenizers")
    from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(content)
