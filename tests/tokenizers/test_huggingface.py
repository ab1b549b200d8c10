from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from psannlm.errors import TokenizerError
from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

PROSE = ["The quick brown fox jumps over the lazy dog.\n" * 40]


def unigram(**change: Any) -> bytes:
    """A tokenizer whose model lists its specials as plain entries, as converted SentencePiece models do."""
    letters = sorted(set("<>/|spadunkthefoxbc▁"))
    vocab = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -1.0), *((c, -5.0) for c in letters)]
    model = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    model.enable_truncation(3)
    model.enable_padding(pad_id=0, pad_token="<pad>")
    return json.dumps({**json.loads(model.to_str()), **change}).encode()


def bpe(tokens: list[dict[str, Any]]) -> bytes:
    """A BPE without pre-tokenizer whose merges spell </s>."""
    vocab = {c: i for i, c in enumerate(["</s>", "<s>", "<", "/", "s", ">", "</", "</s", "<s"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("<", "s"), ("<s", ">")]
    data = json.loads(tokenizers.Tokenizer(models.BPE(vocab, merges)).to_str())
    return json.dumps({**data, "added_tokens": tokens}).encode()


def added(content: str, i: int, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **flags}


def test_hf_unigram_file_adds_no_special_or_padding() -> None:
    tokenizer = HuggingFaceTokenizer(unigram())
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    ids = tokenizer.encode("the </s>the<s> <pad> the")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "the </s>the<s> <pad> the"
    assert tokenizer.encode_batch(["the", "the </s>the<s> <pad> the"]) == [[4], ids]
    assert tokenizer.pieces([1, 4, 2]) == ["<s>", "▁the", "</s>"]
    assert tokenizer.decode([1, 4, 2, 0]) == "the"
    assert tokenizer.encode("é")[-1] == tokenizer.unk_id


@pytest.mark.parametrize("special", [True, False])
def test_hf_bpe_file_text_never_becomes_special(special: bool) -> None:
    tokenizer = HuggingFaceTokenizer(bpe([added("</s>", 0, special), added("<s>", 1, special)]))
    ids = tokenizer.encode("</s><s>")
    assert {0, 1}.isdisjoint(ids)
    assert tokenizer.pieces(ids) == ["</s", ">", "<s", ">"]
    assert tokenizer.decode([0, *ids, 1]).replace(" ", "") == "</s><s>"


def test_one_token_may_begin_and_end_a_text() -> None:
    data = json.loads(HuggingFaceTokenizer.fit(PROSE, 300).to_bytes())
    size = len(data["model"]["vocab"])
    data["added_tokens"] = [added("<|endoftext|>", size)]
    tokenizer = HuggingFaceTokenizer(json.dumps(data).encode())
    assert tokenizer.special_ids == {size}
    assert tokenizer.vocab_size == size + 1
    assert size not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([size, *tokenizer.encode("<|endoftext|>")]) == "<|endoftext|>"


@pytest.mark.parametrize(("kept", "message"), [("</s>", "begins a text"), ("<s>", "ends a text")])
def test_a_missing_special_is_named(kept: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        HuggingFaceTokenizer(bpe([added(kept, 0)]))


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"\xff{}",
        b'{"model": 3}',
        unigram(added_tokens=3),
        unigram(added_tokens=[{"content": "<s>"}]),
        unigram(model={"type": "Unknown"}),
        unigram(model={"type": "Unigram", "vocab": [1]}),
        b"[" * 100_000,
    ],
)
def test_damage_is_one_line(content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        HuggingFaceTokenizer(content)
    assert "\n" not in str(caught.value)


def test_the_file_is_one_that_the_library_reads() -> None:
    tokenizer = HuggingFaceTokenizer.fit(PROSE, 300)
    raw = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
    assert [raw.token_to_id(name) for name in ("<pad>", "<s>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert raw.encode("the lazy\n  fox", add_special_tokens=False).ids == tokenizer.encode("the lazy\n  fox")
