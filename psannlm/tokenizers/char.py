"""Character tokenizer without a library: frequent characters have an id each, all others are UTF-8 bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.errors import TokenizerError
from psannlm.tokenizers.base import (
    N_BYTES,
    SPECIALS,
    Tokenizer,
    printable,
    refuse_surrogates,
    refuse_surrogates_in,
    refuse_unknown_ids,
)

FORMAT = "psannlm-char"
VERSION = 1

_FIRST_BYTE = len(SPECIALS)
_FIRST_CHARACTER = _FIRST_BYTE + N_BYTES
_N_CODE_POINTS = 0x110000
_SURROGATES = range(0xD800, 0xE000)


class CharTokenizer(Tokenizer):
    """Ids: 0 to 3 the specials, then the 256 bytes, then ``characters`` (an ASCII character is its own byte).

    Args:
        characters: distinct characters outside ASCII that get an id of their own, the most frequent first.
    """

    backend = "simple"

    def __init__(self, characters: str) -> None:
        refuse_surrogates(characters)
        if len(set(characters)) < len(characters) or any(ord(c) < 128 for c in characters):
            raise TokenizerError("characters of the vocabulary must be distinct and outside ASCII")
        self.characters = characters
        self.vocab_size = _FIRST_CHARACTER + len(characters)
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = range(len(SPECIALS))
        self._id_of = np.zeros(_N_CODE_POINTS, dtype=np.int32)  # 0: the character has no id
        self._id_of[:128] = np.arange(_FIRST_BYTE, _FIRST_BYTE + 128)
        self._id_of[_code_points(characters)] = np.arange(_FIRST_CHARACTER, self.vocab_size)
        self._bytes_of = [b""] * _FIRST_BYTE + [bytes([b]) for b in range(N_BYTES)] + [c.encode() for c in characters]

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int) -> CharTokenizer:
        """Assign ids to the most frequent characters (ties: lower code point first), up to ``vocab_size`` in total."""
        counts = np.zeros(_N_CODE_POINTS, dtype=np.int64)
        for text in texts:
            code_points, times = np.unique(_code_points(text), return_counts=True)
            counts[code_points] += times
        counts[:128] = 0
        found = np.flatnonzero(counts)
        order = found[np.argsort(-counts[found], kind="stable")]
        return cls("".join(map(chr, order[: max(0, vocab_size - _FIRST_CHARACTER)].tolist())))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CharTokenizer:
        """Return the tokenizer of parsed JSON. Raises TokenizerError for another version or a damaged vocabulary."""
        if data.get("version") != VERSION:
            message = f"character tokenizer of version {data.get('version')!r}; this psannlm reads version {VERSION}"
            raise TokenizerError(message)
        characters = data.get("characters")
        if not isinstance(characters, str):
            raise TokenizerError("damaged character tokenizer: 'characters' is not a string")
        return cls(characters)

    def to_bytes(self) -> bytes:
        data = {"format": FORMAT, "version": VERSION, "characters": self.characters}
        return json.dumps(data, ensure_ascii=True, indent=1).encode("ascii")

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        ids: list[int] = self._encode_joined(text)[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        ids, lengths = self.encode_flat(texts, threads)
        flat: list[int] = ids.tolist()
        return [flat[start:end] for start, end in pairwise(accumulate(lengths.tolist(), initial=0))]

    def encode_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        # One pass over all texts at once: NumPy's cost per call would outweigh the work on short texts.
        joined = "".join(texts)
        try:
            ids, starts = self._encode_joined(joined)
        except UnicodeEncodeError:
            refuse_surrogates_in(texts)
            raise
        return ids, np.diff(starts[list(accumulate(map(len, texts), initial=0))])

    def _encode_joined(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids, and the start of the ids of each character and of the end."""
        code_points = _code_points(text)
        own = self._id_of[code_points]
        unseen = np.flatnonzero(own == 0)
        starts = np.arange(len(code_points) + 1, dtype=np.int64)
        if not len(unseen):
            return own, starts
        wide = code_points[unseen]
        extra = 1 + (wide >= 0x800).astype(np.int64) + (wide >= 0x10000)  # an unseen character takes 2 to 4 bytes
        widths = np.ones(len(code_points), dtype=np.int64)
        widths[unseen] += extra
        np.cumsum(widths, out=starts[1:])
        ids = np.empty(int(starts[-1]), dtype=np.int32)
        ids[starts[:-1]] = own
        for n_more in (1, 2, 3):
            these = extra == n_more
            at, values = starts[unseen[these]], wide[these].astype(np.int32)
            lead = 0xFF00 >> (n_more + 1) & 0xFF  # 110....., 1110...., 11110...
            ids[at] = _FIRST_BYTE + (lead | values >> 6 * n_more)
            for i in range(1, n_more + 1):
                ids[at + i] = _FIRST_BYTE + (0x80 | values >> 6 * (n_more - i) & 0x3F)
        return ids, starts

    def decode(self, ids: Sequence[int]) -> str:
        refuse_unknown_ids(ids, self.vocab_size)
        return b"".join(map(self._bytes_of.__getitem__, ids)).decode("utf-8", errors="replace")

    @property
    def byte_ids(self) -> frozenset[int]:
        return frozenset(range(_FIRST_BYTE + 0x80, _FIRST_CHARACTER))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        refuse_unknown_ids(ids, self.vocab_size)
        return [self._piece(i) for i in ids]

    def _piece(self, i: int) -> str:
        if i < _FIRST_BYTE:
            return SPECIALS[i]
        if i >= _FIRST_CHARACTER:
            return printable(self.characters[i - _FIRST_CHARACTER])
        byte = i - _FIRST_BYTE
        return chr(byte) if 0x20 < byte < 0x7F else "▁" if byte == 0x20 else f"<0x{byte:02X}>"


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
