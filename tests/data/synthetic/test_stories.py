"""The story corpus: seeds, size and grammar."""

from __future__ import annotations

import re

import pytest

from psannlm.data.synthetic.stories import write_books


@pytest.mark.parametrize("n_bytes", [1, 300, 5_000, 20_000, 20_001])
def test_the_size_is_kept_and_no_sentence_is_cut(n_bytes: int) -> None:
    text = "".join(write_books(1, n_bytes))
    assert len(text.encode("ascii")) <= n_bytes
    if n_bytes >= 5_000:
        assert len(text) > n_bytes - 300
    assert not text or re.search(r"[.]\n$", text)


def test_stories_are_seeded_and_extend_shorter_corpora() -> None:
    assert list(write_books(1, 30_000)) == list(write_books(1, 30_000))
    assert list(write_books(1, 30_000)) != list(write_books(2, 30_000))
    assert list(write_books(1, 30_000))[:-1] == list(write_books(1, 90_000))[: len(list(write_books(1, 30_000))) - 1]


def test_the_end_of_a_book_follows_from_its_beginning() -> None:
    """Trade, home, colour and number of each person in the first chapter are repeated in the last."""
    for book in list(write_books(3, 40_000))[:-1]:
        first = re.findall(r"(\w+) is a (\w+) and lives by the ([\w ]+)\. (?:He|She) has (\w+) (\w+) (\w+)\.", book)
        last = re.findall(
            r"So the (\w+) went home to the ([\w ]+), and (\w+) counted (?:his|her) (\w+) (\w+): (\w+), as", book
        )
        assert len(first) == 3
        assert [(name, trade, home, count, colour, thing) for trade, home, name, colour, thing, count in last] == first


def test_verbs_agree_and_pronouns_fit() -> None:
    text = "".join(write_books(4, 60_000))
    assert not re.findall(r"\w+ and \w+ (?:walks|goes|hurries|returns|sails) ", text)
    assert not re.findall(r"(?:He|She) (?:are|were|seem) ", text)
    assert not re.findall(r"They (?:is|was|seems) ", text)
    for book in write_books(4, 60_000):
        pronouns = dict(re.findall(r"(\w+) is a \w+ and lives by the [\w ]+\. (He|She) has", book))
        used = re.findall(r", (\w+) \w+ to the [\w ]+ with (his|her) \w+ \w+\. (He|She) ", book)
        assert all(pronouns.get(name, pronoun) == pronoun for name, _, pronoun in used)
        assert {(possessive, pronoun) for _, possessive, pronoun in used} <= {("his", "He"), ("her", "She")}


def test_books_differ_in_their_people() -> None:
    names = {re.search(r": (\w+) and the", book)[1] for book in write_books(5, 100_000)}  # type: ignore[index]
    assert len(names) > 15
