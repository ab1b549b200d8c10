"""Choices of an answer in OpenAI's shape, whole or as the parts of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psannlm.generation.detokenize import IncrementalDetokenizer
from psannlm.generation.requests import TokenLogprob
from psannlm.generation.row_text import continuation_text
from psannlm.serving.messages import Update
from psannlm.serving.protocol import CompletionRequest, Prompt
from psannlm.tokenizers.base import Tokenizer


class Choice:
    """One choice as it grows.

    Attributes:
        n_tokens: generated so far; with a stop text those that spell it too.
    """

    def __init__(self, index: int, request: CompletionRequest, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index, self._request, self._prompt, self._tokenizer = index, request, prompt, tokenizer
        self.n_tokens = 0
        self._n_characters = 0
        self._before = prompt.ids[-1] if prompt.ids else tokenizer.bos_id
        self._is_first = True
        # Tokens with (characters before them, log probability), whose text is not out yet.
        self._held: list[tuple[int, TokenLogprob]] = []

    def part(self, update: Update) -> dict[str, Any] | None:
        """Return what an update adds to the choice, or None where nothing can be shown yet."""
        self.n_tokens += len(update.ids)
        text, logprobs = update.text, None
        echoed = len(self._prompt.text) if self._request.echo else 0
        self._n_characters += len(update.text)
        if self._request.logprobs is not None:
            self._held += zip(update.offsets, update.logprobs, strict=True)
            if update.end_logprob is not None and update.stop_text is None:
                # It has no text, but clients that score a text count tokens from the end of the list.
                self._held.append((self._n_characters, update.end_logprob))
            shown = self._take_shown(update)
            logprobs = _empty_logprobs()
            if self._is_first and self._request.echo:
                self._add_prompt(logprobs, update.prompt_logprobs or [])
            for offset, scored in shown:
                self._add(logprobs, scored.token, echoed + offset, scored, self._before)
                self._before = scored.token
        if self._is_first and self._request.echo:
            text = self._prompt.text + text
        if not text and not update.is_last and not (logprobs and logprobs["tokens"]):
            return None
        self._is_first = False
        reason = "length" if update.finish_reason == "context" else update.finish_reason
        return {"text": text, "index": self.index, "logprobs": logprobs, "finish_reason": reason}

    def _take_shown(self, update: Update) -> list[tuple[int, TokenLogprob]]:
        """Return the tokens whose text is out: the rest waits for it, or belongs to a stop text."""
        n = len(self._held)
        if not (update.is_last and update.stop_text is None):
            n = sum(offset < self._n_characters for offset, _ in self._held)
        shown, self._held = self._held[:n], self._held[n:]
        return shown

    def _add_prompt(self, logprobs: dict[str, Any], scored: Sequence[TokenLogprob]) -> None:
        """Add the tokens of the prompt that the client sent; the first of all has no log probability."""
        ids, first = self._prompt.ids, self._prompt.n_hidden
        text = IncrementalDetokenizer(self._tokenizer, ids[:first])
        for at in range(first, len(ids)):
            before = ids[at - 1] if at else self._tokenizer.bos_id
            self._add(logprobs, ids[at], text.length, scored[at - 1] if at else None, before)
            text.add(ids[at])

    def _add(self, logprobs: dict[str, Any], token: int, offset: int, scored: TokenLogprob | None, before: int) -> None:
        logprobs["tokens"].append(self._text(before, token))
        logprobs["token_logprobs"].append(None if scored is None else scored.logprob)
        top: dict[str, float] | None = None
        if scored is not None:
            top = {}
            for other, logprob in scored.top:
                top.setdefault(self._text(before, other), logprob)
            # As OpenAI does: the token itself is among them, even if it is not one of the likeliest.
            top.setdefault(self._text(before, token), scored.logprob)
        logprobs["top_logprobs"].append(top)
        logprobs["text_offset"].append(offset)

    def _text(self, before: int, token: int) -> str:
        """Return what a token adds to the one before it, or its name where that is no whole character or no text."""
        if token >= self._tokenizer.vocab_size:
            # A likely alternative can be an id that only the model has.
            return f"<{token}>"
        text = continuation_text(self._tokenizer, [before], [token])
        return text if text and "\ufffd" not in text else self._tokenizer.pieces([token])[0]


def _empty_logprobs() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole choice of its parts."""
    whole = dict(parts[-1])
    whole["text"] = "".join(part["text"] for part in parts)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {name: [x for part in parts for x in part["logprobs"][name]] for name in _empty_logprobs()}
    return whole


def usage(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> dict[str, int]:
    """Return the numbers of tokens of a request; a prompt counts once, whatever its choices."""
    n_prompt, n_new = sum(len(prompt.ids) for prompt in prompts), sum(choice.n_tokens for choice in choices)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
