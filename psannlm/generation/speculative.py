"""A row's tokens so far to a guess at the next ones: what followed the same words before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): text that repeats its prompt or itself, as
summaries, code and edits do, is drafted for nothing, and the model only checks it.
"""

from __future__ import annotations

from collections.abc import Sequence

# The longest run of tokens that is looked up first, then shorter ones.
_RUN_LENGTHS = (3, 2)


class PromptLookup:
    """Remembers where each short run of tokens was last followed by another token."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens, each of which follows those before it."""
        for token in ids:
            for length in _RUN_LENGTHS:
                if len(self.ids) >= length:
                    self._next[tuple(self.ids[-length:])] = len(self.ids)
            self.ids.append(token)

    def draft(self, n_tokens: int) -> list[int]:
        """Return up to ``n_tokens`` tokens that followed the last run where it stood before; none if it never did."""
        for length in _RUN_LENGTHS:
            place = self._next.get(tuple(self.ids[-length:]))
            if place is not None:
                return self.ids[place : place + n_tokens]
        return []
