"""Log-likelihoods of given tokens after given contexts, in batches; no figure depends on the batch.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.batch_decode import context_limit
from psannlm.generation.engine import Engine
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.attention import PREFILL_QUERIES
from psannlm.models.kv_cache import KVCache, whole_blocks
from psannlm.runtime.device import gpu_memory_bytes
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress


@dataclass(frozen=True)
class Continuation:
    """Tokens ``ids`` after the tokens ``context``, both with one id at least."""

    context: Sequence[int]
    ids: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Logarithm of a continuation's probability in nats, and whether greedy decoding would produce it."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Row:
    """One pass: the input tokens, and the first position whose next token is scored."""

    ids: tuple[int, ...]
    first: int


class Scorer:
    """Scorer of continuations with an engine, in batches of at most ``batch_size`` rows.

    Continuations that differ in their last token only share one pass, so that a choice between single tokens costs no
    more than one of them. A row is computed in whole blocks of ``PREFILL_QUERIES`` positions, hence with the same
    products and sums whatever the other rows are.

    Attributes:
        n_truncated: continuations so far whose context was longer than the model's and lost its first tokens.

    Raises:
        GenerationError: ``batch_size`` is less than 1.
    """

    def __init__(self, engine: Engine, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise GenerationError(f"batch_size {batch_size} is less than 1; give 1 or more")
        self.engine, self.batch_size = engine, batch_size
        self.limit = context_limit(engine.model)
        self.n_truncated = 0

    @torch.inference_mode()
    def score(
        self, continuations: Sequence[Continuation], on_progress: OnProgress = ignore_progress, what: str = "scoring"
    ) -> list[Likelihood]:
        """Return the likelihood of each continuation, in their order.

        A context that is too long for the model loses its first tokens.

        Args:
            on_progress: called after each pass.
            what: the work, in the words of its progress.

        Raises:
            GenerationError: a context or continuation is empty, a continuation alone exceeds the model's context, an
                id is outside the vocabulary, or a pass does not fit into memory.
        """
        members: dict[_Row, list[int]] = {}
        for number, continuation in enumerate(continuations):
            members.setdefault(self._row(continuation), []).append(number)
        # Rows of about one length share a pass, which then has little padding.
        rows = sorted(members, key=lambda row: len(row.ids), reverse=True)
        if rows:
            self._refuse_oversize(len(rows[0].ids), min(self.batch_size, len(rows)))
        found: list[Likelihood | None] = [None] * len(continuations)
        scored = ProgressCounter(on_progress, what, "answers", len(continuations))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            targets = [[continuations[number].ids[-1] for number in members[row]] for row in batch]
            for row, scores in zip(batch, self._pass(batch, targets), strict=True):
                for number, (logprob, is_greedy) in zip(members[row], scores, strict=True):
                    found[number] = Likelihood(logprob, is_greedy)
            scored.add(sum(map(len, targets)))
        return [likelihood for likelihood in found if likelihood is not None]

    def _row(self, continuation: Continuation) -> _Row:
        """Return the pass of a continuation, without the first tokens of a context that is too long."""
        context, ids = continuation.context, continuation.ids
        vocab_size = self.engine.model.config.vocab_size or 0
        if not context or not ids:
            raise GenerationError("a continuation to score, or its context, has no tokens")
        if not 0 <= min(*context, *ids) <= max(*context, *ids) < vocab_size:
            raise GenerationError(f"a continuation to score has an id outside the vocabulary of {vocab_size}")
        if self.limit is not None and len(ids) > self.limit:
            raise GenerationError(
                f"a continuation to score has {len(ids):,} tokens, and the model's context is {self.limit:,}; leave "
                "the task out, or train with a larger data.max_length"
            )
        inputs = (*context, *ids[:-1])
        n_dropped = 0 if self.limit is None else max(0, len(inputs) - self.limit)
        self.n_truncated += n_dropped > 0
        return _Row(inputs[n_dropped:], len(context) - 1 - n_dropped)

    def _pass(self, rows: Sequence[_Row], targets: Sequence[Sequence[int]]) -> list[list[tuple[float, bool]]]:
        """Return (log-likelihood, whether greedy) of each row with each of its ``targets`` as the last token."""
        engine = self.engine
        lengths = [len(row.ids) for row in rows]
        padded = -(-max(lengths) // PREFILL_QUERIES) * PREFILL_QUERIES
        input_ids = torch.zeros(len(rows), padded, dtype=torch.long)
        for slot, row in enumerate(rows):
            input_ids[slot, : len(row.ids)] = torch.tensor(row.ids)
        capacity = whole_blocks(padded)
        cache = KVCache.allocate(engine.model.config, len(rows), capacity, engine.device, engine.cache_dtype)
        hidden = engine.model.hidden_states(input_ids.to(engine.device), cache, lengths)
        del cache
        # Of each row: the log probabilities of its own tokens, then those of the targets.
        own: list[list[float]] = [[] for _ in rows]
        greedy = [True] * len(rows)
        ends: list[list[tuple[float, bool]]] = [[] for _ in rows]
        for start in range(0, padded, PREFILL_QUERIES):
            slots: list[int] = []
            places: list[int] = []
            tokens: list[int] = []
            for slot, row in enumerate(rows):
                for place in range(max(row.first, start), min(len(row.ids), start + PREFILL_QUERIES)):
                    following = [row.ids[place + 1]] if place + 1 < len(row.ids) else targets[slot]
                    slots += [slot] * len(following)
                    places += [place] * len(following)
                    tokens += following
            if not slots:
                continue
            picked, best = self._pick(hidden[:, start : start + PREFILL_QUERIES], slots, places, tokens, start)
            for slot, place, token, logprob, likeliest in zip(slots, places, tokens, picked, best, strict=True):
                if place + 1 < len(rows[slot].ids):
                    own[slot].append(logprob)
                    greedy[slot] &= token == likeliest
                else:
                    ends[slot].append((logprob, token == likeliest))
        return [
            [(math.fsum((*own[slot], logprob)), greedy[slot] and is_last) for logprob, is_last in ends[slot]]
            for slot in range(len(rows))
        ]

    def _pick(
        self, hidden: Tensor, slots: list[int], places: list[int], tokens: list[int], start: int
    ) -> tuple[list[float], list[int]]:
        """Return the log probability of each token at its place, and the most likely token there.

        ``hidden`` (B, T, D) holds the positions from ``start`` on.
        """
        logits = self.engine.model.logits(hidden).float()
        at = torch.tensor(slots, device=logits.device), torch.tensor(places, device=logits.device) - start
        chosen = logits[at]
        if not torch.isfinite(chosen).all():
            raise GenerationError(
                "the model's logits are not finite: its weights are damaged, or its training diverged"
            )
        logprobs = chosen.log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        return logprobs[:, 0].tolist(), chosen.argmax(-1).tolist()

    def _refuse_oversize(self, length: int, n_rows: int) -> None:
        """Raise GenerationError where a pass over ``n_rows`` rows of ``length`` tokens cannot fit into memory."""
        config, device = self.engine.model.config, self.engine.device
        padded = -(-length // PREFILL_QUERIES) * PREFILL_QUERIES
        needed = cache_bytes(config, n_rows, padded, self.engine.cache_dtype.itemsize)
        needed += 4 * n_rows * padded * (2 * config.d_model + (config.d_mlp or 0))
        needed += 4 * n_rows * PREFILL_QUERIES * (config.vocab_size or 0)
        memory = gpu_memory_bytes(device) if device.type == "cuda" else machine_memory_bytes()
        if memory is not None and needed > memory:
            has = f"the GPU has {memory / 1e9:,.1f} GB" if device.type == "cuda" else describe_memory()
            raise GenerationError(
                f"{n_rows:,} rows of {length:,} tokens per pass need {needed / 1e9:,.1f} GB, and {has}; lower the "
                "batch size"
            )
