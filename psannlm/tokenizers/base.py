"""Interface of all tokenizers, and checks of text and ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psannlm.errors import TokenizerError
from psannlm.io.atomic import write_bytes

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)
N_BYTES = 256
MIN_VOCAB_SIZE = N_BYTES + len(SPECIALS) + 1


class Tokenizer(ABC):
    """A lossless tokenizer: ``decode(encode(text)) == text`` for every string of Unicode scalar values.

    Text that spells a special (``</s>``) is encoded as ordinary text: no input can forge a control token.
    """

    backend: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without special tokens.

        Raises:
            TokenizerError: ``text`` holds a lone surrogate, which is not Unicode text.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text, encoded on the threads of the library.

        ``threads`` 0 leaves their number to the library; Hugging Face's takes none from a call, but obeys
        RAYON_NUM_THREADS (read once) and TOKENIZERS_PARALLELISM.

        Raises:
            TokenizerError: a text holds a lone surrogate.
        """

    def encode_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the concatenated ids of all texts, (n_tokens,), and the number of ids of each text, (n_texts,).

        Four bytes a token are held, where a list holds an object for each. ``threads`` as in ``encode_batch``.

        Raises:
            TokenizerError: a text holds a lone surrogate.
        """
        encoded = self.encode_batch(texts, threads)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special tokens have no text, and bytes that are not UTF-8 become U+FFFD."""

    def decode_batch(self, rows: Sequence[Sequence[int]], threads: int = 0) -> list[str]:
        """Return the text of each row, decoded on the threads of the library if it has any."""
        return [self.decode(ids) for ids in rows]

    @abstractmethod
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return a printable form of each id."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Return the content of the tokenizer file; ``resolve.tokenizer_from_bytes`` is the inverse."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which have no text."""
        return frozenset((self.pad_id, self.bos_id, self.eos_id, self.unk_id))

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes, used for characters without an id (byte fallback)."""
        return frozenset()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer file; equal tokenizers have equal fingerprints."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path | str) -> Path:
        """Write the tokenizer file atomically and return its path. Raises StorageError if it cannot be written."""
        path = Path(path)
        write_bytes(path, self.to_bytes())
        return path


def refuse_surrogates(text: str, name: str = "") -> None:
    """Raise TokenizerError for the first lone surrogate of ``text``, if there is one; ``name`` is that of the text."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = (
            f"{name}{': ' if name else ''}lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "not Unicode text; remove the character, or replace it by U+FFFD"
        )
        raise TokenizerError(message) from error


def refuse_surrogates_in(texts: Sequence[str]) -> None:
    """Raise TokenizerError, which names the index, for the first of ``texts`` with a lone surrogate."""
    for i, text in enumerate(texts):
        refuse_surrogates(text, f"text {i}")


def refuse_unknown_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise TokenizerError if an id is outside ``0 .. vocab_size - 1``."""
    if len(ids) and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        message = f"id {wrong} is outside the vocabulary 0 .. {vocab_size - 1}; use the tokenizer that made it"
        raise TokenizerError(message)


def plain_ids(ids: Sequence[int], vocab_size: int, specials: frozenset[int]) -> list[int]:
    """Return ``ids`` as a list of Python integers without ``specials``, as libraries decode them.

    Raises:
        TokenizerError: an id is outside the vocabulary.
    """
    refuse_unknown_ids(ids, vocab_size)
    whole = list(map(int, ids))
    return whole if specials.isdisjoint(whole) else [i for i in whole if i not in specials]


def printable(piece: str) -> str:
    """Return ``piece`` with invisible characters as escapes such as ``\\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in piece)
