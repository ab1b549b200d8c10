"""Token parity of decoding modes: where their tokens differ, and whether rounding explains it.

Every token is compared with full forward passes without a cache. Shapes: N new tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from psannlm.benchmarks.decoding.modes import DecodeRun, Prompts
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import Agreement, Difference

FULL_PASS = "one full forward pass"
_DEVIATIONS = 4.0


@dataclass(frozen=True)
class Rounding:
    """Rounding error of a model's logits, measured by full forward passes without a cache.

    Attributes:
        exact: the model in float32, or in float64 if it decodes in float32.
        rounded: the same with weights and activations in bfloat16, or in float32.
    """

    exact: Transformer
    rounded: Transformer

    def tolerance(self, prompt: Sequence[int], ids: Sequence[int]) -> float:
        """Return the largest gap between two logits that rounding may reverse, for ``ids`` after ``prompt``.

        Let s be the root mean square of the rounding error of a logit. In bfloat16 half of s² comes from the weights,
        which are the same in all decoding modes, and half from the activations. Two modes that round activations
        independently thus differ by s in one logit and by √2 s in the gap between two; the tolerance is four times
        that. In float32, where only sums are rounded, it is a little strict.
        """
        noise = new_logits(self.rounded, prompt, ids) - new_logits(self.exact, prompt, ids)
        return _DEVIATIONS * math.sqrt(2.0) * noise.square().mean().sqrt().item()


def compare(
    model: Transformer,
    prompts: Prompts,
    runs: Mapping[str, Sequence[DecodeRun]],
    rounding: Rounding | None = None,
) -> Agreement:
    """Compare all runs with the first run of the first mode, and that run with full forward passes.

    After a tie, a run with other tokens is compared with full passes over its own tokens.

    Args:
        model: the decoding model, for the full passes.
        rounding: gives the tolerance of a tie; None: every difference counts.
    """
    every = [(name, run) for name, made in runs.items() for run in made]
    differences: list[Difference] = []
    widest = 0.0
    for row, prompt in enumerate(prompts):
        tolerance = 0.0 if rounding is None else rounding.tolerance(prompt, every[0][1].ids[row])
        widest = max(widest, tolerance)
        differences += _differences(model, row, prompt, every, tolerance)
    ties = [found for found in differences if found.is_tie]
    real = [found for found in differences if not found.is_tie]
    return Agreement(
        difference=min(real, key=lambda found: (found.place, found.row), default=None),
        tied_places=len({(found.row, found.place) for found in ties}),
        largest_tie=max((found.gap for found in ties), default=0.0),
        largest_tolerance=widest,
        n_checked=sum(len(ids) for _, run in every for ids in run.ids),
    )


def _differences(
    model: Transformer, row: int, prompt: Sequence[int], every: Sequence[tuple[str, DecodeRun]], tolerance: float
) -> Iterator[Difference]:
    """Yield each position of one row at which two modes chose different tokens after the same tokens."""
    (first, reference), *others = every
    mine = reference.ids[row]
    logits = new_logits(model, prompt, mine)
    everywhere = range(len(mine))
    for place, choice in _mismatches(everywhere, mine, logits.argmax(dim=-1).tolist()):
        yield _difference(row, place, first, mine[place], FULL_PASS, choice, logits, tolerance)
    for name, run in others:
        yours = run.ids[row]
        if run.places is not None:
            for place, choice in _mismatches(run.places, [mine[place] for place in run.places], yours):
                yield _difference(row, place, first, mine[place], name, choice, logits, tolerance)
            continue
        for start, choice in islice(_mismatches(everywhere, mine, yours), 1):
            yield _difference(row, start, first, mine[start], name, choice, logits, tolerance)
            own = new_logits(model, prompt, yours)
            for place, token in _mismatches(everywhere, yours, own.argmax(dim=-1).tolist()):
                if place > start:
                    yield _difference(row, place, name, yours[place], FULL_PASS, token, own, tolerance)


def _difference(
    row: int, place: int, first: str, token: int, second: str, other: int, logits: Tensor, tolerance: float
) -> Difference:
    gap = float((logits[place, token] - logits[place, other]).abs())
    return Difference(row, place, first, token, second, other, gap, tolerance)


@torch.inference_mode()
def new_logits(model: Transformer, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the float32 logits (N, V) that predict each of ``ids`` after ``prompt``, by one pass without a cache."""
    sequence = torch.tensor([[*prompt, *ids[:-1]]], device=model.embedding.weight.device)
    return model.logits(model.hidden_states(sequence)[0, len(prompt) - 1 :]).float()


def _mismatches(places: Sequence[int], mine: Sequence[int], yours: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each position at which the two differ, and the token of ``yours`` there."""
    for place, a, b in zip(places, mine, yours, strict=True):
        if a != b:
            yield place, b
