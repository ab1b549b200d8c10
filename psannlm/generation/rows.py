"""Rows of decoding: the settings, random numbers and tokens of each sequence, and the choice of their next tokens.

Every row has settings of its own, and what it gets depends on nothing else in the batch. B is the number of rows; other
letters as in ``psannlm.models``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from psannlm.generation.engine import Engine
from psannlm.generation.logprobs import token_logprobs
from psannlm.generation.requests import FinishReason, SamplingConfig, TokenLogprob
from psannlm.generation.sampling import next_tokens
from psannlm.generation.speculative import PromptLookup
from psannlm.models.kv_cache import KVCache

# Random numbers drawn at a time for each row.
_DRAWN_AT_ONCE = 64


class Row:
    """One sequence: a prompt, how its tokens are chosen, and those chosen so far.

    Args:
        prompt: ids, at least one.
        max_new_tokens: most new tokens.
        sampling: how a token is chosen. Without a seed the row gets one from torch's default generator, so that
            ``torch.manual_seed`` makes sampling repeatable.
        eos_id: the token that ends the row, not part of its text; None: no token does.
        context: most tokens of prompt and new tokens together; None: no limit.
        speculates: whether the row is indexed for draft tokens.
        n_top: how many of the most likely tokens to record with each new one; None: record no log probabilities.

    Attributes:
        generated: the new ids.
        logprobs: of each new token; empty unless they are recorded.
        end_logprob: of the token ``eos_id`` that ended the row, where they are recorded.
        finish_reason: ``stop`` (end of text, or :meth:`finish`), ``length`` (``max_new_tokens``) or ``context``
            (full). It means something once the row has finished.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        eos_id: int | None,
        context: int | None = None,
        speculates: bool = False,
        n_top: int | None = None,
    ) -> None:
        self.prompt = list(prompt)
        # Rows with equal settings are sampled together; the seed is no setting of a batch.
        self.sampling = replace(sampling, seed=None)
        self.eos_id, self.n_top = eos_id, n_top
        space = max_new_tokens if context is None else context - len(self.prompt)
        self.max_new = min(max_new_tokens, space)
        self.finish_reason: FinishReason = "context" if space < max_new_tokens else "length"
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.end_logprob: TokenLogprob | None = None
        self.lookup = PromptLookup(self.prompt) if speculates else None
        seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else int(sampling.seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._uniforms: list[float] = []
        self._seen: Tensor | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the row has all of its tokens."""
        return len(self.generated) >= self.max_new

    @property
    def next_input(self) -> int:
        """The newest token, which the next pass continues; 0 for a row without one, which fills a slot."""
        return self.generated[-1] if self.generated else 0

    def finish(self) -> None:
        """End the row after its newest token, for the reason ``stop``."""
        self.max_new = len(self.generated)
        self.finish_reason = "stop"

    def uniforms(self, n_tokens: int) -> list[float]:
        """Return the random numbers of the next positions; every position has its own."""
        first = len(self.generated)
        while len(self._uniforms) < first + n_tokens:
            self._uniforms += torch.rand(_DRAWN_AT_ONCE, generator=self._generator).tolist()
        return self._uniforms[first : first + n_tokens]

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Return which tokens occur in the row, (V,) boolean; later tokens are added to it in place."""
        if self._seen is None:
            seen = torch.zeros(vocab_size, dtype=torch.bool)
            seen[self.prompt] = True
            seen[self.generated] = True
            self._seen = seen.to(device)
        return self._seen

    def draft(self, n_tokens: int) -> list[int]:
        """Return at most ``n_tokens`` draft tokens, so few that one more token still fits."""
        left = self.max_new - len(self.generated) - 1
        if self.lookup is None or min(n_tokens, left) <= 0:
            return []
        return self.lookup.draft(min(n_tokens, left))

    def append(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> Iterator[int]:
        """Append tokens up to the one that ends the row, and yield each once it is appended."""
        first = len(self.generated)
        for at, token in enumerate(tokens):
            if token == self.eos_id:
                self.finish()
                self.end_logprob = None if logprobs is None else logprobs[at]
                break
            self.generated.append(token)
            if logprobs is not None:
                self.logprobs.append(logprobs[at])
            yield token
            if self.is_finished:
                break
        added = self.generated[first:]
        if self._seen is not None and added:
            self._seen[added] = True
        if self.lookup is not None:
            self.lookup.extend(added)


class RowBatch:
    """Rows that are decoded together, each in the row of the same number of one KV cache.

    A pass is :meth:`forward`, then :meth:`settle`. Rows may be exchanged between two passes.

    Args:
        rows: their prompts, and what they have generated but the newest token, are in ``cache``.
        forbidden: int64 ids that are never chosen.
        speculate: most draft tokens per pass.
        limit: most tokens of a row in the cache; None: no limit.

    Attributes:
        n_passes, n_drafted, n_accepted: decoding passes, draft tokens, and accepted draft tokens.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Row],
        cache: KVCache,
        *,
        forbidden: Tensor,
        speculate: int = 0,
        limit: int | None = None,
    ) -> None:
        self.engine, self.rows, self.cache = engine, list(rows), cache
        self.forbidden, self.speculate, self.limit = forbidden, speculate, limit
        self.n_passes = self.n_drafted = self.n_accepted = 0
        self._drafts: list[list[int]] = [[] for _ in self.rows]

    def select(self, slots: Sequence[int]) -> None:
        """Keep only the rows in these slots."""
        self.rows = [self.rows[slot] for slot in slots]
        self.cache = self.cache.select(slots)

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """Return the logits (B, T, V) after the newest token of each row and after each draft token behind it."""
        self._drafts = [self._draft(row, length) for row, length in zip(self.rows, self.cache.lengths, strict=True)]
        n_tokens = 1 + (self.speculate if any(self._drafts) else 0)
        ids = [
            [row.next_input, *draft, *[0] * (n_tokens - 1 - len(draft))]
            for row, draft in zip(self.rows, self._drafts, strict=True)
        ]
        self.n_passes += 1
        return self.engine.forward_tokens(torch.tensor(ids, device=self.engine.device), self.cache)

    def _draft(self, row: Row, length: int) -> list[int]:
        if not self.speculate or row.is_finished:
            return []
        return row.draft(self.speculate if self.limit is None else min(self.speculate, self.limit - length - 1))

    def settle(self, logits: Tensor) -> Iterator[tuple[int, int]]:
        """Choose the tokens of a pass, append them to the rows and commit them to the cache.

        Args:
            logits: (B, T, V), of :meth:`forward`, or of a prefill with T = 1.

        Yields:
            (slot, token) of each appended token. The caller may finish the row before it takes the next.
        """
        chosen = choose_tokens(self.rows, logits, self._drafts, self.forbidden)
        scored = _score(self.rows, logits, chosen)
        n_kept = []
        for slot, row in enumerate(self.rows):
            # A finished row keeps its slot while compiled steps need the batch size they were compiled for.
            tokens = [] if row.is_finished else accepted_tokens(chosen[slot], self._drafts[slot])
            for token in row.append(tokens, scored.get(slot)):
                yield slot, token
            self.n_drafted += len(self._drafts[slot])
            self.n_accepted += max(0, len(tokens) - 1)
            n_kept.append(len(tokens))
        if self.cache.n_uncommitted:
            self.cache.commit(n_kept)


@torch.no_grad()
def choose_tokens(
    rows: Sequence[Row], logits: Tensor, drafts: Sequence[Sequence[int]], forbidden: Tensor
) -> list[list[int]]:
    """Return the token chosen after each of the T positions of each row of ``logits`` (B, T, V); none if finished.

    Raises:
        GenerationError: the logits are not finite.
    """
    groups: dict[SamplingConfig, list[int]] = {}
    for slot, row in enumerate(rows):
        if not row.is_finished:
            groups.setdefault(row.sampling, []).append(slot)
    chosen: list[list[int]] = [[] for _ in rows]
    for sampling, slots in groups.items():
        part = logits if len(slots) == len(rows) else logits[slots]
        found = _choose([rows[s] for s in slots], sampling, part, [drafts[s] for s in slots], forbidden)
        for slot, tokens in zip(slots, found, strict=True):
            chosen[slot] = tokens
    return chosen


def _choose(
    rows: Sequence[Row], sampling: SamplingConfig, logits: Tensor, drafts: Sequence[Sequence[int]], forbidden: Tensor
) -> list[list[int]]:
    """Return the tokens chosen for rows of equal settings."""
    n_rows, n_tokens, vocab_size = logits.shape
    uniforms = seen = None
    if sampling.temperature > 0.0:
        drawn = [row.uniforms(n_tokens) for row in rows]
        uniforms = torch.tensor(drawn, dtype=torch.float32, device=logits.device).flatten()
    if sampling.repetition_penalty is not None:
        seen = torch.stack([row.seen(vocab_size, logits.device) for row in rows])
        seen = seen[:, None].repeat(1, n_tokens, 1)
        for slot, draft in enumerate(drafts):
            for at, token in enumerate(draft, start=1):
                seen[slot, at:, token] = True
        seen = seen.flatten(0, 1)
    tokens = next_tokens(logits.flatten(0, 1), sampling, uniforms, seen, forbidden)
    chosen: list[list[int]] = tokens.view(n_rows, n_tokens).tolist()
    return chosen


@torch.no_grad()
def _score(rows: Sequence[Row], logits: Tensor, chosen: Sequence[Sequence[int]]) -> dict[int, list[TokenLogprob]]:
    """Return the log probabilities of the chosen tokens of the rows that record them, by slot."""
    slots_by_n_top: dict[int, list[int]] = {}
    for slot, row in enumerate(rows):
        if row.n_top is not None and not row.is_finished:
            slots_by_n_top.setdefault(row.n_top, []).append(slot)
    scored: dict[int, list[TokenLogprob]] = {}
    for n_top, slots in slots_by_n_top.items():
        part = logits if len(slots) == len(rows) else logits[slots]
        scored.update(zip(slots, token_logprobs(part, [chosen[slot] for slot in slots], n_top), strict=True))
    return scored


def accepted_tokens(chosen: Sequence[int], draft: Sequence[int]) -> list[int]:
    """Return the chosen tokens up to and including the first that differs from the draft."""
    n_accepted = 0
    while n_accepted < len(draft) and draft[n_accepted] == chosen[n_accepted]:
        n_accepted += 1
    return list(chosen[: n_accepted + 1])
