from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.errors import CorpusError, TokenizerError
from psannlm.tokenizers.sample import PASSAGE_CHARS, passages, sample_passages


@given(text=st.text(st.sampled_from("ab \n"), max_size=300), limit=st.integers(1, 20))
def test_passages_are_short_and_make_up_the_text(text: str, limit: int) -> None:
    parts = list(passages(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)


def test_passages_end_before_white_space() -> None:
    assert list(passages("one two three", 9)) == ["one two", " three"]
    assert list(passages("one two\nthree", 11)) == ["one two", "\nthree"]
    assert list(passages("abcdefghij", 4)) == ["abcd", "efgh", "ij"]


def test_sample_of_small_corpus_is_the_whole(logged: pytest.LogCaptureFixture) -> None:
    texts = ["a" * (PASSAGE_CHARS + 1), "", "b"]
    assert sample_passages(iter(texts), 0) == ["a" * PASSAGE_CHARS, "a", "b"]
    assert not logged.messages


def test_a_large_corpus_is_sampled_in_order_by_seed(logged: pytest.LogCaptureFixture) -> None:
    texts = [f"{i:04d}" for i in range(1000)]
    some = sample_passages(texts, 1, budget=400)
    assert len(some) == 100
    assert some == sorted(set(some))
    assert logged.messages == ["the tokenizer is fitted on a random sample of 400 of the corpus's 4,000 characters"]
    assert some == sample_passages(texts, 1, budget=400)
    assert some != sample_passages(texts, 2, budget=400)
    # Uniform: each quarter of the corpus has its share (25 of 100; 8 is more than four standard deviations away).
    assert all(8 < sum(start <= int(t) < start + 250 for t in some) < 42 for start in range(0, 1000, 250))


def test_passages_of_all_lengths_and_places_have_one_chance() -> None:
    # Long ones first: where room that a long passage left behind is given to later ones, the end is drawn from more.
    texts = ["L" * 40 if i % 2 else "s" for i in range(400)] + ["e" for _ in range(200)]
    n_kept = dict.fromkeys("Lse", 0)
    for seed in range(60):
        for passage in sample_passages(texts, seed, budget=820):
            n_kept[passage[0]] += 1
    # A tenth of 200 each, 60 times; 120 is more than three standard deviations.
    assert all(1080 < kept < 1320 for kept in n_kept.values()), n_kept


@pytest.mark.parametrize(
    ("texts", "found"), [([], "no text"), (["", ""], "no text"), ([" \n", "\t\r\n"], "only white space")]
)
def test_an_empty_or_blank_corpus_is_an_error(texts: list[str], found: str) -> None:
    with pytest.raises(CorpusError, match=f"the corpus holds {found}. Check the configured sources"):
        sample_passages(texts, 0)


def test_one_string_is_one_text() -> None:
    assert sample_passages("word", 0) == ["word"]


def test_a_lone_surrogate_is_refused_by_number() -> None:
    with pytest.raises(TokenizerError, match="text 1: lone surrogate"):
        sample_passages(["a", "\ud800"], 0)
