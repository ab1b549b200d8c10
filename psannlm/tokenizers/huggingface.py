"""Tokenizers of the Hugging Face library ``tokenizers``; fitted ones are byte-level BPE (arXiv 1508.07909)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from psannlm.errors import TokenizerError
from psannlm.io.limits import MAX_VOCAB_SIZE
from psannlm.tokenizers.base import (
    SPECIALS,
    Tokenizer,
    plain_ids,
    printable,
    refuse_surrogates,
    refuse_surrogates_in,
    refuse_unknown_ids,
)

# Spellings of special tokens in well-known tokenizers, the most common first.
_SPELLINGS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
}

# Spelling of a byte in models with byte fallback; byte-level models have a letter for each byte.
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``: fitted here (lossless), or any other such file, which encodes as its authors intend.

    Args:
        content: the bytes of the file. Begin and end of text must be among its added tokens (one token such as
            ``<|endoftext|>`` may serve as both); padding and unknown may be absent: the end is used instead.

    Raises:
        TokenizerError: ``content`` is not a tokenizer of this kind, or lacks a special.
    """

    backend = "tokenizers"

    def __init__(self, content: bytes) -> None:
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TokenizerError("not a tokenizer.json, or a damaged one") from error
        if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
            raise TokenizerError("not a tokenizer.json: it has no 'model'")
        self._content = content
        try:
            self._names = _find_specials(data)
            shielded = _shielded(data, [name for name, _ in self._names.values()])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TokenizerError("damaged tokenizer.json: its added tokens or vocabulary have another shape") from error
        self.bos_id, self.eos_id = self._names["bos"][1], self._names["eos"][1]
        self.pad_id, self.unk_id = self._names["pad"][1], self._names["unk"][1]
        self._specials = self.special_ids
        self._spelling = {i: name for name, i in self._names.values()}
        self._model = _build(json.dumps(shielded))
        # Otherwise text that spells an added special token would get the id of that token.
        self._model.encode_special_tokens = True
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"tokenizer.json with the id {self.vocab_size - 1:,}: a vocabulary has at most {MAX_VOCAB_SIZE:,} ids"
            )

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
        """Fit a lossless byte-level BPE of at most ``vocab_size`` entries; the same texts give the same bytes.

        The words of GPT-2's pattern hold letters, digits or punctuation but no mixture, so no merge spells a special.
        """
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model.to_str().encode("utf-8"))

    def to_bytes(self) -> bytes:
        return self._content

    @property
    def special_names(self) -> dict[str, str]:
        """Spelling of ``pad``, ``bos``, ``eos`` and ``unk`` in the file."""
        return {special: name for special, (name, _) in self._names.items()}

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            refuse_surrogates(text)
            raise
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        try:
            found = self._model.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeError):
            refuse_surrogates_in(texts)
            raise
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode(plain_ids(ids, self.vocab_size, self._specials), skip_special_tokens=True)
        return text

    def decode_batch(self, rows: Sequence[Sequence[int]], threads: int = 0) -> list[str]:
        plain = [plain_ids(ids, self.vocab_size, self._specials) for ids in rows]
        texts: list[str] = self._model.decode_batch(plain, skip_special_tokens=True)
        return texts

    @property
    def byte_ids(self) -> frozenset[int]:
        return frozenset(
            i
            for piece, i in self._model.get_vocab(with_added_tokens=False).items()
            if _BYTE_PIECE.fullmatch(piece) or (len(piece) == 1 and self._model.decode([i]) == "\ufffd" != piece)
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        refuse_unknown_ids(ids, self.vocab_size)
        return [printable(self._spelling.get(i) or self._model.id_to_token(int(i)) or f"<{i}>") for i in ids]


def _find_specials(data: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Return spelling and id of each special among the added tokens of ``data``."""
    added = {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
    found: dict[str, tuple[str, int]] = {}
    for special, spellings in _SPELLINGS.items():
        for spelling in spellings:
            if spelling in added:
                found[special] = (spelling, added[spelling])
                break
    for special, does in (("bos", "begins"), ("eos", "ends")):
        if special not in found:
            known = ", ".join(_SPELLINGS[special])
            raise TokenizerError(f"tokenizer.json without an added token that {does} a text (one of {known})")
    return {"pad": found["eos"], "unk": found["eos"], **found}


def _shielded(data: dict[str, Any], specials: list[str]) -> dict[str, Any]:
    """Return ``data`` with special tokens under names that cannot occur in text, and without post-processing of ids.

    A unigram or word model lists its specials like any other entry and would find them in text. White space and NUL
    together are in no word of a pre-tokenizer, so an entry of that name is never found.
    """
    shield = {spelling: f"\0 {spelling} \0" for spelling in specials}
    model = dict(data["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {shield.get(piece, piece): i for piece, i in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[shield.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in shield]
    if model.get("unk_token") in shield:
        model["unk_token"] = shield[model["unk_token"]]
    if "dropout" in model:
        model["dropout"] = None
    added = [
        {**token, "content": shield[token["content"]], "special": True} if token["content"] in shield else token
        for token in data["added_tokens"]
    ]
    return {**data, "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)


def _build(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library's Rust code raises Exception itself, and no subclass of it
        reason = " ".join(str(error).split())
        raise TokenizerError(f"not a tokenizer.json that the tokenizers library can read: {reason}") from error
