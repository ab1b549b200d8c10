"""What followed the same words before, against a search of the whole text."""

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
def test_is_what_a_search_finds(parts: list[list[int]], n_tokens: int) -> None:
    lookup = PromptLookup(parts[0])
    text = list(parts[0])
    assert lookup.draft(n_tokens) == search(text, n_tokens)
    for part in parts[1:]:
        lookup.extend(part)
        text += part
        assert lookup.ids == text
        assert lookup.draft(n_tokens) == search(text, n_tokens)


def test_three_tokens_are_believed_before_two_and_the_newest_before_the_rest() -> None:
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(2) == [4, 9]
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3]).draft(2) == [5, 7]
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_what_never_stood_there_is_not_guessed_at() -> None:
    for text in ([], [1], [1, 1], [1, 2, 3, 4, 5], [3, 3, 4, 5, 3]):
        assert PromptLookup(text).draft(5) == []


def test_a_guess_ends_where_the_text_does() -> None:
    assert PromptLookup([7, 7, 7, 7]).draft(15) == [7]
    assert PromptLookup([1, 2, 1, 2]).draft(15) == [1, 2]
    lookup = PromptLookup([1, 2, 1, 2])
    lookup.draft(3).append(9)
    assert lookup.ids == [1, 2, 1, 2]
