"""SentencePiece tokenizers (arXiv 1808.06226); fitted ones are lossless."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from psannlm.errors import TokenizerError
from psannlm.tokenizers.base import (
    BOS,
    EOS,
    N_BYTES,
    PAD,
    SPECIALS,
    UNK,
    Tokenizer,
    plain_ids,
    printable,
    refuse_surrogates,
    refuse_surrogates_in,
    refuse_unknown_ids,
)
from psannlm.tokenizers.sample import PASSAGE_CHARS

# SentencePiece writes a space as ▁, so a ▁ in the text must be escaped, and so must the escape character. The
# private-use escape is always followed by 0 or 1 in escaped text, which makes decoding unambiguous.
SPACE_MARK = "\u2581"
_ESCAPE = "\uf8f0"
_ESCAPED_ESCAPE = _ESCAPE + "0"
_ESCAPED_MARK = _ESCAPE + "1"
# (character, its escape) in the order of escaping; it is undone in the opposite order.
ESCAPES = ((_ESCAPE, _ESCAPED_ESCAPE), (SPACE_MARK, _ESCAPED_MARK))

# The trainer drops sentences with NUL or ▅ (its own marker), so passages are cut there.
_CUTS = re.compile(r"[\0\u2585]+")

# Rounding of sums depends on the number of threads: a fixed number gives the same model everywhere.
_FIT_THREADS = 16
# The most frequent characters, up to this fraction of the text, get pieces of their own.
_COVERAGE = 0.9999


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: one fitted here (lossless), or any ``.model`` file, which encodes as its authors intend.

    Args:
        content: the bytes of a ``.model`` file. It must define the pieces for begin and end of text; padding may be
            absent, and the end is used instead.

    Attributes:
        escapes: whether text is escaped before it is encoded, as for every model fitted here.

    Raises:
        TokenizerError: ``content`` is not a SentencePiece model, or lacks a special.
    """

    backend = "sentencepiece"

    def __init__(self, content: bytes) -> None:
        sentencepiece.SetMinLogLevel(3)  # errors are raised; do not print them on stderr too
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.vocab_size()
        except (RuntimeError, OSError) as error:
            raise TokenizerError("not a SentencePiece model, or a damaged one") from error
        if not self.vocab_size or not _is_whole(content):
            raise TokenizerError("SentencePiece model that lacks a part: the file was cut short")
        self._content = content
        for special, i in ((BOS, self._model.bos_id()), (EOS, self._model.eos_id())):
            if i < 0:
                kind = "begins" if special == BOS else "ends"
                raise TokenizerError(
                    f"SentencePiece model without the piece that {kind} a text, such as {special}; "
                    "fit a tokenizer on the corpus, or use a model that defines it"
                )
        self.bos_id, self.eos_id, self.unk_id = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self._specials = self.special_ids
        # The surface of the unknown piece is never decoded: it stores the marker of models with escaping.
        self.escapes = self._model.decode([self.unk_id]) == _ESCAPE

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int, model_type: str = "unigram") -> SentencePieceTokenizer:
        """Fit a lossless model of at most ``vocab_size`` pieces; the same texts give the same bytes.

        A piece keeps to one script (the library's default), so none can mix the letters and brackets of a special.

        Args:
            texts: passages of at most ``sample.PASSAGE_CHARS`` characters.
            vocab_size: at least ``base.MIN_VOCAB_SIZE``.
            model_type: ``unigram`` or ``bpe``.
        """
        # A text of NUL characters leaves nothing to learn from: any one character will do, the rest are bytes.
        sentences = _sentences(texts, vocab_size) or [_ESCAPE]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=8 * PASSAGE_CHARS,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            unk_surface=_ESCAPE,
            num_threads=_FIT_THREADS,
            minloglevel=3,
        )
        return cls(model.getvalue())

    def to_bytes(self) -> bytes:
        return self._content

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._model.encode(_escape(text) if self.escapes else text)
        except (RuntimeError, TypeError, UnicodeError):
            refuse_surrogates(text)
            raise
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        try:
            ids: list[list[int]] = self._model.encode(self._prepared(texts), num_threads=threads or -1)
        except (RuntimeError, TypeError, UnicodeError):
            refuse_surrogates_in(texts)
            raise
        return ids

    def encode_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if not hasattr(self._model, "EncodeAsNumpy"):  # before version 0.2.2
            return super().encode_flat(texts, threads)
        try:
            found = self._model.encode(self._prepared(texts), out_type="numpy", num_threads=threads or -1)
        except (RuntimeError, TypeError, UnicodeError):
            refuse_surrogates_in(texts)
            raise
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return np.concatenate([np.zeros(0, dtype=np.int32), *found]), lengths

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        # A hot path for short texts (a million per second): isascii() is O(1).
        return [text if text.isascii() else _escape(text) for text in texts] if self.escapes else list(texts)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode(plain_ids(ids, self.vocab_size, self._specials))
        return _unescape(text) if self.escapes else text

    def decode_batch(self, rows: Sequence[Sequence[int]], threads: int = 0) -> list[str]:
        if not rows:  # the library rejects an empty list
            return []
        plain = [plain_ids(ids, self.vocab_size, self._specials) for ids in rows]
        texts: list[str] = self._model.decode(plain, num_threads=threads or -1)
        return [_unescape(text) for text in texts] if self.escapes else texts

    def score(self, ids: Sequence[int]) -> float | None:
        """Return the sum of the unigram log-probabilities of ``ids``; None for a BPE, or with a special among them."""
        if not self.is_unigram or any(self._model.is_control(int(i)) for i in ids):
            return None
        return sum(self._model.get_score(int(i)) for i in ids)

    @property
    def is_unigram(self) -> bool:
        """Whether pieces have log-probabilities; those of a BPE are whole numbers, the order of merges."""
        return any(self._model.get_score(i) % 1.0 for i in range(self.vocab_size))

    @property
    def byte_ids(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._model.is_byte(i))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        refuse_unknown_ids(ids, self.vocab_size)
        return [printable(self._model.id_to_piece(int(i))) for i in ids]


