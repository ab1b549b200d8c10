from __future__ import annotations

import json

import pytest

from psannlm.errors import TokenizerError
from psannlm.tokenizers.char import CharTokenizer


def test_frequent_characters_have_ids_and_the_rest_are_bytes() -> None:
    tokenizer = CharTokenizer.fit(["ééé", "ßß abc", "öö", "ñ"], 260 + 3)
    assert tokenizer.characters == "éßö"  # a tie goes to the lower code point
    assert tokenizer.encode("aß") == [4 + ord("a"), 261]
    assert tokenizer.encode("ñ") == [4 + byte for byte in "ñ".encode()]


@pytest.mark.parametrize("c", ["\x80", "߿", "ࠀ", "\uffff", "\U00010000", "\U0010ffff"])
def test_unseen_characters_become_their_utf8_bytes(c: str) -> None:
    tokenizer = CharTokenizer("é")
    inside = [260, *(4 + byte for byte in c.encode()), 4 + ord("z")]
    assert tokenizer.encode(f"é{c}z") == inside
    assert tokenizer.encode_batch(["é", "", f"é{c}z", c]) == [[260], [], inside, inside[1:-1]]


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    tokenizer = CharTokenizer("")
    assert tokenizer.decode([4 + 0xFF, 4 + 0x41, 4 + 0xC3]) == "\ufffdA\ufffd"
    assert tokenizer.decode([4 + 0xC3, 4 + 0xA9]) == "é"


def test_pieces_show_spaces_and_bytes() -> None:
    tokenizer = CharTokenizer("é")
    assert tokenizer.pieces(tokenizer.encode("a é\nñ")) == ["a", "▁", "é", "<0x0A>", "<0xC3>", "<0xB1>"]


def test_the_file_is_marked_and_versioned_ascii_json() -> None:
    content = CharTokenizer("é日").to_bytes()
    assert json.loads(content.decode("ascii")) == {"format": "psannlm-char", "version": 1, "characters": "é日"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this psannlm reads version 1"),
        ({"characters": None}, "'characters' is not a string"),
        ({"characters": "éé"}, "distinct"),
        ({"characters": "a"}, "outside ASCII"),
        ({"characters": "\ud800"}, "lone surrogate"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        CharTokenizer.from_json({"version": 1, "characters": "é", **change})
