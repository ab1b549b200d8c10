"""Continuations of the same prompts, made in several ways, in; where they part, and whether rounding explains it, out.

Every token is held against full forward passes without a cache. Letters: N new tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from psannlm.benchmarks.decoding.modes import DecodeRun, Prompts
from psannlm.models.transformer import Transformer

FULL_PASS = "one full forward pass"
_DEVIATIONS = 4.0


@dataclass(frozen=True)
class Rounding:
    """What rounding does to a model's logits, told by full passes alone: no cache has a part in it.

    Attributes:
        exact: the model in float32, or in float64 where it decodes in float32.
        rounded: the same with weights and activations in bfloat16, or in float32.
    """

    exact: Transformer
    rounded: Transformer

    def tolerance(self, prompt: Sequence[int], ids: Sequence[int]) -> float:
        """Return how far apart two logits can be and still change places by rounding, after ``prompt`` and in ``ids``.

        With s the root mean square of what rounding does to a logit: in bfloat16 half of s² comes from the weights,
        which are the same in all ways of decoding, and half from the activations. Two ways that each round activations
        thus differ by s in a logit and by √2 s between two logits; four times that is allowed. In float32, where sums
        alone are rounded, the same is a little strict.
        """
        noise = new_logits(self.rounded, prompt, ids) - new_logits(self.exact, prompt, ids)
        return _DEVIATIONS * math.sqrt(2.0) * noise.square().mean().sqrt().item()


@dataclass(frozen=True)
class Difference:
    """A new token, counted from 0, at which two ways of decoding part; ``gap`` is between its logits."""

    row: int
    place: int
    first: str
    first_token: int
    second: str
    second_token: int
    gap: float
    tolerance: float = 0.0

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.gap <= self.tolerance

    def __str__(self) -> str:
        limit = (
            f"up to {self.tolerance:.2g} would be a tie of rounding"
            if self.tolerance
            else "below about 1e-5, rounding may decide: try another --seed"
        )
        return (
            f"outputs differ first at row {self.row}, new token {self.place}: {self.first_token} with {self.first}, "
            f"{self.second_token} with {self.second}; in a full forward pass their logits are {self.gap:.2g} apart "
            f"({limit})"
        )


@dataclass(frozen=True)
class Agreement:
    """The outcome of comparing all runs.

    Attributes:
        difference: the earliest token that rounding does not explain, or None.
        tied_places: (row, place) pairs at which some way chose another token within the tolerance.
        largest_tie: the widest gap among them; 0 without a tie.
        largest_tolerance: the widest gap that would have counted as one.
        n_checked: tokens that were compared, in all runs.
    """

    difference: Difference | None
    tied_places: int
    largest_tie: float
    largest_tolerance: float
    n_checked: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def compare(
    model: Transformer,
    prompts: Prompts,
    runs: Mapping[str, Sequence[DecodeRun]],
    rounding: Rounding | None = None,
) -> Agreement:
    """Compare all runs with the first run of the first way, and that one with full forward passes.

    A run that went its own way after a tie is compared with full passes over its own tokens from there on.

    Args:
        model: what decoded, for the full passes.
        rounding: what makes a tie; None: nothing does, every difference counts.
    """
    every = [(name, run) for name, made in runs.items() for run in made]
    partings: list[Difference] = []
    widest = 0.0
    for row, prompt in enumerate(prompts):
        tolerance = 0.0 if rounding is None else rounding.tolerance(prompt, every[0][1].ids[row])
        widest = max(widest, tolerance)
        partings += _partings(model, row, prompt, every, tolerance)
    ties = [found for found in partings if found.is_tie]
    real = [found for found in partings if not found.is_tie]
    return Agreement(
        difference=min(real, key=lambda found: (found.place, found.row), default=None),
        tied_places=len({(found.row, found.place) for found in ties}),
        largest_tie=max((found.gap for found in ties), default=0.0),
        largest_tolerance=widest,
        n_checked=sum(len(ids) for _, run in every for ids in run.ids),
    )


def _partings(
    model: Transformer, row: int, prompt: Sequence[int], every: Sequence[tuple[str, DecodeRun]], tolerance: float
) -> Iterator[Difference]:
    """Every place of one row at which two ways chose differently after the same tokens."""
    (first, reference), *others = every
    mine = reference.ids[row]
    logits = new_logits(model, prompt, mine)
    everywhere = range(len(mine))
    for place, choice in _mismatches(everywhere, mine, logits.argmax(dim=-1).tolist()):
        yield _parting(row, place, first, mine[place], FULL_PASS, choice, logits, tolerance)
    for name, run in others:
        yours = run.ids[row]
        if run.places is not None:
            for place, choice in _mismatches(run.places, [mine[place] for place in run.places], yours):
                yield _parting(row, place, first, mine[place], name, choice, logits, tolerance)
            continue
        for start, choice in islice(_mismatches(everywhere, mine, yours), 1):
            yield _parting(row, start, first, mine[start], name, choice, logits, tolerance)
            own = new_logits(model, prompt, yours)
            for place, token in _mismatches(everywhere, yours, own.argmax(dim=-1).tolist()):
                if place > start:
                    yield _parting(row, place, name, yours[place], FULL_PASS, token, own, tolerance)


def _parting(
    row: int, place: int, first: str, token: int, second: str, other: int, logits: Tensor, tolerance: float
) -> Difference:
    gap = float((logits[place, token] - logits[place, other]).abs())
    return Difference(row, place, first, token, second, other, gap, tolerance)


@torch.inference_mode()
def new_logits(model: Transformer, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the float32 logits (N, V) before each of ``ids`` after ``prompt``, by one pass without a cache."""
    sequence = torch.tensor([[*prompt, *ids[:-1]]], device=model.embedding.weight.device)
    return model.logits(model.hidden_states(sequence)[0, len(prompt) - 1 :]).float()


def _mismatches(places: Sequence[int], mine: Sequence[int], yours: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each place where the two differ, and what ``yours`` is there."""
    for place, a, b in zip(places, mine, yours, strict=True):
        if a != b:
            yield place, b
