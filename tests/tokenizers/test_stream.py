"""Line-by-line encoding and decoding, and errors with the line number."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from psannlm.errors import TokenizerError
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer
from psannlm.tokenizers.stream import decoded_json, decoded_lines, encoded_json, encoded_lines, parsed_ids, shown


def test_shown_ids_are_read_back(tokenizer: Tokenizer, corpus: list[str]) -> None:
    for text in (*corpus, "a:1 b", " : :: ", "12 13:14"):
        ids = tokenizer.encode(text)
        assert parsed_ids(shown(tokenizer, ids)) == parsed_ids(" ".join(map(str, ids))) == ids


def test_a_piece_with_a_space_stays_one_word() -> None:
    class Spaced:
        def pieces(self, ids: list[int]) -> list[str]:
            return ["two words:7"] * len(ids)

    assert parsed_ids(shown(Spaced(), [5, 6])) == [5, 6]  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["x", "1 -2", "1.5", "a:", "٣"])
def test_parsed_ids_invalid_word_raises(line: str) -> None:
    with pytest.raises(TokenizerError, match="is not an id"):
        parsed_ids(line)


def test_nothing_is_read_ahead() -> None:
    tokenizer = fit_tokenizer(["é"], "simple")
    taken: list[int] = []

    def lines(text: str) -> Iterator[str]:
        for i in range(3):
            taken.append(i)
            yield text

    for convert, text in (
        (encoded_json, '{"text": "a"}'),
        (decoded_json, '{"ids": [5]}'),
        (encoded_lines, "a"),
        (decoded_lines, "5"),
    ):
        taken.clear()
        answers = iter(convert(tokenizer, lines(text)))  # type: ignore[operator]
        next(answers)
        assert taken == [0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "must be an object"),
        ('{"text": 1}', "must hold a string, not 1"),
        ('{"text": "a", "ids": []}', "has both 'ids' and 'text'"),
        ('{"text": "\\ud800"}', "line 2: lone surrogate"),
        ('{"text": "a", "x": 1e999}', "NaN or Infinity"),
        ("{}", "among none"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_stream_error_names_line(line: str, says: str) -> None:
    tokenizer = fit_tokenizer(["é"], "simple")
    answers = encoded_json(tokenizer, ['{"text": "a"}\n', line])
    assert json.loads(next(answers)) == {"ids": tokenizer.encode("a")}
    with pytest.raises(TokenizerError, match=says):
        next(answers)


@pytest.mark.parametrize("ids", ["[1.0]", "[true]", '"5"', "[99999]", "null"])
def test_ids_are_whole_numbers_of_the_vocabulary(ids: str) -> None:
    with pytest.raises(TokenizerError, match="line 1: "):
        next(decoded_json(fit_tokenizer(["é"], "simple"), [f'{{"ids": {ids}}}']))


def test_the_key_of_the_text_may_be_named() -> None:
    tokenizer = fit_tokenizer(["é"], "simple")
    (line,) = encoded_json(tokenizer, ['{"body": "é", "text": 1}'], "body")
    assert json.loads(line) == {"ids": tokenizer.encode("é"), "text": 1}
    assert json.loads(next(decoded_json(tokenizer, [line.replace("text", "t")], "body"))) == {"body": "é", "t": 1}
