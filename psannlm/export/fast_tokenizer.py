"""Tokenizers as the files of transformers' ``PreTrainedTokenizerFast``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from psannlm.errors import TokenizerError, install_extra
from psannlm.tokenizers.base import N_BYTES, SPECIALS, Tokenizer
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.huggingface import HuggingFaceTokenizer
from psannlm.tokenizers.sentencepiece import ESCAPES, SPACE_MARK, SentencePieceTokenizer

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Types of a piece in sentencepiece_model.proto, and model types.
_NORMAL, _CONTROL, _UNKNOWN, _BYTE = 1, 3, 2, 6
_UNIGRAM, _BPE = 1, 2


def fast_tokenizer_files(tokenizer: Tokenizer, max_seq_len: int | None) -> dict[str, bytes]:
    """Return the names and contents of the files that carry ``tokenizer`` to transformers.

    Encoding there adds the token that begins a text, as every training document begins with it, and never the one that
    ends it. Text that spells a special token is ordinary text.

    Raises:
        TokenizerError: the tokenizer has a setting that these files cannot express; the message names it.
    """
    if isinstance(tokenizer, CharTokenizer):
        fast, names = _from_characters(tokenizer), _fitted_names()
    elif isinstance(tokenizer, SentencePieceTokenizer):
        fast, names = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        fast, names = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode("utf-8")), tokenizer.special_names
        fast.no_truncation()
        fast.no_padding()
    else:
        raise TokenizerError(f"a tokenizer of the kind {tokenizer.backend!r} cannot be written as {TOKENIZER_FILE}")
    bos = names["bos"]
    fast.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": names["eos"],
        "pad_token": names["pad"],
        "unk_token": names["unk"],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if max_seq_len is not None:
        settings["model_max_length"] = max_seq_len
    return {
        TOKENIZER_FILE: (fast.to_str(pretty=True) + "\n").encode("utf-8"),
        TOKENIZER_CONFIG_FILE: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
    }


def _fitted_names() -> dict[str, str]:
    return dict(zip(("pad", "bos", "eos", "unk"), SPECIALS, strict=True))


def _with_specials(model: Any, names: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer of ``model``, in whose vocabulary ``names`` are, with these marked as special tokens."""
    fast = tokenizers.Tokenizer(model)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return fast


def _byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _from_characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """Return a BPE without merges: each character alone, as a token or as its bytes."""
    pieces = [*SPECIALS, *map(_byte_piece, range(N_BYTES)), *tokenizer.characters]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = _with_specials(models.BPE(vocab=vocab, merges=[], byte_fallback=True), SPECIALS)
    # Without words, a whole document would be one, and its length would matter more than once.
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,256}"), behavior="isolated")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return fast


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    proto = parsed_model(tokenizer.to_bytes())
    _refuse_settings(proto)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    names = {kind: pieces[getattr(tokenizer, f"{kind}_id")][0] for kind in ("pad", "bos", "eos", "unk")}
    specials = [piece for piece, _, kind in pieces if kind in (_CONTROL, _UNKNOWN)]
    if proto.trainer_spec.model_type == _BPE:
        model = _bpe(pieces)
        isolated: list[str] = []
    else:
        model, isolated = _unigram(pieces, tokenizer.unk_id)
    fast = _with_specials(model, specials)
    steps = [normalizers.Replace(text, escaped) for text, escaped in (ESCAPES if tokenizer.escapes else ())]
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    if isolated:
        pattern = "[" + "".join(f"\\x{{{ord(c):x}}}" for c in isolated) + "]"
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    undo = [decoders.Replace(escaped, text) for text, escaped in reversed(ESCAPES if tokenizer.escapes else ())]
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *undo]
    )
    return fast, names


def parsed_model(content: bytes) -> Any:
    """Return the protocol buffer of a SentencePiece model. Raises TokenizerError without the package protobuf."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise TokenizerError(
            f"reading a SentencePiece model's settings needs the package protobuf ({error}); {install_extra('hf')}"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    proto.ParseFromString(content)
    return proto


def _refuse_settings(proto: Any) -> None:
    """Raise TokenizerError for the first setting of a foreign SentencePiece model that is not carried over."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    for is_set, name in (
        (trainer.model_type not in (_UNIGRAM, _BPE), "the model type word or char"),
        (not trainer.byte_fallback, "no byte fallback: it loses characters"),
        (bool(normalizer.precompiled_charsmap), f"the normalization rule {normalizer.name}"),
        (normalizer.add_dummy_prefix, "add_dummy_prefix"),
        (normalizer.remove_extra_whitespaces, "remove_extra_whitespaces"),
        (not normalizer.escape_whitespaces, "unescaped white space"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
        (not kinds <= {_NORMAL, _CONTROL, _UNKNOWN, _BYTE}, "user-defined or unused pieces"),
    ):
        if is_set:
            raise TokenizerError(
                f"the SentencePiece tokenizer has {name}, which is not carried to {TOKENIZER_FILE}; fit a tokenizer "
                "with: psannlm tokenize"
            )


def _bpe(pieces: list[tuple[str, float, int]]) -> Any:
    """Return a BPE whose merges are ranked by the score of what they make, as SentencePiece merges.

    Only normal pieces are merged, so that no text becomes a special token or one that stands for a byte.
    """
    normal = {piece: (-score, i) for i, (piece, score, kind) in enumerate(pieces) if kind == _NORMAL}
    ranked = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [(left, right) for _, _, left, right in sorted(ranked)]
    return models.BPE(vocab=vocab, merges=merges, byte_fallback=True)


def _unigram(pieces: list[tuple[str, float, int]], unk_id: int) -> tuple[Any, list[str]]:
    """Return a unigram model, and characters that must be isolated before it.

    The library finds every entry in text, also ``<s>`` and ``<0x41>``, which SentencePiece never does. Such entries
    get a score below that of any other way to spell them. An unknown character scores lower still: where one occurs in
    them, it is isolated, which changes nothing else, because no piece holds it.

    Raises:
        TokenizerError: a character of these entries occurs in pieces and is not a piece itself.
    """
    normal = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    spelled = [piece for piece, _, kind in pieces if kind != _NORMAL]
    letters = set("".join(spelled))
    known = set("".join(normal))
    if partly := sorted(letters & known - normal.keys()):
        raise TokenizerError(
            f"the SentencePiece tokenizer has the character {partly[0]!r} in pieces only, which is not carried to "
            f"{TOKENIZER_FILE}; fit a tokenizer with: psannlm tokenize"
        )
    lowest = min([0.0, *normal.values()])
    forbidden = lowest * (1 + max(map(len, spelled), default=0)) - 1.0
    scored = [(piece, score if kind == _NORMAL else forbidden) for piece, score, kind in pieces]
    return models.Unigram(scored, unk_id=unk_id, byte_fallback=True), sorted(letters - known)
