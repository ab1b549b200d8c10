"""Limits of GPU-03: measured throughput against the matrix peak and against published figures.

A model's size decides which fraction of the matrix peak its products can reach. The card decides whether there is a
published figure to compare with. The two limits are independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from psannlm.gpu_suite.context import CheckContext
from psannlm.gpu_suite.measures import at_least, at_most, none_of
from psannlm.reports.schemas.gpu import Measure
from psannlm.reports.schemas.measured import Spread
from psannlm.runtime.device import describe_device

# A dry run has no throughput limits; a card of the published generation is compared with published figures, any other
# only with its own matrix peak.
Card = Literal["dry run", "published", "other"]

# Published in November 2025 by the project that these models come from: forward passes of two H200s at 131,072 batch
# tokens, 4 layers of 256, float32, in tokens per second.
PUBLISHED_FORWARD = {"respsann": 614_700.0, "waveresnet": 612_600.0}
PUBLISHED_BY = "published in November 2025 for two H200s, 131,072 tokens, float32, forward"
_PUBLISHED_TOKENS = 131_072
_OVER_PUBLISHED = 10.0
# GPUs of the published generation and later, by parts of their names: only these are compared with H200 figures.
_PUBLISHED_GPUS = ("H100", "H200", "GH200", "B100", "B200", "B300")
# Least fractions of the measured matrix peak: of a memory-bound model, on any card, and of a compute-bound one.
SMALL_FRACTION = 0.05
LARGE_FRACTIONS: dict[Card, float] = {"published": 0.5, "other": 0.25}
_SPREAD_LIMIT = 0.2
_SINE_COST_LIMIT = 1.05
_RATE_REGRESSION = 0.05
# Limit of a ratio in a dry run: more than any value.
_ANY = 1e3
_NOTHING = "no throughput limit applies in a dry run"
_SMALL_WHY = "matrices this narrow are memory-bound, not compute-bound; less is a step that waits"
# Fraction of a training token's operations that the forward pass makes.
_FORWARD_FRACTION = 1 / 3


@dataclass(frozen=True)
class Rates:
    """Throughput of one model at one batch size.

    Attributes:
        forward: throughput of forward passes, or None if they were not timed.
        utilisation: fraction of the matrix peak that training reaches.
        flops_per_token: operations per training token.
        peak_flops_per_s: measured rate of large matrix products, interleaved with the training.
        problems: reasons to distrust the figures, such as a non-finite loss.
    """

    training: Spread
    forward: Spread | None
    utilisation: float
    flops_per_token: int
    peak_flops_per_s: float
    problems: tuple[str, ...] = ()

    def rate_at(self, fraction: float, *, is_forward: bool = False) -> float:
        """Return the tokens per second at ``fraction`` of the peak; 1 if no peak was measured."""
        rate = fraction * self.peak_flops_per_s / (self.flops_per_token * (_FORWARD_FRACTION if is_forward else 1.0))
        return rate if math.isfinite(rate) else 1.0


def card_of(context: CheckContext) -> Card:
    """Return which throughput limits apply to the device."""
    if context.is_dry_run:
        return "dry run"
    is_published = context.is_gpu and any(name in describe_device(context.device) for name in _PUBLISHED_GPUS)
    return "published" if is_published else "other"


def rate_measures(rates: Mapping[str, Rates], sine_cost: float, batch_tokens: int, card: Card) -> list[Measure]:
    """Return throughput, utilisation and spread of every base at one batch size, and the cost of the sine."""
    measures = []
    is_dry_run = card == "dry run"
    for name, found in rates.items():
        case, training = f"{name}, {batch_tokens:,} tokens", found.training
        uneven = "a larger spread comes from other load on the machine, or from heat"
        measures += [
            _problems(case, found.problems),
            _throughput(f"{case}: training", training, *_least_rate(found, card, SMALL_FRACTION, _SMALL_WHY)),
            _throughput(
                f"{case}: forward", found.forward or Spread.of([math.nan]), *_forward(name, found, batch_tokens, card)
            ),
            _utilisation(case, found, card, SMALL_FRACTION, _SMALL_WHY),
            at_most(
                f"{case}: spread of training",
                (training.highest - training.lowest) / training.median,
                _ANY if is_dry_run else _SPREAD_LIMIT,
                "of the median",
                _NOTHING if is_dry_run else uneven,
            ),
        ]
    measures.append(
        at_most(
            f"{batch_tokens:,} tokens: a step with the sine / with GELU",
            sine_cost,
            _ANY if is_dry_run else _SINE_COST_LIMIT,
            "x",
            _NOTHING if is_dry_run else "the sine is one pass over memory in each direction, like GELU",
        )
    )
    return measures


def large_measures(case: str, found: Rates, card: Card) -> list[Measure]:
    """Return throughput and utilisation of a compute-bound model."""
    fraction = LARGE_FRACTIONS.get(card, 0.0)
    why = "matrix products are most of the work at this size, and good code reaches half of the measured peak"
    if card == "other":
        why = "matrix products are most of the work at this size; the fraction of the peak in reach is unknown here"
    return [
        _problems(case, found.problems),
        _throughput(f"{case}: training", found.training, *_least_rate(found, card, fraction, why)),
        _utilisation(case, found, card, fraction, why),
    ]


def _least_rate(found: Rates, card: Card, fraction: float, why: str, *, is_forward: bool = False) -> tuple[float, str]:
    """Return the lowest throughput that passes, and the reason."""
    if card == "dry run":
        return 0.0, _NOTHING
    reason = f"{fraction:.0%} of the measured rate of large matrix products: {why}"
    return found.rate_at(fraction, is_forward=is_forward), reason


def _forward(name: str, found: Rates, batch_tokens: int, card: Card) -> tuple[float, str]:
    limit, reason = _least_rate(found, card, SMALL_FRACTION, _SMALL_WHY, is_forward=True)
    if name not in PUBLISHED_FORWARD or batch_tokens != _PUBLISHED_TOKENS or card == "dry run":
        return limit, reason
    if card == "other":
        return limit, f"{reason}; the figures published for H200s do not apply to this card"
    published = PUBLISHED_FORWARD[name]
    return _OVER_PUBLISHED * published, f"ten times {published:,.0f}, published for two H200s in float32"


def _problems(case: str, problems: Sequence[str]) -> Measure:
    reason = "steps that learn nothing may be faster, so their throughput does not count"
    return none_of(f"{case}: problems of the training that is timed", problems, "problems", reason)


def _throughput(name: str, spread: Spread, limit: float, reason: str) -> Measure:
    edges = (spread.lowest, spread.highest)
    return at_least(name, spread.median, limit, "tokens/s", reason, regression=_RATE_REGRESSION, spread=edges)


def _utilisation(case: str, found: Rates, card: Card, fraction: float, why: str) -> Measure:
    limit, reason = (0.0, _NOTHING) if card == "dry run" else (fraction, why)
    return at_least(
        f"{case}: utilisation", found.utilisation, limit, "of the peak", reason, regression=_RATE_REGRESSION
    )
