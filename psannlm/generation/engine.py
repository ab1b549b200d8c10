"""Prompts to text: prefill all rows at once, then decode token by token while finished rows leave the batch.

Letters: B rows still alive, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.sampling import SamplingConfig, next_tokens, require_number
from psannlm.models.cache import DecodeState
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

StopReason = Literal["end_of_text", "length", "context"]


@dataclass(frozen=True)
class Completion:
    """What followed a prompt: token ids (end of text left out), their text, and why it ends there.

    ``stopped_by`` is ``end_of_text``, ``length`` (max_new_tokens reached) or ``context`` (no room for more).
    """

    ids: list[int]
    text: str
    stopped_by: StopReason


@dataclass(frozen=True)
class TokenEvent:
    """One decoded token of one row, as it comes."""

    row: int
    token: int


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt, led by the beginning-of-text that every training document starts with."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def context_limit(model: Transformer) -> int | None:
    """Return the most tokens a sequence may have: the trained length, or None with alibi, which goes past it."""
    return None if model.config.positional_encoding == "alibi" else model.config.max_seq_len


class Decoding:
    """The state of one batch of prompts being continued; iterate it for tokens, then read ``generated``.

    Raises:
        GenerationError: there is no prompt, a prompt is empty or has an id outside the vocabulary, or it leaves no room
            in the model's context.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        eos_id: int | None,
        forbidden_ids: Sequence[int] = (),
    ) -> None:
        require_number("max_new_tokens", max_new_tokens, is_whole=True)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens {max_new_tokens} asks for nothing; use 1 or more")
        limit = context_limit(model)
        _check_prompts(prompts, model.config.vocab_size or 0, limit)
        self.model = model
        self.prompts = [list(prompt) for prompt in prompts]
        self.sampling = sampling
        self.eos_id = eos_id
        self.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=model.embedding.weight.device)
        self.room = [
            max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in self.prompts
        ]
        self.max_new_tokens = max_new_tokens
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.stopped_by: list[StopReason] = ["length"] * len(self.prompts)
        seeds = [secrets.randbits(63) if sampling.seed is None else int(sampling.seed) for _ in self.prompts]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __iter__(self) -> Iterator[TokenEvent]:
        return self.decode(*self.prefill())

    @torch.inference_mode()
    def decode(self, logits: Tensor, state: DecodeState, seen: Tensor | None) -> Iterator[TokenEvent]:
        """Yield the tokens that follow what :meth:`prefill` returned, and keep them in ``generated``."""
        rows = list(range(len(self.prompts)))
        while True:
            tokens = self._choose(logits, rows, seen)
            chosen = tokens.tolist()
            alive = []
            for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if token == self.eos_id:
                    self.stopped_by[row] = "end_of_text"
                    self.room[row] = len(self.generated[row])
                    continue
                self.generated[row].append(token)
                yield TokenEvent(row, token)
                if len(self.generated[row]) < self.room[row]:
                    alive.append(place)
                elif self.room[row] < self.max_new_tokens:
                    self.stopped_by[row] = "context"
            if not alive:
                return
            if len(alive) < len(rows):
                rows = [rows[place] for place in alive]
                tokens, state = tokens[alive], state.select(alive)
                seen = None if seen is None else seen[alive]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            logits = self.model.logits(self.model.hidden_states(tokens[:, None], state)[:, -1])

    @torch.inference_mode()
    def prefill(self) -> tuple[Tensor, DecodeState, Tensor | None]:
        """Run every prompt at once, padded on the right; return the logits after each, the cache, and tokens seen."""
        weight = self.model.embedding.weight
        lengths = [len(prompt) for prompt in self.prompts]
        capacity = max(length + room for length, room in zip(lengths, self.room, strict=True))
        state = DecodeState.allocate(self.model.config, len(lengths), capacity, weight.device, weight.dtype)
        input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        seen = None
        if self.sampling.repetition_penalty is not None:
            seen = torch.zeros(len(lengths), self.model.config.vocab_size or 0, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt)
            if seen is not None:
                seen[row, prompt] = True
        hidden = self.model.hidden_states(input_ids.to(weight.device), state, lengths)
        last = torch.tensor([length - 1 for length in lengths], device=weight.device)
        logits = self.model.logits(hidden[torch.arange(len(lengths), device=weight.device), last])
        return logits, state, None if seen is None else seen.to(weight.device)

    def _choose(self, logits: Tensor, rows: Sequence[int], seen: Tensor | None) -> Tensor:
        uniforms = None
        if self.sampling.temperature > 0.0:
            uniforms = torch.cat([torch.rand(1, generator=self._generators[row]) for row in rows]).to(logits.device)
        return next_tokens(logits, self.sampling, uniforms, seen, self.forbidden)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, limit: int | None) -> None:
    if not prompts:
        raise GenerationError("there is no prompt to continue")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise GenerationError(f"prompt {row} holds no token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise GenerationError(f"prompt {row} has an id outside the vocabulary of {vocab_size}")
        if limit is not None and len(prompt) >= limit:
            raise GenerationError(
                f"prompt {row} has {len(prompt)} tokens, and the model's context is {limit} with room for an answer; "
                "shorten the prompt, or train with a larger data.max_length"
            )


def _texts(prompts: object) -> list[str]:
    """Return the prompts as a list. Raises GenerationError for anything but strings; one alone is no list of them."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise GenerationError(f"prompts {prompts!r:.60} is not a list of strings")
    texts = list(prompts)
    for row, prompt in enumerate(texts):
        if not isinstance(prompt, str):
            raise GenerationError(f"prompt {row} is {type(prompt).__name__} {prompt!r:.60}; give a string")
    return texts


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """Continue each prompt, all in one batch; with a seed, a row's text is the same alone and in company.

    The model runs as in evaluation, without dropout, and is left in the mode it was in.

    Args:
        sampling: None uses the defaults of :class:`SamplingConfig`.
        on_text: called with (row, text) as text becomes certain: never a part of a character. The parts of a row
            join to its completion's text.
        on_progress: called after each step but the last with (tokens so far, steps so far, steps at most); a step adds
            one token to every row that has not ended.

    Raises:
        GenerationError: a prompt or setting cannot be honoured.
    """
    prompts = _texts(prompts)
    special = tokenizer.special_ids - {tokenizer.eos_id}
    unused = range(tokenizer.vocab_size, model.config.vocab_size or 0)
    decoding = Decoding(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling or SamplingConfig(),
        eos_id=tokenizer.eos_id,
        forbidden_ids=[*sorted(special), *unused],
    )
    told = [0] * len(prompts)
    n_tokens = n_steps = 0
    was_training = model.training
    model.eval()
    try:
        for event in decoding:
            if on_progress is not None and len(decoding.generated[event.row]) > n_steps + 1:
                n_steps += 1
                on_progress(n_tokens, n_steps, max(decoding.room))
            n_tokens += 1
            if on_text is not None:
                # The end may still change: bytes that are half a character decode to a replacement mark until the rest.
                text = tokenizer.decode(decoding.generated[event.row])
                certain = len(text.rstrip("�"))
                if certain > told[event.row]:
                    on_text(event.row, text[told[event.row] : certain])
                    told[event.row] = certain
    finally:
        model.train(was_training)
    completions = []
    for row, (ids, reason) in enumerate(zip(decoding.generated, decoding.stopped_by, strict=True)):
        text = tokenizer.decode(ids)
        if on_text is not None and len(text) > told[row]:
            on_text(row, text[told[row] :])
        completions.append(Completion(ids, text, reason))
    return completions
