"""Tokens at which a validation loss leaves its plateau, from the slope per doubling of tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST_VALIDATIONS = 20
# Reasons why a curve has no exit.
TOO_FEW, NO_PLATEAU, FLAT_END = "too few validations", "no plateau", "flat at the end"
# Slopes are fitted over half a doubling, and over five validations at least: early ones are far apart in log tokens.
_HALF_WIDTH = 0.25
_FEWEST_IN_FIT = 5
_GRID_PER_DOUBLING = 16
# A plateau is at most a third as steep as what follows. The end of a cosine or wsd schedule about doubles the slope.
_FLAT = 1 / 3
# Nats per token and doubling: a slope below is flat, whatever else the curve does.
_LEAST_SLOPE = 0.005
# The slopes compared are the most different of a hundred, so that twice their standard error proves nothing.
_STANDARD_ERRORS = 5.0


@dataclass(frozen=True)
class PlateauExit:
    """Tokens at the exit; None with the reason: ``too few validations``, ``no plateau`` or ``flat at the end``."""

    tokens: float | None
    reason: str = ""


@dataclass(frozen=True)
class _Slope:
    """Fall of the loss per doubling around ``at`` (log2 of tokens), with its standard error, and the mean loss."""

    at: float
    fall: float
    error: float
    level: float


def plateau_exit(tokens: Sequence[float], loss: Sequence[float]) -> PlateauExit:
    """Return the tokens at which a validation loss leaves its plateau.

    On log2(tokens), the slope per doubling is fitted around each position of a fine grid (least squares over half a
    doubling, at least five validations, every doubling with equal weight). Of all pairs of a flat position and a
    steeper one after it, those with the largest difference count. The exit is where the slope last passes half way
    between the two before the steeper one, interpolated linearly.

    There is a plateau only if the flat slope is below a third of the steep one by two standard errors, the two differ
    by five, and the loss falls by five standard deviations after it; all follow from the scatter of the validations
    around the fits. Otherwise the loss is ``flat at the end`` if over the last doubling its slope is below 0.005 nats,
    or within two standard errors of that (it has not left a plateau, or has nothing left to learn), and there was
    ``no plateau`` if it still falls. A slow start, as in a long warm-up, is a plateau if it was validated often enough.
    A fall that takes less than half a doubling is dated up to a fifth too early, by the width of the fits.

    Args:
        tokens: tokens seen at each validation, positive and increasing.
        loss: validation losses in nats per token, of the same length.

    Raises:
        ValueError: the lists differ in length, or tokens do not increase.
    """
    if len(tokens) != len(loss) or any(now <= before for before, now in zip((0.0, *tokens), tokens, strict=False)):
        raise ValueError("tokens do not increase, or are not as many as the losses")
    if len(tokens) < FEWEST_VALIDATIONS:
        return PlateauExit(None, TOO_FEW)
    x = [math.log2(each) for each in tokens]
    slopes, scatter = _slopes(x, loss)
    flat = slopes[0]
    best: tuple[float, int, _Slope] | None = None
    for number, here in enumerate(slopes):
        if best is None or here.fall - flat.fall > best[0]:
            best = here.fall - flat.fall, number, flat
        if here.fall < flat.fall:
            flat = here
    assert best is not None
    rise, number, flat = best
    steep = slopes[number]
    is_seen = rise > _STANDARD_ERRORS * math.hypot(flat.error, steep.error)
    falls = flat.level - min(each.level for each in slopes[number:]) > _STANDARD_ERRORS * scatter
    is_flat = _FLAT * steep.fall - flat.fall > 2 * math.hypot(flat.error, _FLAT * steep.error)
    if not (is_seen and is_flat and falls) or steep.fall < _LEAST_SLOPE:
        end = _slope_at(x[-1], x, loss, half_width=1.0)
        return PlateauExit(None, FLAT_END if end[0] < _LEAST_SLOPE + 2 * scatter * end[1] else NO_PLATEAU)
    half = (flat.fall + steep.fall) / 2
    before = max(at for at in range(number) if slopes[at].fall <= half)
    low, high = slopes[before], slopes[before + 1]
    fraction = (half - low.fall) / (high.fall - low.fall)
    return PlateauExit(2 ** (low.at + fraction * (high.at - low.at)))


def _slopes(x: Sequence[float], loss: Sequence[float]) -> tuple[list[_Slope], float]:
    """Return the slopes on a grid over ``x``, and the standard deviation of the losses around the fits."""
    n_grid = max(2, round((x[-1] - x[0]) * _GRID_PER_DOUBLING))
    grid = [x[0] + (x[-1] - x[0]) * number / n_grid for number in range(n_grid + 1)]
    fits = [_slope_at(center, x, loss, _HALF_WIDTH) for center in grid]
    # The median ignores the fits across a bend, whose residuals are not scatter.
    scatter = math.sqrt(statistics.median(variance for _, _, _, variance in fits))
    found = [_Slope(at, fall, scatter * error, level) for at, (fall, error, level, _) in zip(grid, fits, strict=True)]
    return found, scatter


def _slope_at(
    center: float, x: Sequence[float], loss: Sequence[float], half_width: float
) -> tuple[float, float, float, float]:
    """Return the fall per unit of ``x`` around ``center``, its error per unit of scatter, level and scatter's variance.

    Validations are equally far apart in tokens; weights make every doubling count alike within a fit.
    """
    nearest = sorted(range(len(x)), key=lambda at: abs(x[at] - center))
    chosen = [at for at in nearest if abs(x[at] - center) <= half_width]
    chosen = chosen if len(chosen) >= _FEWEST_IN_FIT else nearest[:_FEWEST_IN_FIT]
    weights = [x[min(at + 1, len(x) - 1)] - x[max(at - 1, 0)] for at in chosen]
    return _fit([x[at] for at in chosen], [loss[at] for at in chosen], weights)


def _fit(x: Sequence[float], y: Sequence[float], weights: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the fall of a weighted line, its error per unit of scatter, the mean of y, and the scatter's variance."""
    total = sum(weights)
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    spread = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    slope = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True)) / spread
    error = math.sqrt(sum((w * (a - mean_x)) ** 2 for w, a in zip(weights, x, strict=True))) / spread
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    return -slope, error, mean_y, sum(each**2 for each in residuals) / (len(x) - 2)
