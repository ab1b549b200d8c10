"""Incremental detokenization: parts join to the whole text for any tokens, in constant time per token."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import pytest
import sentencepiece

from psannlm.generation.detokenize import IncrementalDetokenizer
from psannlm.generation.row_text import continuation_text
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer, tokenizer_from_bytes

TEXT = (
    "The sine of a gate, über die Brücke; 漢字 and emoji 👩‍👩‍👧 stand here.\n\n\tTabs   and runs of spaces ▁ too. " * 20
)


def foreign() -> Tokenizer:
    """SentencePiece with its own defaults: a space before the text, which decoding takes off again."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=3,
    )
    return tokenizer_from_bytes(model.getvalue())


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers", "simple", "foreign"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return foreign() if request.param == "foreign" else fit_tokenizer([TEXT], request.param, 400)


def parts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], IncrementalDetokenizer]:
    stream = IncrementalDetokenizer(tokenizer)
    return [stream.add(token) for token in ids], stream


def test_detokenizer_parts_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT + "\uf8f0 private use")
    parts, stream = parts_of(tokenizer, ids)
    text = tokenizer.decode(ids)
    assert "".join(parts) == text
    assert stream.length == len(text)
    assert sum(map(bool, parts)) > len(ids) // 3


def test_detokenizer_parts_are_prefix_for_any_tokens(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    known = sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids)
    for _ in range(50):
        ids = draw.choices(known, k=60)
        parts, stream = parts_of(tokenizer, ids)
        text = tokenizer.decode(ids)
        assert text.startswith("".join(parts))
        assert stream.length == len("".join(parts))
        assert not text[stream.length :].strip("\ufffd\uf8f0")


def test_detokenizer_cost_per_token_is_constant(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    parts_of(tokenizer, tokenizer.encode(TEXT))
    assert max(decoded) < 40


@pytest.mark.parametrize("prompt", ["The sine", "über die", "", "Tabs   and "])
def test_detokenizer_prompt_and_parts_join_to_text(tokenizer: Tokenizer, prompt: str) -> None:
    """Also where the new text begins with a space: its token alone would lose it."""
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for following in (" of a gate", "  runs", " ", "漢字"):
        whole_ids = tokenizer.encode(prompt + following)
        ids = [*whole_ids[len(before) - 1 :]] if whole_ids[: len(before) - 1] == before[1:] else whole_ids
        stream = IncrementalDetokenizer(tokenizer, before)
        streamed = "".join(map(stream.add, ids))
        whole = tokenizer.decode([*before, *ids])
        text = continuation_text(tokenizer, before, ids)
        assert tokenizer.decode(before) + text == whole
        assert text.startswith(streamed)
        assert not text[len(streamed) :].strip("\ufffd\uf8f0")


def test_detokenizer_keeps_space_after_prompt_with_dummy_prefix() -> None:
    tokenizer = foreign()
    of_prompt, of_all = tokenizer.encode("The sine"), tokenizer.encode("The sine of")
    assert of_all[: len(of_prompt)] == of_prompt
    assert continuation_text(tokenizer, of_prompt, of_all[len(of_prompt) :]) == " of"
