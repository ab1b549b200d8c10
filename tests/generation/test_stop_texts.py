"""Stop texts: any cutting into parts gives what one character at a time gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.generation.generate import generate
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.stop_texts import MAX_STOP_CHARACTERS, StopScanner, require_stop_texts
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

Build = Callable[..., Transformer]
Lead = Callable[[Engine, Callable[[int], int]], Any]
GREEDY = SamplingConfig(temperature=0.0)

texts = st.text(alphabet="abc", max_size=30)


def search(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop text that is complete first, found by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(parts=st.lists(texts, max_size=8), stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4))
@example(parts=["abc"], stops=["abc", "b"])
@example(parts=["ab", "abc"], stops=["abc"])
@example(parts=["aab"], stops=["ab", "b"])
def test_stop_scanner_matches_search_however_text_is_cut(parts: list[str], stops: list[str]) -> None:
    scanner = StopScanner(tuple(stops))
    returned = ""
    for part in parts:
        returned += scanner.add(part)
        if scanner.found is not None:
            break
    whole = "".join(parts)
    wanted, found = search(whole, stops)
    assert scanner.found == found
    if found is not None:
        assert returned == wanted
    else:
        assert whole.startswith(returned)
        # What is held back begins a stop text, and nothing longer than needed is held back.
        held = whole[len(returned) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (["a"] * 5, "5 stop texts are too many; give 4 at most"),
        ([""], "a stop text has 0 characters"),
        ("x" * (MAX_STOP_CHARACTERS + 1), "a stop text has 1,001 characters"),
        ([3], "stop text 3 is not a string"),
        (3, "stop 3 is not a string or a list"),
    ],
)
def test_stop_texts_invalid_raise(stop: Any, said: str) -> None:
    with pytest.raises(GenerationError, match=said):
        require_stop_texts(stop)
    assert require_stop_texts("ab") == ("ab",)


@pytest.mark.parametrize("speculate", [0, 4])
def test_generate_ends_before_stop_text_split_over_tokens(
    speculate: int, byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead
) -> None:
    """One token per byte: the stop text spans three tokens, half a character is among its ends."""
    engine = Engine(build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=200))
    content = "aXné€stop. Z"
    lead(engine, dict(pairwise([byte + 4 for byte in content.encode()])).__getitem__)
    pieces: list[str] = []
    (done,) = generate(
        engine,
        byte_tokenizer,
        ["a"],
        max_new_tokens=9,
        sampling=GREEDY,
        stop=["st", "é€s"],
        speculate=speculate,
        on_text=lambda _, text: pieces.append(text),
    )
    assert (done.text, done.finish_reason, done.stop_text) == ("Xn", "stop", "é€s")
    assert "".join(pieces) == "Xn"
    # Nothing is decoded after the token that completes the stop text.
    assert byte_tokenizer.decode(done.ids) == "Xné€s"


def test_generate_held_back_text_appears_without_stop(byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead) -> None:
    engine = Engine(build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=200))
    lead(engine, dict(pairwise([*(byte + 4 for byte in b"abcd"), byte_tokenizer.eos_id])).__getitem__)
    pieces: list[str] = []
    (done,) = generate(
        engine,
        byte_tokenizer,
        ["a"],
        sampling=GREEDY,
        stop="cde",
        on_text=lambda _, text: pieces.append(text),
    )
    assert (done.text, done.stop_text, pieces) == ("bcd", None, ["b", "cd"])


def test_generate_stop_keeps_rows_of_batch_equal(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=200)
    prompts = ["a", "the", "", "é"]
    settings = {"max_new_tokens": 40, "sampling": SamplingConfig(seed=3, top_p=None, min_p=0.02), "logprobs": 3}
    free = generate(model, byte_tokenizer, prompts, **settings)  # type: ignore[arg-type]
    stops = [free[1].text[9:11], free[3].text[20:22]]
    alone = [generate(model, byte_tokenizer, [prompt], stop=stops, **settings)[0] for prompt in prompts]  # type: ignore[arg-type]
    assert generate(model, byte_tokenizer, prompts, stop=stops, **settings) == alone  # type: ignore[arg-type]
    assert generate(model, byte_tokenizer, prompts, stop=stops, speculate=4, **settings) == alone  # type: ignore[arg-type]
    assert {done.stop_text for done in alone} >= {*stops}
    for whole, cut in zip(free, alone, strict=True):
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert cut.text == search(whole.text, stops)[0]
