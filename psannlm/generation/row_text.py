"""Text of a row: the ids of its prompt, and its continuation as it grows, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from psannlm.generation.detokenize import IncrementalDetokenizer, common_length
from psannlm.generation.stop_texts import StopScanner
from psannlm.tokenizers.base import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt after the BOS token that every training document starts with."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def continuation_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Return the text that ``new_ids`` add to that of ``prompt_ids``.

    Prompt and new ids are decoded together. Decoded alone, the new ids would lose the space before their first word
    with every tokenizer that drops a space before the first token (SentencePiece's ``add_dummy_prefix``).
    """
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *new_ids])
    # A decoder that cleans up may alter the prompt's last characters; the text after the common prefix is new.
    return whole[common_length(before, whole) :]


def forbidden_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids that are no text: special tokens but EOS, and those of the model that the tokenizer lacks."""
    return [*sorted(tokenizer.special_ids - {tokenizer.eos_id}), *range(tokenizer.vocab_size, vocab_size)]


class RowText:
    """Text of one row as it grows.

    Attributes:
        n_returned: characters returned so far.
        stop_text: the stop text that has ended the text, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: tuple[str, ...]) -> None:
        self._tokenizer, self._prompt_ids, self._stops = tokenizer, prompt_ids, stops
        self._scanner = StopScanner(stops)
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
        self.n_returned = 0

    @property
    def stop_text(self) -> str | None:
        """The stop text that has ended the text."""
        return self._scanner.found

    @property
    def n_certain(self) -> int:
        """Characters that later tokens cannot change, a stop text that may have begun included."""
        return self._detokenizer.length

    def add(self, token: int) -> str:
        """Append a token and return the text that has become certain with it, often none."""
        part = self._scanner.add(self._detokenizer.add(token))
        self.n_returned += len(part)
        return part

    def end(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """Return the whole text of a row that ended with the new tokens ``ids``, and the stop text in it."""
        # The end of the text, uncertain while tokens could follow, can complete a stop text too.
        scanner = StopScanner(self._stops)
        whole = continuation_text(self._tokenizer, self._prompt_ids, ids)
        text = scanner.add(whole)
        if scanner.found is None:
            text = whole
        self.n_returned = len(text)
        return text, scanner.found
