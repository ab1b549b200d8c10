"""Batched sampling of the next token: temperature, top-k, top-p, min-p, repetition penalty.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.requests import SamplingConfig as SamplingConfig
from psannlm.generation.requests import require_number as require_number

_RANGE = torch.finfo(torch.float32)


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
    # The largest is NaN where any is; isfinite would take several passes over the logits.
    if not math.isfinite(logits.abs().amax()):
        raise GenerationError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if config.repetition_penalty is not None and seen is not None:
        # An extreme penalty can overflow float32, and a softmax of infinities is NaN.
        penalty = _in_range(config.repetition_penalty)
        logits = penalise_repetition(logits, seen, penalty).clamp(_RANGE.min, _RANGE.max)
    if forbidden is not None and len(forbidden):
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
