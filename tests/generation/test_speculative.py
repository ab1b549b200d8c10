"""Prompt lookup against a brute-force search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psannlm.generation.speculative import PromptLookup

ids = st.lists(st.integers(0, 3), max_size=30)


def search(text: list[int], n_tokens: int) -> list[int]:
    """What followed the last three tokens when they last stood together before, else the last two."""
    for length in (3, 2):
        run = text[-length:]
        for end in range(len(text) - 1, length - 1, -1):
            if len(run) == length and text[end - length : end] == run:
                return text[end : end + n_tokens]
    return []


@given(parts=st.lists(ids, min_size=1, max_size=5), n_tokens=st.integers(1, 15))
def test_prompt_lookup_matches_brute_force_search(parts: list[list[int]], n_tokens: int) -> None:
    lookup = PromptLookup(parts[0])
    text = list(parts[0])
    assert lookup.draft(n_tokens) == search(text, n_tokens)
    for part in parts[1:]:
        lookup.extend(part)
        text += part
        assert lookup.ids == text
        assert lookup.draft(n_tokens) == search(text, n_tokens)


def test_prompt_lookup_prefers_longer_then_newer_match() -> None:
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(2) == [4, 9]
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3]).draft(2) == [5, 7]
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_prompt_lookup_unknown_ngram_gives_no_draft() -> None:
    for text in ([], [1], [1, 1], [1, 2, 3, 4, 5], [3, 3, 4, 5, 3]):
        assert PromptLookup(text).draft(5) == []


def test_prompt_lookup_draft_ends_with_the_text() -> None:
    assert PromptLookup([7, 7, 7, 7]).draft(15) == [7]
    assert PromptLookup([1, 2, 1, 2]).draft(15) == [1, 2]
    lookup = PromptLookup([1, 2, 1, 2])
    lookup.draft(3).append(9)
    assert lookup.ids == [1, 2, 1, 2]
