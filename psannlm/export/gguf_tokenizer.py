"""Tokenizers as the fields of a GGUF file: byte-level BPE and SentencePiece's BPE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from psannlm.errors import TokenizerError
from psannlm.export.fast_tokenizer import parsed_model
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.huggingface import HuggingFaceTokenizer
from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

# Types of a token, as llama.cpp numbers them; those of SentencePiece's pieces are the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_BPE = 2
_INSTEAD = "export it with --format hf, or train with a byte-level BPE (psannlm tokenize --backend tokenizers)"
# GPT-2's words, in the form of ByteLevel and in the forms that well-known tokenizer files have.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@dataclass(frozen=True)
class GgufTokenizer:
    """Fields by the names of the gguf package's ``add_`` methods, and what differs in use, one sentence each."""

    fields: dict[str, Any]
    notices: tuple[str, ...] = ()


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> GgufTokenizer:
    """Return the fields that describe ``tokenizer``; ids up to the model's ``vocab_size`` are filled with unused ones.

    Raises:
        TokenizerError: GGUF has no such tokenizer; the message names the part.
    """
    notices: tuple[str, ...] = ()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        fields = _byte_level(tokenizer, vocab_size)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        fields, notices = _sentencepiece(tokenizer, vocab_size)
    else:
        raise TokenizerError(f"GGUF has no tokenizer of the kind {tokenizer.backend!r}; {_INSTEAD}")
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        # Every document of the training text begins with it.
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    return GgufTokenizer({**fields, **ids}, notices)


def _filled(tokens: list[str], types: list[int], vocab_size: int) -> None:
    for i in range(len(tokens), vocab_size):
        tokens.append(f"<unused {i}>")
        types.append(_UNUSED)


def _byte_level(tokenizer: HuggingFaceTokenizer, vocab_size: int) -> dict[str, Any]:
    data = json.loads(tokenizer.to_bytes())
    model = data["model"]
    before = data.get("pre_tokenizer") or {}
    for is_other, name in (
        (model.get("type", "BPE") != "BPE", f"a model of the type {model.get('type')!r:.40}"),
        (bool(model.get("byte_fallback")), "byte fallback instead of byte-level letters"),
        (bool(model.get("ignore_merges")), "ignore_merges"),
        (bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")), "affixes of words"),
        (data.get("normalizer") is not None, "a normalizer"),
        ({key: before.get(key) for key in _BYTE_LEVEL} != _BYTE_LEVEL, "other words than GPT-2's"),
    ):
        if is_other:
            raise TokenizerError(f"the tokenizer has {name}, which GGUF is not written with; {_INSTEAD}")
    pieces = {i: piece for piece, i in model["vocab"].items()}
    added = {int(token["id"]): str(token["content"]) for token in data.get("added_tokens") or []}
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        piece = added.get(i, pieces.get(i))
        tokens.append(f"<unused {i}>" if piece is None else piece)
        types.append(_CONTROL if i in added else _UNUSED if piece is None else _NORMAL)
    _filled(tokens, types, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer_model": "gpt2",
        # llama.cpp selects the pattern of words by name; a fitted vocabulary is in none of its lists.
        "tokenizer_pre": "gpt-2",
        "token_list": tokens,
        "token_types": types,
        "token_merges": merges,
    }


def _sentencepiece(tokenizer: SentencePieceTokenizer, vocab_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    proto = parsed_model(tokenizer.to_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for is_other, name in (
        (trainer.model_type != _BPE, "a unigram model, whose bytes of rare characters GGUF would lose"),
        (not trainer.byte_fallback, "no byte fallback: it loses characters"),
        (bool(normalizer.precompiled_charsmap), f"the normalization rule {normalizer.name}"),
        (normalizer.add_dummy_prefix, "add_dummy_prefix"),
        (normalizer.remove_extra_whitespaces, "remove_extra_whitespaces"),
        (not normalizer.escape_whitespaces, "unescaped white space"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
    ):
        if is_other:
            remedy = f"fit one with psannlm tokenize --model-type bpe, or {_INSTEAD}"
            raise TokenizerError(f"the SentencePiece tokenizer has {name}; {remedy}")
    tokens = [piece.piece for piece in proto.pieces]
    types = [int(piece.type) for piece in proto.pieces]
    scores = [float(piece.score) for piece in proto.pieces]
    _filled(tokens, types, vocab_size)
    scores += [0.0] * (len(tokens) - len(scores))
    notice = "llama.cpp reads the character U+2581 in a text as a space, and does not undo psannlm's escape U+F8F0"
    fields = {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_scores": scores,
        "token_types": types,
        "unk_token_id": tokenizer.unk_id,
    }
    return fields, (notice,)
