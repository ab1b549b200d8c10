"""Tokens of one row enter one at a time; the text that no later token can change leaves."""

from __future__ import annotations

from collections.abc import Sequence

from psannlm.tokenizers.base import Tokenizer

# Half a character decodes to a replacement mark until its other bytes come, and the private-use character with which
# the SentencePiece backend escapes its own mark for a space stands for itself or for that mark, as the next piece says.
_MAY_CHANGE = "\ufffd\uf8f0"


class TextStream:
    """The text of a growing list of tokens, told in parts that join to it; each token costs the same.

    Only the tokens since the last whole character are decoded again, after those that it ended with: many tokenizers
    drop the space before the first token of all, so a token alone would lose the space before its word.

    Args:
        tokenizer: of the ids.
        prompt_ids: the ids that the row continues; their text is context and not part of what is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt_ids)
        self._n_context = len(self._ids)
        self._n_told = len(tokenizer.decode(self._ids))
        self.length = 0
        """Characters told so far."""

    def add(self, token: int) -> str:
        """Return the text that has become certain with ``token``, often none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_MAY_CHANGE)
        new = certain[self._n_told :]
        self._n_told += len(new)
        self.length += len(new)
        if new and certain == text:
            # A context that decodes to nothing would have its space dropped together with that of the next token.
            newest = self._ids[self._n_context :]
            if self._tokenizer.decode(newest):
                self._ids = newest
            elif self._n_told > len(new):
                self._ids = self._ids[: self._n_context]
            self._n_context = len(self._ids)
            self._n_told = len(self._tokenizer.decode(self._ids))
        return new