def _is_whole(content: bytes) -> bool:
    """Return whether a parsed model has pieces, trainer and normaliser settings (its fields 1 to 3, in this order).

    A protocol buffer says nowhere how long it is: cut after any piece, it still parses, as a model with fewer pieces.
    """
    at = 0
    fields = set()
    while at < len(content):
        tag, at = _varint(content, at)
        length, at = _varint(content, at)
        fields.add(tag >> 3)
        at += length
    return {1, 2, 3} <= fields


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content):
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            break
        shift += 7
    return value, at


def _escape(text: str) -> str:
    if _ESCAPE in text:
        text = text.replace(_ESCAPE, _ESCAPED_ESCAPE)
    if SPACE_MARK in text:
        text = text.replace(SPACE_MARK, _ESCAPED_MARK)
    return text


def _unescape(text: str) -> str:
    if _ESCAPE not in text:
        return text
    return text.replace(_ESCAPED_MARK, SPACE_MARK).replace(_ESCAPED_ESCAPE, _ESCAPE)


def _sentences(texts: Iterable[str], vocab_size: int) -> list[str]:
    """Return ``texts``, escaped and cut at characters that the trainer must not see, such as rare ones.

    Each character the trainer sees is given a piece, and it fails if they do not fit: at most half of the pieces that
    bytes and specials leave go to characters. The others are written as bytes.
    """
    escaped = [_escape(text) for text in texts]
    counts = Counter[str]()
    for text in escaped:
        counts.update(text)
    n_free = max(1, (vocab_size - N_BYTES - len(SPECIALS)) // 2)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    covered = accumulate(counts[c] for c in ranked)
    wanted = sum(so_far <= _COVERAGE * counts.total() for so_far in covered) + 1
    rare = dict.fromkeys(map(ord, ranked[min(n_free, wanted) :]), "\0")
    return [part for text in escaped for part in _CUTS.split(text.translate(rare)) if part.strip("\r\n\t")]
