"""Limits of GPU-03: measured throughput against the matrix peak and against published figures.

A model's size decides which fraction of the matrix peak its products can reach. The card decides whether there is a
published figure to compare with. The two limits are independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from psannlm.benchmarks.harness.interleaved import Spread
from psannlm.gpu_suite.context import CheckContext
from psannlm.gpu_suite.report import Measure, at_least, at_most, none_of
from psannlm.runtime.device import describe_device

# A rehearsal holds rates against nothing; a published card against figures of its generation, any other against its
# own matrix peak alone.
Card = Literal["dry run", "published", "other"]

# What the project that these models come from published in November 2025: forward passes of two H200s at 131,072 batch
# tokens, 4 layers of 256, float32, in tokens per second.
PUBLISHED_FORWARD = {"respsann": 614_700.0, "waveresnet": 612_600.0}
PUBLISHED_BY = "published in November 2025 for two H200s, 131,072 tokens, float32, forward"
_PUBLISHED_TOKENS = 131_072
_OVER_PUBLISHED = 10.0
# GPUs of the published generation and later, by parts of their names: only these are held against figures of H200s.
_PUBLISHED_GPUS = ("H100", "H200", "GH200", "B100", "B200", "B300")
# Shares of the measured matrix peak: of a model that memory binds, on any card, and of one that products bind.
SMALL_FRACTION = 0.05
LARGE_FRACTIONS: dict[Card, float] = {"published": 0.5, "other": 0.25}
_SPREAD_LIMIT = 0.2
_SINE_COST_LIMIT = 1.05
_RATE_REGRESSION = 0.05
# What a rehearsal allows of a ratio: more than any.
_ANY = 1e3
_NOTHING = "no throughput limit applies in a dry run"
_SMALL_WHY = "matrices this narrow are bound by memory, not by arithmetic; less is a step that waits"
# Of the operations of a training token, those of the forward pass.
_FORWARD_FRACTION = 1 / 3


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one model at one batch size.

    Attributes:
        forward: of forward passes, or None where they were not timed.
        utilisation: fraction of the matrix peak that training reaches.
        flops_per_token: of training.
        peak_flops_per_s: at which large matrices were multiplied in the same turns.
        problems: what makes these worth less, a loss that is no number above all.
    """

    training: Spread
    forward: Spread | None
    utilisation: float
    flops_per_token: int
    peak_flops_per_s: float
    problems: tuple[str, ...] = ()

    def rate_at(self, fraction: float, *, is_forward: bool = False) -> float:
        """Return the tokens per second at ``fraction`` of the peak; one token where no peak was measured."""
        rate = fraction * self.peak_flops_per_s / (self.flops_per_token * (_FORWARD_FRACTION if is_forward else 1.0))
        return rate if math.isfinite(rate) else 1.0


def card_of(context: CheckContext) -> Card:
    """Return what there is to hold a rate against."""
    if context.is_dry_run:
        return "dry run"
    is_published = context.is_gpu and any(name in describe_device(context.device) for name in _PUBLISHED_GPUS)
    return "published" if is_published else "other"


def rate_measures(rates: Mapping[str, Rates], sine_cost: float, batch_tokens: int, card: Card) -> list[Measure]:
    """Return rates, utilisation and spread of every base at one batch size, and what the sine costs."""
    measures = []
    is_dry_run = card == "dry run"
    for name, found in rates.items():
        case, training = f"{name}, {batch_tokens:,} tokens", found.training
        uneven = "turns that differ by more come from a machine that does something else, or runs hot"
        measures += [
            _problems(case, found.problems),
            _rate(f"{case}: training", training, *_least_rate(found, card, SMALL_FRACTION, _SMALL_WHY)),
            _rate(
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
            _NOTHING if is_dry_run else "the sine is one pass over memory each way, as GELU is",
        )
    )
    return measures


def large_measures(case: str, found: Rates, card: Card) -> list[Measure]:
    """Return rate and utilisation of a model that is large enough for its products to be most of the work."""
    fraction = LARGE_FRACTIONS.get(card, 0.0)
    why = "products are most of the work at this size, and half of the measured peak is what good code reaches"
    if card == "other":
        why = "products are most of the work at this size; how much of the peak good code reaches is not known here"
    return [
        _problems(case, found.problems),
        _rate(f"{case}: training", found.training, *_least_rate(found, card, fraction, why)),
        _utilisation(case, found, card, fraction, why),
    ]


def _least_rate(found: Rates, card: Card, fraction: float, why: str, *, is_forward: bool = False) -> tuple[float, str]:
    """Return the lowest rate that passes, and why it does."""
    if card == "dry run":
        return 0.0, _NOTHING
    reason = f"{fraction:.0%} of the rate at which large matrices were multiplied in the same turns: {why}"
    return found.rate_at(fraction, is_forward=is_forward), reason


def _forward(name: str, found: Rates, batch_tokens: int, card: Card) -> tuple[float, str]:
    limit, reason = _least_rate(found, card, SMALL_FRACTION, _SMALL_WHY, is_forward=True)
    if name not in PUBLISHED_FORWARD or batch_tokens != _PUBLISHED_TOKENS or card == "dry run":
        return limit, reason
    if card == "other":
        return limit, f"{reason}; what was published for H200s says nothing of this card"
    published = PUBLISHED_FORWARD[name]
    return _OVER_PUBLISHED * published, f"ten times {published:,.0f}, published for two H200s in float32"


def _problems(case: str, problems: Sequence[str]) -> Measure:
    reason = "steps that learn nothing may be quicker than steps that do: their rate says nothing"
    return none_of(f"{case}: problems of the training that is timed", problems, "problems", reason)


def _rate(name: str, spread: Spread, limit: float, reason: str) -> Measure:
    edges = (spread.lowest, spread.highest)
    return at_least(name, spread.median, limit, "tokens/s", reason, regression=_RATE_REGRESSION, spread=edges)


def _utilisation(case: str, found: Rates, card: Card, fraction: float, why: str) -> Measure:
    limit, reason = (0.0, _NOTHING) if card == "dry run" else (fraction, why)
    return at_least(
        f"{case}: utilisation", found.utilisation, limit, "of the peak", reason, regression=_RATE_REGRESSION
    )
