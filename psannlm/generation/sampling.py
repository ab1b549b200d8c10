"""Logits of the next token to its id, for a whole batch at once.

Letters: B rows, V vocabulary.
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
        temperature: divides the logits; 0 takes the most likely token, and no other setting but the penalty matters.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p; None keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were seen; None leaves them.
        seed: of every row alike: a row's text does not depend on its company. None draws a new one for each row.

    Raises:
        GenerationError: a value is of another type, or outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.9
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature)
        for name in ("top_p", "repetition_penalty"):
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
            raise GenerationError(f"repetition_penalty {self.repetition_penalty} is not above 0; 1 changes nothing")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed {self.seed} is not in 0 .. 2**63 - 1")


def require_number(name: str, value: object, *, is_whole: bool = False) -> None:
    """Raise GenerationError unless ``value``, of the argument ``name``, is a number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
        raise GenerationError(f"{name} {value!r:.60} is not a {'whole ' if is_whole else ''}number")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with those of ``seen`` tokens, (B, V) boolean, made less likely as a ratio.

    CTRL (Keskar et al. 2019, arXiv 1909.05858) divides every logit; negative ones are multiplied here, as is usual
    since, because dividing would make them likelier. How often a token occurred does not matter.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with all but the k highest of each row at minus infinity; ties with the k-th all stay."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) cut to the nucleus (Holtzman et al. 2019, arXiv 1904.09751).

    Tokens stay, from the most likely on, while the probability *before* them is below p: the token that crosses the
    threshold stays, so there is always one.
    """
    if p >= 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    # A sum over a large vocabulary in float32 is off by more than many of its tokens have.
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= p).scatter(-1, index, before >= p)
    return logits.masked_fill(dropped, float("-inf"))


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
        uniforms: (B,) in [0, 1), one random number per row; needed unless the temperature is 0.
        seen: (B, V) boolean, which tokens a row holds already; needed for a repetition penalty.
        forbidden: (N,) int64, the ids that are never taken; fewer than V.

    Raises:
        GenerationError: the logits are not finite.
    """
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise GenerationError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if config.repetition_penalty is not None and seen is not None:
        # An extreme penalty may leave the range of float32, and infinities have no softmax.
        logits = penalise_repetition(logits, seen, config.repetition_penalty).clamp(_RANGE.min, _RANGE.max)
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, float("-inf"))
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    if uniforms is None:
        raise ValueError("sampling needs a random number per row")
    # Shifted first, so that a tiny temperature cannot overflow: the highest logit becomes 0, and 0 / 0 must not be had
    # from a temperature that float32 takes for zero.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(config.temperature, _RANGE.tiny)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    return _draw(logits, uniforms)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row at its uniform number."""
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The first token whose cumulative probability exceeds u: one that has no probability is never it.
    chosen = torch.searchsorted(cumulative, uniforms.double()[:, None] * total, right=True).squeeze(1)
    last_possible = torch.searchsorted(cumulative, total.contiguous()).squeeze(1)
    return torch.minimum(chosen, last_possible)
