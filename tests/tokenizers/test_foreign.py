"""Tokenizer files of other tools give the ids of their own library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from psannlm.errors import TokenizerError
from psannlm.tokenizers.resolve import load_tokenizer

PROSE = ["The quick brown fox jumps over the lazy dog, and then the dog sleeps.", "Où est l'été? Ça va."] * 40
TEXTS = [
    "",
    "the fox  sleeps",
    " leading and trailing ",
    "tabs\tand\nnewlines\r\n",
    "été 日本語 👩‍👩‍👧",
    "x" * 300,
    "The quick (brown) fox, 1234!",
]


def sentencepiece_file(model_type: str, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE),
        model_writer=model,
        model_type=model_type,
        vocab_size=400 if options.get("byte_fallback") else 60,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_id": 3},
        {"user_defined_symbols": ["<sep>", "brown"]},
        {"unk_id": 3, "pad_id": 0, "bos_id": 1, "eos_id": 2},
    ],
    ids=["plain", "pad", "symbols", "ours"],
)
def test_sentencepiece_files(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    if model_type in ("unigram", "bpe") and "pad_id" in options:
        options = {**options, "byte_fallback": True}
    path = tmp_path / "m.model"
    path.write_bytes(sentencepiece_file(model_type, **options))
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, "a <sep> b brown"]
    assert tokenizer.encode_batch(texts) == raw.encode(texts) == [tokenizer.encode(text) for text in texts]
    pad_id = raw.pad_id() if raw.pad_id() >= 0 else raw.eos_id()
    specials = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    assert specials == (pad_id, raw.bos_id(), raw.eos_id(), raw.unk_id())
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"
    for spelled in ("<s>", "</s>", "<pad>"):
        assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(tokenizer.encode(spelled))


def gpt2_like() -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"],
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator(PROSE, trainer)
    return model


def llama_like() -> tokenizers.Tokenizer:
    specials = ["<unk>", "<s>", "</s>"]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*specials, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    model.train_from_iterator(PROSE, trainer)
    data = json.loads(model.to_str())
    # Bytes are entries of the vocabulary there, not added tokens, which would be cut out of text.
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    model = tokenizers.Tokenizer.from_str(json.dumps(data))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return model


def unigram() -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(PROSE, trainer)
    return model


def wordpiece(specials: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=list(specials), show_progress=False)
    model.train_from_iterator(PROSE, trainer)
    return model


@pytest.mark.parametrize(
    ("make", "specials"),
    [
        (gpt2_like, ("<|endoftext|>",) * 4),
        (llama_like, ("</s>", "<s>", "</s>", "<unk>")),
        (unigram, ("<pad>", "<s>", "</s>", "<unk>")),
        (wordpiece, ("[PAD]", "[CLS]", "[SEP]", "[UNK]")),
    ],
)
def test_hugging_face_files(
    make: Callable[[], tokenizers.Tokenizer], specials: tuple[str, ...], tmp_path: Path
) -> None:
    raw = make()
    path = tmp_path / "tokenizer.json"
    raw.save(str(path))
    tokenizer = load_tokenizer(path)
    expected = [raw.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == expected == [tokenizer.encode(text) for text in TEXTS]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == tuple(
        map(raw.token_to_id, specials)
    )
    assert tokenizer.vocab_size == raw.get_vocab_size()
    assert tokenizer.decode_batch(expected) == [raw.decode(ids) for ids in expected]
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"
    for spelled in set(specials):
        ids = tokenizer.encode(f"a {spelled} b")
        assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(ids), "text forges no special"


def test_bytes_of_a_llama_like_file_are_known(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    llama_like().save(str(path))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("日")[-3:]
    assert tokenizer.pieces(ids) == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.byte_ids.issuperset(ids)
    assert len(tokenizer.byte_ids) == 256


def test_tokenizer_file_without_bos_or_eos_raises(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    wordpiece(("[PAD]", "[UNK]", "[CLS]")).save(str(path))
    with pytest.raises(TokenizerError, match=r"without an added token that ends a text \(one of .*\[SEP\]"):
        load_tokenizer(path)
