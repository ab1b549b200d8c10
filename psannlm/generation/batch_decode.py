"""Prompts as ids in; their continuations out, token by token, while finished rows leave the batch.

Letters: B rows still alive, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from psannlm.errors import GenerationError, nearest
from psannlm.generation.engine import Engine
from psannlm.generation.sampling import SamplingConfig, next_tokens, require_number
from psannlm.generation.speculative import PromptLookup
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import gpu_memory_bytes

StopReason = Literal["end_of_text", "length", "context"]
ContextRule = Literal["stop", "slide"]

# Random numbers drawn at a time for each row.
_DRAWN_AT_ONCE = 64


@dataclass(frozen=True)
class TokenEvent:
    """One decoded token of one row, as it comes."""

    row: int
    token: int


def context_limit(model: Transformer) -> int | None:
    """Return the most tokens a sequence may have: the trained length, or None with alibi, which goes past it."""
    return None if model.config.positional_encoding == "alibi" else model.config.max_seq_len


class Decoding:
    """The state of one batch of prompts being continued; iterate it for tokens, then read ``generated``.

    Args:
        engine: the model.
        prompts: ids of each row.
        max_new_tokens: of each row, at most.
        sampling: how a token is chosen.
        eos_id: the token that ends a row, left out of its text; None: no token does.
        forbidden_ids: tokens that are never taken.
        speculate: tokens per pass to guess from what the row holds already and let the model check, at most; 0: none.
            A row's tokens are the same either way: what is chosen at a place depends on the tokens before it and on the
            random number of that place, and a guess only decides how many places one pass settles.
        context: what happens when a row has no room for another token in the model's context. ``stop``: it ends there,
            and a prompt without room is refused. ``slide``: its oldest tokens are dropped until the context is half
            full, and it goes on as if the rest had been its prompt, but for a repetition penalty, which remembers all.

    Attributes:
        generated: the new ids of each row.
        stopped_by: why each row ended.
        n_passes, n_drafted, n_accepted: decoding passes, guessed tokens, and those of them that were right.

    Raises:
        GenerationError: there is no prompt, a prompt is empty or has an id outside the vocabulary, or it leaves no room
            in the model's context; or a setting is refused.
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
    ) -> None:
        require_number("max_new_tokens", max_new_tokens, is_whole=True)
        require_number("speculate", speculate, is_whole=True)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens {max_new_tokens} asks for nothing; use 1 or more")
        if not 0 <= speculate < MAX_DECODE_TOKENS:
            raise GenerationError(f"speculate {speculate} is not in 0 .. {MAX_DECODE_TOKENS - 1}; 0 guesses nothing")
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
        self.room = [
            self.max_new_tokens if self.limit is None or self.slides else min(max_new_tokens, self.limit - len(prompt))
            for prompt in self.prompts
        ]
        self._refuse_oversize()
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.stopped_by: list[StopReason] = ["length"] * len(self.prompts)
        self.n_passes = self.n_drafted = self.n_accepted = 0
        self._texts = [PromptLookup(prompt) for prompt in self.prompts] if self.speculate else []
        seeds = [_fresh_seed() if sampling.seed is None else int(sampling.seed) for _ in self.prompts]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniforms = torch.empty(len(self.prompts), 0)

    def _refuse_oversize(self) -> None:
        """Raise GenerationError where the cache, the logits or the pass over the prompts cannot fit into memory."""
        config, n_rows = self.engine.model.config, len(self.prompts)
        longest = max(map(len, self.prompts))
        n_tokens = max(len(prompt) + room for prompt, room in zip(self.prompts, self.room, strict=True))
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
                f"{n_rows:,} {noun} of up to {longest:,} tokens, {n_tokens:,} with what follows, need "
                f"{needed / 1e9:,.1f} GB, and {has}; lower max_new_tokens, or give fewer or shorter prompts at a time"
            )

    def __iter__(self) -> Iterator[TokenEvent]:
        return self.decode(*self.prefill())

    @torch.inference_mode()
    def prefill(self) -> tuple[Tensor, KVCache, Tensor | None]:
        """Run every prompt at once; return the logits (B, V) after each, the cache, and the tokens seen (B, V)."""
        logits, state = self.engine.prefill(self.prompts, max(self.room))
        if self.sampling.repetition_penalty is None:
            return logits, state, None
        seen = torch.zeros(len(self.prompts), self.engine.model.config.vocab_size or 0, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, prompt] = True
        return logits, state, seen.to(self.engine.device)

    @torch.inference_mode()
    def decode(self, logits: Tensor, state: KVCache, seen: Tensor | None) -> Iterator[TokenEvent]:
        """Yield the tokens that follow what :meth:`prefill` returned, and keep them in ``generated``."""
        rows = list(range(len(self.prompts)))
        drafts: list[list[int]] = [[] for _ in rows]
        offered = logits.unsqueeze(1)
        while True:
            chosen = self._choose(offered, rows, seen, drafts)
            alive, kept, last = [], [], []
            for place, row in enumerate(rows):
                # A row that has ended stays in its place while a compiled step needs the batch's size.
                tokens = _agreed(chosen[place], drafts[place]) if self._is_going_on(row) else []
                for token in tokens:
                    if token == self.eos_id:
                        self.stopped_by[row] = "end_of_text"
                        self.room[row] = len(self.generated[row])
                        break
                    self.generated[row].append(token)
                    yield TokenEvent(row, token)
                    if not self._is_going_on(row):
                        if self.room[row] < self.max_new_tokens:
                            self.stopped_by[row] = "context"
                        break
                self.n_drafted += len(drafts[place])
                self.n_accepted += max(0, len(tokens) - 1)
                kept.append(len(tokens))
                last.append(tokens[-1] if tokens else 0)
                if tokens and self._is_going_on(row):
                    alive.append(place)
                    if self.speculate:
                        self._texts[row].extend(tokens)
                if seen is not None and tokens:
                    seen[place, tokens] = True
            if state.n_uncommitted:
                state.commit(kept)
            if not alive:
                return
            if len(alive) < len(rows) and not self.engine.compiles:
                rows = [rows[place] for place in alive]
                last = [last[place] for place in alive]
                state = state.select(alive)
                seen = None if seen is None else seen[alive]
            if self.slides:
                self._slide(rows, state)
            drafts = [self._draft(row, length) for row, length in zip(rows, state.lengths, strict=True)]
            n_tokens = 1 + (self.speculate if any(drafts) else 0)
            ids = [
                [token, *draft, *[0] * (n_tokens - 1 - len(draft))] for token, draft in zip(last, drafts, strict=True)
            ]
            offered = self.engine.verify(torch.tensor(ids, device=self.engine.device), state)
            self.n_passes += 1

    def _choose(
        self, logits: Tensor, rows: Sequence[int], seen: Tensor | None, drafts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Choose the token after each of the T places of each row of ``logits`` (B, T, V)."""
        n_rows, n_tokens, _ = logits.shape
        uniforms = None
        if self.sampling.temperature > 0.0:
            uniforms = self._uniforms_of(rows, n_tokens).flatten().to(logits.device)
        if seen is not None:
            seen = seen[:, None].repeat(1, n_tokens, 1)
            for place, draft in enumerate(drafts):
                for at, token in enumerate(draft, start=1):
                    seen[place, at:, token] = True
            seen = seen.flatten(0, 1)
        tokens = next_tokens(logits.flatten(0, 1), self.sampling, uniforms, seen, self.forbidden)
        chosen: list[list[int]] = tokens.view(n_rows, n_tokens).tolist()
        return chosen

    def _uniforms_of(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Return the random numbers (B, T) of the next places of each row; each place of a row has its own."""
        needed = max(len(self.generated[row]) for row in rows) + n_tokens
        while self._uniforms.shape[1] < needed:
            drawn = [torch.rand(_DRAWN_AT_ONCE, generator=generator) for generator in self._generators]
            self._uniforms = torch.cat((self._uniforms, torch.stack(drawn)), dim=1)
        first = torch.tensor([len(self.generated[row]) for row in rows])[:, None]
        return self._uniforms[torch.tensor(list(rows))[:, None], first + torch.arange(n_tokens)]

    def _draft(self, row: int, length: int) -> list[int]:
        """Guess at what follows the last token of a row of ``length`` tokens, leaving room for one token after it."""
        if not self.speculate or not self._is_going_on(row):
            return []
        left = self.room[row] - len(self.generated[row]) - 1
        if self.limit is not None:
            left = min(left, self.limit - length - 1)
        return self._texts[row].draft(min(self.speculate, left)) if left > 0 else []

    def _cut(self, ids: list[int]) -> list[int]:
        """The end of ``ids`` that stays when they fill the context of a row that slides."""
        if not self.slides or self.limit is None or len(ids) <= self.limit:
            return ids
        return ids[-(self.limit // 2) :]

    def _slide(self, rows: Sequence[int], state: KVCache) -> None:
        """Let rows whose context is full remember the end of their text only; its last token is still to be offered."""
        full = [
            place for place, row in enumerate(rows) if self._is_going_on(row) and self._is_full(state.lengths[place])
        ]
        if full:
            ends = [self._cut([*self.prompts[rows[place]], *self.generated[rows[place]]]) for place in full]
            _, fresh = self.engine.prefill([end[:-1] for end in ends], 1)
            state.copy_rows_(full, fresh)

    def _is_full(self, length: int) -> bool:
        return self.limit is not None and length >= self.limit

    def _is_going_on(self, row: int) -> bool:
        return len(self.generated[row]) < self.room[row]


def _fresh_seed() -> int:
    """Draw a seed from torch's default generator, so that ``torch.manual_seed`` makes what follows repeatable."""
    return int(torch.randint(2**63 - 1, ()))


def _agreed(chosen: Sequence[int], draft: Sequence[int]) -> list[int]:
    """Return the chosen tokens up to the first that a draft did not foresee, that one included."""
    agreed = 0
    while agreed < len(draft) and draft[agreed] == chosen[agreed]:
        agreed += 1
    return list(chosen[: agreed + 1])


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
                "shorten the prompt, let the context slide, or train with a larger data.max_length"
            )
