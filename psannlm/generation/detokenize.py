"""Incremental detokenization: the text of a growing list of tokens, in parts that later tokens cannot change."""

from __future__ import annotations

from collections.abc import Sequence

from psannlm.tokenizers.base import Tokenizer

# A part of a character decodes to the replacement character until its other bytes follow. The private-use character
# is SentencePiece's escape of its space mark; the next token decides whether it is the escape or a literal one.
_MAY_CHANGE = "\ufffd\uf8f0"


def common_length(a: str, b: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class IncrementalDetokenizer:
    """Decoder of one row's tokens, in constant time per token; the returned parts join to the whole text.

    Only the tokens since the last complete character are decoded, after a context of the tokens before them: many
    tokenizers drop a space before the first token, so that a token decoded alone would lose the space before its word.

    Args:
        tokenizer: of the ids.
        prompt_ids: the ids that the row continues; their text is context and not part of what is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt_ids)
        self._n_context = len(self._ids)
        self._prompt_text = tokenizer.decode(self._ids)
        self._n_returned = len(self._prompt_text)
        self.length = 0
        """Characters returned so far."""

    def add(self, token: int) -> str:
        """Append ``token`` and return the text that has become certain with it, often none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not self.length and not text.startswith(self._prompt_text):
            # The prompt ended inside a character; what differs from its text is new.
            self._n_returned = common_length(text, self._prompt_text)
        certain = text.rstrip(_MAY_CHANGE)
        new = certain[self._n_returned :]
        self._n_returned += len(new)
        self.length += len(new)
        if new and certain == text:
            newest = self._ids[self._n_context :]
            context = self._tokenizer.decode(newest)
            if context:
                self._ids = newest
            elif self._n_returned > len(new):
                # With a context that decodes to nothing, the space before the next token would be dropped too.
                self._ids = self._ids[: self._n_context]
                context = self._tokenizer.decode(self._ids)
            else:
                context = text
            self._n_context, self._n_returned = len(self._ids), len(context)
        return new
