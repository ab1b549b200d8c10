"""Batched decoding loop of a fixed set of prompts: one prefill, then passes until every row has ended.

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
from psannlm.generation.logprobs import require_logprobs
from psannlm.generation.requests import FinishReason, SamplingConfig, check_prompts, require_number
from psannlm.generation.rows import Row, RowBatch
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import gpu_memory_bytes

ContextRule = Literal["stop", "slide"]


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
        sampling: how a token is chosen: for all rows, or for each.
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
        rows: what each row is asked for and has so far.
        generated, logprobs, finish_reasons: of each row, as in :class:`~psannlm.generation.rows.Row`.
        n_passes, n_drafted, n_accepted: decoding passes, draft tokens, and accepted draft tokens.

    Raises:
        GenerationError: there is no prompt, a prompt is empty, has an id outside the vocabulary or fills the model's
            context; a setting is refused; or there are settings for another number of rows.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig | Sequence[SamplingConfig],
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
        check_prompts(prompts, config.vocab_size or 0, None if self.slides else self.limit)
        self.engine = engine
        self.prompts = [self._cut(list(prompt)) for prompt in prompts]
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
        if len(samplings) != len(prompts):
            raise GenerationError(f"there are {len(prompts)} prompts and sampling settings for {len(samplings)}")
        self.speculate = int(speculate)
        self.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=engine.device)
        self.max_new_tokens = int(max_new_tokens)
        self.n_top = logprobs
        self._refuse_oversize()
        self.rows = [
            Row(
                prompt,
                max_new_tokens=self.max_new_tokens,
                sampling=own,
                eos_id=eos_id,
                context=None if self.slides else self.limit,
                speculates=self.speculate > 0,
                n_top=logprobs,
            )
            for prompt, own in zip(self.prompts, samplings, strict=True)
        ]
        self.generated = [row.generated for row in self.rows]
        self.logprobs = [row.logprobs for row in self.rows]
        self.n_passes = self.n_drafted = self.n_accepted = 0

    @property
    def max_new(self) -> list[int]:
        """Most new tokens of each row."""
        return [row.max_new for row in self.rows]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Finish reason of each row."""
        return [row.finish_reason for row in self.rows]

    def _refuse_oversize(self) -> None:
        """Raise GenerationError where the cache, the logits or the pass over the prompts cannot fit into memory."""
        config, n_rows = self.engine.model.config, len(self.prompts)
        longest = max(map(len, self.prompts))
        n_tokens = longest + self.max_new_tokens
        if self.limit is not None:
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
        self.rows[row].finish()

    @torch.inference_mode()
    def prefill(self) -> tuple[Tensor, KVCache, Tensor | None]:
        """Run all prompts in one pass; return the next logits (B, V), the cache, and which tokens occurred (B, V)."""
        logits, cache = self.engine.prefill(self.prompts, max(self.max_new))
        if all(row.sampling.repetition_penalty is None for row in self.rows):
            return logits, cache, None
        return logits, cache, torch.stack([row.seen(logits.shape[1], logits.device) for row in self.rows])

    @torch.inference_mode()
    def decode(self, logits: Tensor, cache: KVCache, seen: Tensor | None = None) -> Iterator[TokenEvent]:
        """Yield the tokens that follow the result of :meth:`prefill`, and append them to ``generated``.

        ``seen`` is not read: each row knows its tokens.
        """
        batch = RowBatch(
            self.engine, self.rows, cache, forbidden=self.forbidden, speculate=self.speculate, limit=self.limit
        )
        numbers = list(range(len(self.rows)))
        logits = logits.unsqueeze(1)
        while True:
            for slot, token in batch.settle(logits):
                yield TokenEvent(numbers[slot], token)
            self.n_passes, self.n_drafted, self.n_accepted = batch.n_passes, batch.n_drafted, batch.n_accepted
            alive = [slot for slot, row in enumerate(batch.rows) if not row.is_finished]
            if not alive:
                return
            if len(alive) < len(numbers) and not self.engine.compiles:
                numbers = [numbers[slot] for slot in alive]
                batch.select(alive)
            if self.slides:
                self._slide(batch.rows, batch.cache)
            logits = batch.forward()

    def _cut(self, ids: list[int]) -> list[int]:
        """Return the end of ``ids`` that a sliding row keeps when they exceed the context; else all of them."""
        if not self.slides or self.limit is None or len(ids) <= self.limit:
            return ids
        return ids[-(self.limit // 2) :]

    def _slide(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Refill the cache of rows whose context is full with the end of their text, except its last token."""
        full = [slot for slot, row in enumerate(rows) if not row.is_finished and self._is_full(cache.lengths[slot])]
        if full:
            ends = [self._cut([*rows[slot].prompt, *rows[slot].generated]) for slot in full]
            _, fresh = self.engine.prefill([end[:-1] for end in ends], 1)
            cache.copy_rows_(full, fresh)

    def _is_full(self, length: int) -> bool:
        return self.limit is not None and length >= self.limit
