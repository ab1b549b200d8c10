"""The cut of a single document: equal streamed and as a whole, between characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.data.split import CutRange, cut_blocks, find_cut

PARTS = st.lists(st.sampled_from(["word ", "line\n", "end.\n\n", "日本語", "🌊", "é", "x" * 40, " \n"]), max_size=400)


def test_split_range_of_a_large_text_is_bounded() -> None:
    where = CutRange.of(10**9, 0.1)
    assert where.high - where.start < 1 << 18
    assert where.low < 900_000_000 < where.high


@given(parts=PARTS, block=st.integers(1, 300), share=st.sampled_from([0.01, 0.1, 0.5, 0.9]))
def test_split_streamed_and_at_hand_agree(parts: list[str], block: int, share: float) -> None:
    text = "".join(parts).encode()
    blocks = (text[at : at + block] for at in range(0, len(text), block))
    first, last = (b"".join(half) for half in cut_blocks(blocks, len(text), share))
    assert first + last == text
    assert len(first) == find_cut(text, share)
    first.decode("utf-8")  # no character is cut
    if len(text) > 1000:
        assert abs(len(last) / len(text) - share) < 0.1


@pytest.mark.parametrize("n_bytes", [1 << 18, (1 << 18) + 1, 300_000, 1_000_000])
def test_split_streams_in_blocks_of_any_size(n_bytes: int) -> None:
    text = (b"one line of text\n" * (n_bytes // 17 + 1))[:n_bytes]
    for size in (1000, 1 << 18, 1 << 21):
        blocks = (text[at : at + size] for at in range(0, n_bytes, size))
        first, last = (b"".join(half) for half in cut_blocks(blocks, n_bytes, 0.1))
        assert first + last == text
        assert first.endswith(b"\n")
        assert len(first) == find_cut(text, 0.1)


@pytest.mark.parametrize("character", ["é", "日", "🌊"])
def test_split_of_one_character_finds_no_place(character: str) -> None:
    content = character.encode()
    assert find_cut(content, 0.5) in (0, len(content))
    assert find_cut(content * 2, 0.01) == len(content)
