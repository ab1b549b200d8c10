"""Throughput limits of GPU-03: the card's own matrix peak, and published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from psannlm.gpu_suite.checks import rates as rates_module
from psannlm.gpu_suite.checks.rates import Card, Rates, card_of, large_measures, rate_measures
from psannlm.gpu_suite.context import CheckContext
from psannlm.reports.schemas.measured import Spread

PEAK = 700e12
# Of the model and the peak here 5 % are 437,500 tokens/s of training and 1,312,500 of forward passes.
FLOPS = 80_000_000


def rates(
    training: float = 2e6, forward: float = 7e6, utilisation: float = 0.2, spread: float = 1.0
) -> dict[str, Rates]:
    found = Rates(Spread(training, training, training * spread), Spread.of([forward]), utilisation, FLOPS, PEAK)
    return {"respsann": found, "waveresnet": found, "transformer": found}


def missed(found: dict[str, Rates], sine_cost: float = 1.0, *, card: Card = "published") -> list[str]:
    measures = rate_measures(found, sine_cost, 131_072, card)
    return [measure.name for measure in measures if not measure.is_met]


@pytest.mark.parametrize("card", ["published", "other", "dry run"])
def test_fast_steady_throughput_passes(card: Card) -> None:
    assert missed(rates(), card=card) == []


def test_slow_forward_fails_on_published_gpus() -> None:
    slow = rates(forward=6e6)
    assert missed(slow) == ["respsann, 131,072 tokens: forward", "waveresnet, 131,072 tokens: forward"]
    assert missed(slow, card="other") == []
    assert missed(slow, card="dry run") == []


@pytest.mark.parametrize("card", ["published", "other"])
def test_throughput_far_below_peak_fails_on_every_card(card: Card) -> None:
    bases = ("respsann", "waveresnet", "transformer")
    assert missed(rates(training=430_000.0), card=card) == [f"{base}, 131,072 tokens: training" for base in bases]
    assert missed(rates(training=440_000.0), card=card) == []
    assert missed(rates(forward=1_300_000.0), card=card) == [f"{base}, 131,072 tokens: forward" for base in bases]
    assert missed(rates(training=1.0, forward=1.0), card="dry run") == []


@pytest.mark.parametrize("card", ["published", "other"])
@pytest.mark.parametrize("batch_tokens", [65_536, 131_072])
def test_dry_run_limits_reject_nothing(card: Card, batch_tokens: int) -> None:
    measures = rate_measures(rates(), 1.0, batch_tokens, card) + large_measures("large", rates()["respsann"], card)
    lowest = [measure for measure in measures if measure.side == "at least"]
    assert len(lowest) == 3 * 3 + 2
    assert all(measure.limit > 0 for measure in lowest)
    dry = rate_measures(rates(), 1.0, batch_tokens, "dry run")
    assert all(m.reason == "no throughput limit applies in a dry run" for m in dry if "problems" not in m.name)


@pytest.mark.parametrize(("card", "least"), [("published", 0.5), ("other", 0.25)])
def test_large_model_limit_depends_on_card(card: Card, least: float) -> None:
    """An older card is no reason to expect of a large model what memory leaves to a small one."""

    def names(fraction: float) -> list[str]:
        found = Rates(Spread.of([fraction * PEAK / FLOPS]), None, fraction, FLOPS, PEAK)
        return [m.name for m in large_measures("large", found, card) if not m.is_met]

    assert names(least + 0.01) == []
    assert names(least - 0.01) == ["large: training", "large: utilisation"]
    assert names(float("nan")) == ["large: training", "large: utilisation"]


def test_unmeasured_peak_still_rejects_zero_throughput() -> None:
    nothing = Rates(Spread.of([0.0]), None, 0.0, 1, float("nan"), ("out of memory",))
    assert len([m for m in large_measures("large", nothing, "other") if not m.is_met]) == 3


@pytest.mark.parametrize(
    ("name", "card"), [("NVIDIA H200", "published"), ("NVIDIA A100-SXM4-80GB", "other"), ("Tesla T4", "other")]
)
def test_card_is_classified_by_name(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch, name: str, card: Card
) -> None:
    assert card_of(context) == "dry run"
    monkeypatch.setattr(rates_module, "describe_device", lambda device: name)
    assert card_of(replace(context, device=torch.device("cuda"), is_dry_run=False)) == card


def test_low_utilisation_fails() -> None:
    assert len([name for name in missed(rates(utilisation=0.03)) if "utilisation" in name]) == 3


def test_uneven_runs_fail() -> None:
    assert "waveresnet, 131,072 tokens: spread of training" in missed(rates(spread=1.3))


def test_costly_sine_fails() -> None:
    name = "131,072 tokens: a step with the sine / with GELU"
    assert missed(rates(), 1.1) == missed(rates(), float("nan")) == [name]


def test_non_finite_loss_fails_in_dry_run_too() -> None:
    found = rates()
    found["waveresnet"] = replace(found["waveresnet"], problems=("waveresnet: a loss is not finite",))
    name = "waveresnet, 131,072 tokens: problems of the training that is timed"
    assert missed(found) == missed(found, card="dry run") == [name]
