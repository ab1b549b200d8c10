"""Prompt-lookup speculation: draft tokens that followed the same n-gram earlier in the row.

Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding. Text that repeats its prompt or itself, such as summaries,
code and edits, is drafted without a draft model; the model verifies the draft in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the n-grams that are looked up, the first match wins.
_NGRAM_LENGTHS = (3, 2)


class PromptLookup:
    """Index from each n-gram of a row to the position that followed its last occurrence."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens to the row."""
        for token in ids:
            for length in _NGRAM_LENGTHS:
                if len(self.ids) >= length:
                    self._next[tuple(self.ids[-length:])] = len(self.ids)
            self.ids.append(token)

    def draft(self, n_tokens: int) -> list[int]:
        """Return up to ``n_tokens`` tokens that followed the row's last n-gram before; empty if it is new."""
        for length in _NGRAM_LENGTHS:
            position = self._next.get(tuple(self.ids[-length:]))
            if position is not None:
                return self.ids[position : position + n_tokens]
        return []
