"""Batched sampling of the next token: temperature, top-k, top-p, min-p, repetition penalty.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from psannlm.errors import GenerationError

_RANGE = torch.finfo(torch.float32)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 chooses the most likely token (greedy), where only the penalty still applies.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p; None keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred; None: no penalty.
        seed: of every row, so that a row's text does not depend on the batch; None: a random seed for each row.
        min_p: keep the tokens whose probability, after the temperature, is at least this fraction of the most likely
            token's; None keeps all.

    Raises:
        GenerationError: a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.9
    repetition_penalty: float | None = None
    seed: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature)
        for name in ("top_p", "repetition_penalty", "min_p"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), is_whole=True)
        # Written so that a NaN fails each of them.
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature {self.temperature} is not a number of 0 or more; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k {self.top_k} keeps no token; use 1 or more, or leave it out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty < float("inf"):
            raise GenerationError(f"repetition_penalty {self.repetition_penalty} is not above 0; 1 is no penalty")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise GenerationError(f"min_p {self.min_p} is not in [0, 1]; 0 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed {self.seed} is not in 0 .. 2**63 - 1")


def require_number(name: str, value: object, *, is_whole: bool = False) -> None:
    """Raise GenerationError unless ``value``, of the argument ``name``, is a number; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
        raise GenerationError(f"{name} {value!r:.60} is not a {'whole ' if is_whole else ''}number")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with those of ``seen`` tokens, (B, V) boolean, made less likely.

    CTRL (Keskar et al. 2019, arXiv 1909.05858) divides every logit. Here negative ones are multiplied, as other
    libraries do, because dividing would make them likelier. The number of occurrences does not matter.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with all but the k highest of each row at minus infinity; ties with the k-th are kept."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) cut to the nucleus (Holtzman et al. 2019, arXiv 1904.09751).

    Tokens are kept, from the most likely on, while the total probability *before* them is below p: the token that
    crosses the threshold is kept, so that there is always one.
    """
    if p >= 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    # In float32 the error of a sum over a large vocabulary exceeds the probability of many tokens.
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= p).scatter(-1, index, before >= p)
    return logits.masked_fill(dropped, float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with tokens less likely than ``p`` times the most likely one at minus infinity.

    Min-p sampling (Nguyen et al. 2024, arXiv 2407.01082). The most likely token is always kept.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), float("-inf"))


def next_tokens(
    logits: Tensor,
    config: SamplingConfig,
    uniforms: Tensor | None,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
) -> Tensor:
    """Return the next token of each row, (B,) int64.

    Args:
        logits: (B, V), any floating dtype.
        uniforms: (B,) in [0, 1), one random number per row; required unless the temperature is 0.
        seen: (B, V) boolean, the tokens that occur in a row; required for a repetition penalty.
        forbidden: int64 ids that are never chosen, fewer than V.

    Raises:
        GenerationError: the logits are not finite.
    """
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise GenerationError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if config.repetition_penalty is not None and seen is not None:
        # An extreme penalty can overflow float32, and a softmax of infinities is NaN.
        penalty = _in_range(config.repetition_penalty)
        logits = penalise_repetition(logits, seen, penalty).clamp(_RANGE.min, _RANGE.max)
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, float("-inf"))
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    if uniforms is None:
        raise ValueError("sampling needs a random number per row")
    # Shifted so that the highest logit is 0: a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / _in_range(config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return _draw(logits, uniforms)


def _in_range(value: float) -> float:
    """Return a positive number as a normal float32: neither 0 / 0 nor infinity / infinity can come of it."""
    return min(max(value, _RANGE.tiny), _RANGE.max)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which each row's cumulative distribution exceeds its uniform number."""
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The first token whose cumulative probability exceeds u; a token of probability 0 is never chosen.
    chosen = torch.searchsorted(cumulative, uniforms.double()[:, None] * total, right=True).squeeze(1)
    last_possible = torch.searchsorted(cumulative, total.contiguous()).squeeze(1)
    return torch.minimum(chosen, last_possible)
