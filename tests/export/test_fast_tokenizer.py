"""Tokenizers under transformers: the same ids and the same text, and what cannot be carried is named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from psannlm.data.corpus.documents import builtin_documents
from psannlm.errors import TokenizerError
from psannlm.export.fast_tokenizer import fast_tokenizer_files
from psannlm.export.held_out import random_texts
from psannlm.export.verify import _is_segmentation_tie
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer, tokenizer_from_bytes

transformers = pytest.importorskip("transformers")

KINDS = ["char", "unigram", "bpe", "byte-level"]
SPELLED = ["<s>", "</s>", "a<pad>b", "<unk> <s></s>", "<0x41>", "\u2581", "\uf8f00\uf8f01", "a  b   ", "\r\n\0", ""]


@pytest.fixture
def fast(tmp_path: Path) -> Callable[[Tokenizer], Any]:
    """Return a loader by ``AutoTokenizer`` of what is written for a tokenizer."""

    def load(tokenizer: Tokenizer) -> Any:
        for name, content in fast_tokenizer_files(tokenizer, 64).items():
            (tmp_path / name).write_bytes(content)
        # The class of the model must not choose another class of tokenizer.
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return transformers.AutoTokenizer.from_pretrained(tmp_path)

    return load


def differences(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> list[str]:
    """Return the texts with other ids, but for ties, or with another text of the ids."""
    found = theirs(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [
        text
        for text, ids in zip(texts, found, strict=True)
        if theirs.decode(ids) != ours.decode(ours.encode(text))
        or (ids != ours.encode(text) and not _is_segmentation_tie(ours, ours.encode(text), ids))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_agree_with_transformers(
    fitted: Callable[[str], Tokenizer], fast: Callable[[Tokenizer], Any], tiny_texts: list[str], kind: str
) -> None:
    ours = fitted(kind)
    theirs = fast(ours)
    assert differences(ours, theirs, [*SPELLED, *tiny_texts, *random_texts(1000)]) == []
    specials = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id)
    assert specials == (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_agree_on_a_corpus_and_ten_thousand_strings(fast: Callable[[Tokenizer], Any], kind: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "char": {"backend": "simple"},
        "unigram": {"backend": "sentencepiece"},
        "bpe": {"backend": "sentencepiece", "model_type": "bpe"},
        "byte-level": {"backend": "tokenizers"},
    }
    texts = [document.text for document in builtin_documents()]
    ours = fit_tokenizer(texts[: len(texts) // 2], vocab_size=2048, **settings[kind])
    passages = [text[start : start + 2048] for text in texts for start in range(0, len(text), 2048)]
    assert differences(ours, fast(ours), [*passages, *random_texts()]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_begins_a_text_and_forges_no_special(
    fitted: Callable[[str], Tokenizer], fast: Callable[[Tokenizer], Any], kind: str
) -> None:
    ours = fitted(kind)
    theirs = fast(ours)
    assert theirs("tide")["input_ids"] == [ours.bos_id, *ours.encode("tide")]
    assert ours.special_ids.isdisjoint(theirs("</s><pad><unk><s>")["input_ids"][1:])
    both = theirs(["tide", "a much longer text"], padding=True)
    assert both["input_ids"][0][0] == ours.pad_id, "padded on the left"
    assert theirs.decode(both["input_ids"][0], skip_special_tokens=True) == "tide"


def test_unigram_with_unknown_brackets_forges_no_special(fast: Callable[[Tokenizer], Any]) -> None:
    """A vocabulary without < scores the pieces of specials above the unknown characters that spell them."""
    ours = fit_tokenizer(["only letters of this text, and no others"] * 20, "sentencepiece", vocab_size=280)
    assert differences(ours, fast(ours), [*SPELLED, "x<s>y</s><<<0x41>>", *random_texts(500)]) == []


def test_only_equal_scores_are_a_tie(fitted: Callable[[str], Tokenizer]) -> None:
    ours = fitted("unigram")
    ids = ours.encode("the tide")
    assert _is_segmentation_tie(ours, ids, ids[::-1])
    assert not _is_segmentation_tie(ours, ids, [*ids, ids[0]])
    assert not _is_segmentation_tie(fitted("bpe"), fitted("bpe").encode("ab"), fitted("bpe").encode("ba"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization rule nmt_nfkc"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"user_defined_symbols": ["<tool>"]}, "user-defined"),
        ({"model_type": "char"}, "model type"),
    ],
)
def test_a_foreign_setting_is_refused_by_name(tiny_texts: list[str], setting: dict[str, Any], message: str) -> None:
    model = io.BytesIO()
    fitted_here = {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        minloglevel=3,
        pad_id=3,
        **{**fitted_here, **setting},
    )
    with pytest.raises(TokenizerError, match=message):
        fast_tokenizer_files(tokenizer_from_bytes(model.getvalue()), 64)
