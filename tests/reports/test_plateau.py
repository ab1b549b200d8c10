"""Exit of a validation loss from its plateau: on curves whose exit is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from psannlm.reports.plateau import FEWEST_VALIDATIONS, FLAT_END, NO_PLATEAU, TOO_FEW, plateau_exit

LAST = 4e6
BEND = math.log2(1e6)


def curve(
    f: Callable[[float], float], n: int = 40, noise: float = 0.0, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Return ``n`` validations, equally far apart in tokens, of a loss that is ``f`` of log2(tokens), with noise."""
    draw = random.Random(seed)
    tokens = [LAST * number / n for number in range(1, n + 1)]
    return tokens, [f(math.log2(each)) + draw.gauss(0.0, noise) for each in tokens]


def bend(x: float) -> float:
    """An early fall, a plateau at 2 nats, and from 1e6 tokens a fall of 1 nat per doubling."""
    return 2.0 + 1.5 * max(0.0, 17.5 - x) - min(max(0.0, x - BEND), 1.2)


def logistic(x: float, width: float = 0.15) -> float:
    return 2.0 - 1.0 / (1.0 + math.exp(-(x - BEND) / width))


# Where a logistic function has half of its largest slope, in widths before its middle.
HALF_SLOPE = math.log(3 + 2 * math.sqrt(2))


@pytest.mark.parametrize("n", [20, 40, 100])
def test_plateau_exit_is_where_loss_bends(n: int) -> None:
    found = plateau_exit(*curve(bend, n)).tokens
    assert found == pytest.approx(1e6, rel=0.05)


@pytest.mark.parametrize(("width", "tolerance"), [(0.05, 0.2), (0.15, 0.1), (0.3, 0.1)])
def test_plateau_exit_is_half_slope_of_logistic(width: float, tolerance: float) -> None:
    found = plateau_exit(*curve(lambda x: logistic(x, width))).tokens
    assert found == pytest.approx(1e6 * 2 ** (-HALF_SLOPE * width), rel=tolerance)


def test_plateau_exit_scales_with_tokens() -> None:
    tokens, loss = curve(logistic)
    found, larger = plateau_exit(tokens, loss).tokens, plateau_exit([8 * each for each in tokens], loss).tokens
    assert found is not None
    assert larger == pytest.approx(8 * found)


@pytest.mark.parametrize("f", [bend, logistic])
def test_plateau_exit_survives_noise(f: Callable[[float], float]) -> None:
    exact = plateau_exit(*curve(f)).tokens
    assert exact is not None
    for seed in range(20):
        assert plateau_exit(*curve(f, noise=0.02, seed=seed)).tokens == pytest.approx(exact, rel=0.12)


def power(x: float) -> float:
    return 2.0 + 3.0 * 2.0 ** (-0.3 * (x - 14.0))


def cooled(x: float) -> float:
    """A power law whose slope more than doubles over the last doubling, as at the end of a schedule."""
    return power(x) - 0.15 * max(0.0, x - math.log2(LAST / 2))


@pytest.mark.parametrize("f", [power, cooled])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_steadily_falling_loss_has_no_plateau(f: Callable[[float], float], noise: float) -> None:
    for seed in range(20):
        assert plateau_exit(*curve(f, noise=noise, seed=seed)) == plateau_exit(*curve(f))
    assert (plateau_exit(*curve(f)).tokens, plateau_exit(*curve(f)).reason) == (None, NO_PLATEAU)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_flat_end_has_no_plateau_exit(noise: float) -> None:
    for seed in range(20):
        found = plateau_exit(*curve(lambda x: 2.0 + max(0.0, 18.5 - x), noise=noise, seed=seed))
        assert (found.tokens, found.reason) == (None, FLAT_END)


def test_few_validations_give_no_exit() -> None:
    for n in (0, 1, FEWEST_VALIDATIONS - 1):
        found = plateau_exit(*curve(bend, n) if n else ([], []))
        assert (found.tokens, found.reason) == (None, TOO_FEW)
    assert plateau_exit(*curve(bend, FEWEST_VALIDATIONS)).tokens is not None


def test_tokens_of_plateau_must_increase() -> None:
    tokens, loss = curve(bend)
    with pytest.raises(ValueError, match="tokens"):
        plateau_exit([tokens[1], tokens[0], *tokens[2:]], loss)
    with pytest.raises(ValueError, match="tokens"):
        plateau_exit(tokens, loss[1:])
