"""Fitting and loading of tokenizers by backend name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from psannlm.errors import ConfigError, TokenizerError, nearest
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.limits import MAX_TOKENIZER_BYTES
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, N_BYTES, SPECIALS, Tokenizer
from psannlm.tokenizers.char import FORMAT as CHAR_FORMAT
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.sample import SAMPLE_CHARS, sample_passages

log = logging.getLogger(__name__)

# Backend -> required package, in the order of preference of "auto".
_PACKAGES: dict[str, str | None] = {"sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "simple": None}
# Model types of SentencePiece, the default first.
MODEL_TYPES = ("unigram", "bpe")


def file_suffix(backend: str) -> str:
    """Return the suffix of a tokenizer file: ``.model`` for SentencePiece, ``.json`` for all others."""
    return ".model" if backend == "sentencepiece" else ".json"


def available_backends() -> dict[str, str | None]:
    """Return each backend with None, or with the import error of its package."""
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
    """Return ``name``, or for ``auto`` the first backend whose package can be imported.

    Raises:
        ConfigError: ``name`` is not a backend.
        TokenizerError: the package of the named backend cannot be imported.
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


def fit_tokenizer(
    texts: Iterable[str],
    backend: str = "auto",
    vocab_size: int = 4096,
    *,
    model_type: str | None = None,
    seed: int = 1337,
    sample_chars: int = SAMPLE_CHARS,
) -> Tokenizer:
    """Fit a lossless tokenizer; the same texts, backend, sizes and seed give the same bytes.

    Args:
        texts: the corpus, read once. A large corpus is sampled at random, with ``seed``.
        backend: ``auto``, ``sentencepiece``, ``tokenizers`` or ``simple``.
        vocab_size: maximum number of entries, specials and bytes included. A small corpus gives fewer.
        model_type: ``unigram`` (default) or ``bpe`` for SentencePiece; None for the others.
        sample_chars: maximum number of characters to fit on.

    Raises:
        ConfigError: ``vocab_size`` or ``sample_chars`` is too small, or the backend or model type is unknown.
        CorpusError: the corpus is empty or blank.
        TokenizerError: the backend's package is missing, or a text holds a lone surrogate.
    """
    backend = check_fit(backend, vocab_size, model_type, sample_chars)
    sample = sample_passages(texts, seed, budget=sample_chars)
    return fit_passages(sample, backend, vocab_size, model_type=model_type)


def check_fit(backend: str, vocab_size: int, model_type: str | None, sample_chars: int = SAMPLE_CHARS) -> str:
    """Check the arguments of :func:`fit_tokenizer` and return the resolved backend. Raises the same errors."""
    backend = resolve_backend(backend)
    if vocab_size < MIN_VOCAB_SIZE:
        parts = f"{N_BYTES} bytes, {len(SPECIALS)} specials and one piece of text"
        raise ConfigError(f"vocab_size {vocab_size} is too small: {parts} take {MIN_VOCAB_SIZE}")
    if sample_chars < 1:
        raise ConfigError(f"sample_chars {sample_chars} is too small; it must be 1 or more")
    if model_type is not None and backend != "sentencepiece":
        raise ConfigError(
            f"model type '{model_type}' is for sentencepiece; '{backend}' has only one type: leave it out"
        )
    if model_type not in (None, *MODEL_TYPES):
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(f"unknown model type '{model_type}'{nearest(model_type, MODEL_TYPES)}; choose one of {known}")
    return backend


def fit_passages(
    sample: Sequence[str],
    backend: str,
    vocab_size: int,
    *,
    model_type: str | None = None,
) -> Tokenizer:
    """Fit on passages from :mod:`psannlm.tokenizers.sample`; arguments as checked by :func:`check_fit`."""
    tokenizer: Tokenizer
    if backend == "sentencepiece":
        from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer.fit(sample, vocab_size, model_type or MODEL_TYPES[0])
    elif backend == "tokenizers":
        from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer.fit(sample, vocab_size)
    else:
        tokenizer = CharTokenizer.fit(sample, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log.info(f"the corpus fills {tokenizer.vocab_size:,} of the {vocab_size:,} vocabulary entries asked for")
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer file: a SentencePiece ``.model``, or a ``.json`` of psannlm or Hugging Face tokenizers.

    Raises:
        TokenizerError: the file is unreadable, damaged or of an unknown kind, or lacks a special token.
    """
    path = Path(path)
    refuse_pointer(path, TokenizerError)
    try:
        if path.exists() and not path.is_file():
            raise TokenizerError(f"{path} is not a regular file; name a .model or .json file")
        if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise TokenizerError(f"{path} has {size:,} bytes; a tokenizer file has at most {MAX_TOKENIZER_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    try:
        return tokenizer_from_bytes(content)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def tokenizer_from_bytes(content: bytes) -> Tokenizer:
    """Return the tokenizer with the file content ``content``; its kind is detected from the bytes.

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
        raise TokenizerError("JSON of an unknown kind: neither a tokenizer of psannlm nor of Hugging Face tokenizers")
    resolve_backend("tokenizers")
    from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(content)
