"""Batched decoding loop: sampling, prompt-lookup speculation, stopping rules and sliding contexts.

Finished rows leave the batch; B is the number of rows that remain. Other letters as in ``psannlm.models``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from psannlm.errors import GenerationError, nearest
from psannlm.generation.engine import Engine
from psannlm.generation.logprobs import TokenLogprob, require_logprobs, token_logprobs
from psannlm.generation.sampling import SamplingConfig, next_tokens, require_number
from psannlm.generation.speculative import PromptLookup
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import gpu_memory_bytes

FinishReason = Literal["stop", "length", "context"]
ContextRule = Literal["stop", "slide"]

# Random numbers drawn at a time for each row.
_DRAWN_AT_ONCE = 64


@dataclass(frozen=True)
class TokenEvent:
    """One decoded token of one row, in the order of decoding."""

    row: int
    token: int


def context_limit(model: Transformer) -> int | None:
    """Return the most tokens a sequence may have: the trained length, or None with alibi, which has no limit."""
    return None if model.config.positional_encoding == "alibi" else model.config.max_seq_len


class BatchDecoder:
    """Decoder of one batch of prompts: iterate it for tokens, then read ``generated``.

    Args:
        engine: the model.
        prompts: ids of each row.
        max_new_tokens: most new tokens of each row.
        sampling: how a token is chosen.
        eos_id: the token that ends a row, not part of its text; None: no token does.
        forbidden_ids: tokens that are never chosen.
        speculate: most draft tokens per pass, looked up in the row itself and verified by the model; 0: none. A row's
            tokens are the same either way: the choice at a position depends on the tokens before it and on the random
            number of that position, and a draft only decides how many positions one pass settles.
        context: what happens when a row fills the model's context. ``stop``: the row ends, and a prompt that leaves no
            space for a new token is refused. ``slide``: its oldest tokens are dropped until the context is half full,
            and it continues as if the rest were its prompt; a repetition penalty still counts the dropped tokens.
        logprobs: how many of the most likely tokens to record with each new one; None: record no log probabilities.

    Attributes:
        generated: the new ids of each row.
        logprobs: of each new token of each row; empty unless they are recorded.
        finish_reasons: of each row: ``stop`` (end of text, or :meth:`finish`), ``length`` (``max_new_tokens``) or
            ``context`` (full).
        n_passes, n_drafted, n_accepted: decoding passes, draft tokens, and accepted draft tokens.

    Raises:
        GenerationError: there is no prompt, a prompt is empty, has an id outside the vocabulary or fills the model's
            context; or a setting is refused.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        eos_id: int | None,
        forbidden_ids: Sequence[int] = (),
        speculate: int = 0,
        context: ContextRule = "stop",
        logprobs: int | None = None,
    ) -> None:
        require_number("max_new_tokens", max_new_tokens, is_whole=True)
        require_number("speculate", speculate, is_whole=True)
        require_logprobs(logprobs)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens {max_new_tokens} is less than 1; give 1 or more")
        if not 0 <= speculate < MAX_DECODE_TOKENS:
            raise GenerationError(
                f"speculate {speculate} is not in 0 .. {MAX_DECODE_TOKENS - 1}; 0 turns speculation off"
            )
        if context not in get_args(ContextRule):
            known = get_args(ContextRule)
            message = f"context {context!r:.40} is not one of {', '.join(known)}{nearest(str(context), known)}"
            raise GenerationError(message)
        config = engine.model.config
        self.limit = context_limit(engine.model)
        self.slides = context == "slide" and self.limit is not None
        if self.slides and self.limit is not None and self.limit < 4:
            raise GenerationError(f"a context of {self.limit} tokens is too short to slide; use context stop")
        _check_prompts(prompts, config.vocab_size or 0, None if self.slides else self.limit)
        self.engine = engine
        self.prompts = [self._cut(list(prompt)) for prompt in prompts]
        self.sampling = sampling
        self.eos_id = eos_id
        self.speculate = int(speculate)
        self.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=engine.device)
        self.max_new_tokens = int(max_new_tokens)
        self.max_new = [
            self.max_new_tokens if self.limit is None or self.slides else min(max_new_tokens, self.limit - len(prompt))
            for prompt in self.prompts
        ]
        self._refuse_oversize()
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.n_top = logprobs
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in self.prompts]
        self.finish_reasons: list[FinishReason] = ["length"] * len(self.prompts)
        self.n_passes = self.n_drafted = self.n_accepted = 0
        self._texts = [PromptLookup(prompt) for prompt in self.prompts] if self.speculate else []
        seeds = [_fresh_seed() if sampling.seed is None else int(sampling.seed) for _ in self.prompts]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniforms = torch.empty(len(self.prompts), 0)

    def _refuse_oversize(self) -> None:
        """Raise GenerationError where the cache, the logits or the pass over the prompts cannot fit into memory."""
        config, n_rows = self.engine.model.config, len(self.prompts)
        longest = max(map(len, self.prompts))
        n_tokens = max(len(prompt) + new for prompt, new in zip(self.prompts, self.max_new, strict=True))
        if self.slides and self.limit is not None:
            n_tokens = min(n_tokens, self.limit)
        cache = cache_bytes(config, n_rows, n_tokens, self.engine.cache_dtype.itemsize)
        width = config.d_model + (config.d_mlp or 0)
        needed = cache + 4 * n_rows * ((config.vocab_size or 0) + longest * width)
        is_gpu = self.engine.device.type == "cuda"
        memory = gpu_memory_bytes(self.engine.device) if is_gpu else machine_memory_bytes()
        if memory is not None and needed > memory:
            noun = "prompt" if n_rows == 1 else "prompts"
            has = f"the GPU has {memory / 1e9:,.1f} GB" if is_gpu else describe_memory()
            raise GenerationError(
                f"{n_rows:,} {noun} of up to {longest:,} tokens, {n_tokens:,} with the new ones, need "
                f"{needed / 1e9:,.1f} GB, and {has}; lower max_new_tokens, or give fewer or shorter prompts at a time"
            )

    def __iter__(self) -> Iterator[TokenEvent]:
        return self.decode(*self.prefill())

    def finish(self, row: int) -> None:
        """End a row after its token that was yielded last, for the reason ``stop``."""
        self.max_new[row] = len(self.generated[row])
        self.finish_reasons[row] = "stop"

    @torch.inference_mode()
    def prefill(self) -> tuple[Tensor, KVCache, Tensor | None]:
        """Run all prompts in one pass; return the next logits (B, V), the cache, and which tokens occurred (B, V)."""
        logits, cache = self.engine.prefill(self.prompts, max(self.max_new))
        if self.sampling.repetition_penalty is None:
            return logits, cache, None
        seen = torch.zeros(len(self.prompts), self.engine.model.config.vocab_size or 0, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, prompt] = True
        return logits, cache, seen.to(self.engine.device)

    @torch.inference_mode()
    def decode(self, logits: Tensor, cache: KVCache, seen: Tensor | None) -> Iterator[TokenEvent]:
        """Yield the tokens that follow the result of :meth:`prefill`, and append them to ``generated``."""
        rows = list(range(len(self.prompts)))
        drafts: list[list[int]] = [[] for _ in rows]
        verified = logits.unsqueeze(1)
        while True:
            chosen = self._choose(verified, rows, seen, drafts)
            scored = None if self.n_top is None else token_logprobs(verified, chosen, self.n_top)
            alive, kept, last = [], [], []
            for slot, row in enumerate(rows):
                # A finished row keeps its slot while compiled steps need the batch size they were compiled for.
                tokens = _accepted_tokens(chosen[slot], drafts[slot]) if self._is_unfinished(row) else []
                for at, token in enumerate(tokens):
                    if token == self.eos_id:
                        self.finish(row)
                        break
                    self.generated[row].append(token)
                    if scored is not None:
                        self.logprobs[row].append(scored[slot][at])
                    yield TokenEvent(row, token)
                    if not self._is_unfinished(row):
                        if self.finish_reasons[row] != "stop" and self.max_new[row] < self.max_new_tokens:
                            self.finish_reasons[row] = "context"
                        break
                self.n_drafted += len(drafts[slot])
                self.n_accepted += max(0, len(tokens) - 1)
                kept.append(len(tokens))
                last.append(tokens[-1] if tokens else 0)
                if tokens and self._is_unfinished(row):
                    alive.append(slot)
                    if self.speculate:
                        self._texts[row].extend(tokens)
                if seen is not None and tokens:
                    seen[slot, tokens] = True
            if cache.n_uncommitted:
                cache.commit(kept)
            if not alive:
                return
            if len(alive) < len(rows) and not self.engine.compiles:
                rows = [rows[slot] for slot in alive]
                last = [last[slot] for slot in alive]
                cache = cache.select(alive)
                seen = None if seen is None else seen[alive]
            if self.slides:
                self._slide(rows, cache)
            drafts = [self._draft(row, length) for row, length in zip(rows, cache.lengths, strict=True)]
            n_tokens = 1 + (self.speculate if any(drafts) else 0)
            ids = [
                [token, *draft, *[0] * (n_tokens - 1 - len(draft))] for token, draft in zip(last, drafts, strict=True)
            ]
            verified = self.engine.forward_tokens(torch.tensor(ids, device=self.engine.device), cache)
            self.n_passes += 1

    def _choose(
        self, logits: Tensor, rows: Sequence[int], seen: Tensor | None, drafts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Return the token chosen after each of the T positions of each row of ``logits`` (B, T, V)."""
        n_rows, n_tokens, _ = logits.shape
        uniforms = None
        if self.sampling.temperature > 0.0:
            uniforms = self._uniforms_of(rows, n_tokens).flatten().to(logits.device)
        if seen is not None:
            seen = seen[:, None].repeat(1, n_tokens, 1)
            for slot, draft in enumerate(drafts):
                for at, token in enumerate(draft, start=1):
                    seen[slot, at:, token] = True
            seen = seen.flatten(0, 1)
        tokens = next_tokens(logits.flatten(0, 1), self.sampling, uniforms, seen, self.forbidden)
        chosen: list[list[int]] = tokens.view(n_rows, n_tokens).tolist()
        return chosen

    def _uniforms_of(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Return the random numbers (B, T) of the next positions of each row; every position has its own."""
        needed = max(len(self.generated[row]) for row in rows) + n_tokens
        while self._uniforms.shape[1] < needed:
            drawn = [torch.rand(_DRAWN_AT_ONCE, generator=generator) for generator in self._generators]
            self._uniforms = torch.cat((self._uniforms, torch.stack(drawn)), dim=1)
        first = torch.tensor([len(self.generated[row]) for row in rows])[:, None]
        return self._uniforms[torch.tensor(list(rows))[:, None], first + torch.arange(n_tokens)]

    def _draft(self, row: int, length: int) -> list[int]:
        """Return draft tokens for a row of ``length`` tokens, so few that one more token still fits."""
        if not self.speculate or not self._is_unfinished(row):
            return []
        left = self.max_new[row] - len(self.generated[row]) - 1
        if self.limit is not None:
            left = min(left, self.limit - length - 1)
        return self._texts[row].draft(min(self.speculate, left)) if left > 0 else []

    def _cut(self, ids: list[int]) -> list[int]:
        """Return the end of ``ids`` that a sliding row keeps when they exceed the context; else all of them."""
        if not self.slides or self.limit is None or len(ids) <= self.limit:
            return ids
        return ids[-(self.limit // 2) :]

    def _slide(self, rows: Sequence[int], cache: KVCache) -> None:
        """Refill the cache of rows whose context is full with the end of their text, except its last token."""
        full = [
            slot for slot, row in enumerate(rows) if self._is_unfinished(row) and self._is_full(cache.lengths[slot])
        ]
        if full:
            ends = [self._cut([*self.prompts[rows[slot]], *self.generated[rows[slot]]]) for slot in full]
            _, fresh = self.engine.prefill([end[:-1] for end in ends], 1)
            cache.copy_rows_(full, fresh)

    def _is_full(self, length: int) -> bool:
        return self.limit is not None and length >= self.limit

    def _is_unfinished(self, row: int) -> bool:
        return len(self.generated[row]) < self.max_new[row]


def _fresh_seed() -> int:
    """Return a seed from torch's default generator, so that ``torch.manual_seed`` makes sampling repeatable."""
    return int(torch.randint(2**63 - 1, ()))


def _accepted_tokens(chosen: Sequence[int], draft: Sequence[int]) -> list[int]:
    """Return the chosen tokens up to and including the first that differs from the draft."""
    n_accepted = 0
    while n_accepted < len(draft) and draft[n_accepted] == chosen[n_accepted]:
        n_accepted += 1
    return list(chosen[: n_accepted + 1])


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, limit: int | None) -> None:
    if not prompts:
        raise GenerationError("there is no prompt; give one or more")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise GenerationError(f"prompt {row} has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise GenerationError(f"prompt {row} has an id outside the vocabulary of {vocab_size}")
        if limit is not None and len(prompt) >= limit:
            raise GenerationError(
                f"prompt {row} has {len(prompt)} tokens, and the model's context is {limit}, new tokens included; "
                "shorten the prompt, let the context slide, or train with a larger data.max_length"
            )
