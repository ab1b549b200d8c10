"""A model and prompts of one length in; their greedy continuations and the seconds of each part out, in four ways.

With the cache or with a full forward pass over the growing sequence for every token, and all rows together or one row
at a time: two switches, so that what each is worth can be told apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from psannlm.benchmarks.timing import Clock, Count
from psannlm.generation.engine import Decoding
from psannlm.generation.sampling import SamplingConfig, next_tokens
from psannlm.models.transformer import Transformer

_GREEDY = SamplingConfig(temperature=0.0)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One of the four ways to decode."""

    use_cache: bool
    is_batched: bool

    def __str__(self) -> str:
        return f"cache {'on' if self.use_cache else 'off'}, {'batch' if self.is_batched else 'row by row'}"


CASES = tuple(Case(use_cache, is_batched) for use_cache in (True, False) for is_batched in (True, False))


@dataclass(frozen=True)
class DecodeRun:
    """One run: the new ids of each row, and seconds.

    Attributes:
        prefill_s: from the prompts to the logits that follow them; of rows one at a time, the sum.
        first_token_s: from the prompts to the first token in hand; of rows one at a time, the mean, each from its own
            start.
        decode_s: from the first token to the last; of rows one at a time, the sum.
        total_s: the whole batch, from first to last.
        cache_bytes: of the state at the end, for all rows it served at once; 0 without a cache.
    """

    ids: Prompts
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float
    cache_bytes: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate of the tokens after each row's first."""
        return sum(len(row) - 1 for row in self.ids) / self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Rate of all new tokens, prefill included."""
        return sum(map(len, self.ids)) / self.total_s

    @classmethod
    def join(cls, rows: Sequence[DecodeRun]) -> DecodeRun:
        """Return the run that rows decoded one after the other make together."""
        return cls(
            ids=[ids for row in rows for ids in row.ids],
            prefill_s=sum(row.prefill_s for row in rows),
            first_token_s=sum(row.first_token_s for row in rows) / len(rows),
            decode_s=sum(row.decode_s for row in rows),
            total_s=sum(row.total_s for row in rows),
            cache_bytes=max(row.cache_bytes for row in rows),
        )


def decode(
    model: Transformer,
    prompts: Prompts,
    max_new_tokens: int,
    case: Case,
    *,
    clock: Clock = time.perf_counter,
    count: Count = lambda done, total: None,
) -> DecodeRun:
    """Continue ``prompts`` (all of one length) greedily in the way of ``case``; ``count`` hears of every token."""
    run = decode_cached if case.use_cache else decode_uncached
    total = len(prompts) * max_new_tokens
    if case.is_batched:
        return run(model, prompts, max_new_tokens, clock, lambda done: count(done, total))

    def decode_row(number: int) -> DecodeRun:
        before = number * max_new_tokens
        return run(model, [prompts[number]], max_new_tokens, clock, lambda done: count(before + done, total))

    return DecodeRun.join([decode_row(number) for number in range(len(prompts))])


def decode_cached(
    model: Transformer, prompts: Prompts, max_new_tokens: int, clock: Clock, count: Callable[[int], None]
) -> DecodeRun:
    """Decode with the engine that ``psannlm generate`` uses."""
    began = clock()
    decoding = Decoding(model, prompts, max_new_tokens=max_new_tokens, sampling=_GREEDY, eos_id=None)
    logits, state, seen = decoding.prefill()
    _finish(logits)
    prefilled = first = clock()
    done = 0
    for event in decoding.decode(logits, state, seen):
        done += 1
        if done == 1:
            first = clock()
        if event.row == len(prompts) - 1:
            count(done)
    ended = clock()
    return DecodeRun(decoding.generated, prefilled - began, first - began, ended - first, ended - began, state.n_bytes)


@torch.inference_mode()
def decode_uncached(
    model: Transformer, prompts: Prompts, max_new_tokens: int, clock: Clock, count: Callable[[int], None]
) -> DecodeRun:
    """Decode by a full forward pass over prompts and tokens so far for every new one, with logits of the last place."""
    began = clock()
    device = model.embedding.weight.device
    length = len(prompts[0])
    sequence = torch.zeros(len(prompts), length + max_new_tokens, dtype=torch.long)
    sequence[:, :length] = torch.tensor(prompts)
    sequence = sequence.to(device)
    generated: Prompts = [[] for _ in prompts]
    prefilled = first = began
    for step in range(max_new_tokens):
        logits = model.logits(model.hidden_states(sequence[:, : length + step])[:, -1])
        if step == 0:
            _finish(logits)
            prefilled = clock()
        tokens = next_tokens(logits, _GREEDY, None)
        for row, token in zip(generated, tokens.tolist(), strict=True):
            row.append(token)
        if step == 0:
            first = clock()
        sequence[:, length + step] = tokens
        count((step + 1) * len(prompts))
    ended = clock()
    return DecodeRun(generated, prefilled - began, first - began, ended - first, ended - began, 0)


def _finish(logits: torch.Tensor) -> None:
    """Wait for a GPU, which works on after a call has returned."""
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
