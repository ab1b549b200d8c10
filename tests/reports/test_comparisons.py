"""Comparisons of a study: pooled intervals by hand, pairs counted once, and token ratios of curves of known shape."""

from __future__ import annotations

import math
from typing import Any

import pytest

from psannlm.io.artifact_schema import read_figures
from psannlm.reports.comparisons import TokenCurve, compare_variants, token_ratio
from psannlm.reports.schemas.study import StudyMetrics
from psannlm.reports.tables.study import study_tables

# 0.975 quantile of Student's t for 3 degrees of freedom, from printed tables.
T_3 = 3.18245


def mean_of(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": None, "lowest": min(values), "highest": max(values), "n": 1}


def variant_of(name: str, losses: list[float], **settings: Any) -> dict[str, Any]:
    """A variant as reports of earlier versions have it."""
    zeros = ("learning_rates", "parameters_by_group")
    return {
        "name": name,
        "settings": settings,
        "edge": "",
        "val_loss": mean_of(losses),
        "val_loss_by_seed": {str(seed): loss for seed, loss in enumerate(losses)},
        **dict.fromkeys(("parameters", "steps", "tokens", "flops_per_token"), 1),
        **dict.fromkeys(("learning_rate", "d_mlp", "bits_per_byte", "tokens_per_s", "training_s"), None),
        **{key: [] if key == zeros[0] else {} for key in zeros},
        "parameters_over_baseline": 1.0,
        "d_mlp_was_solved": False,
        "difference": {"mean": 0.1, "std": None, "low": None, "high": None, "n": 1, "baseline_mean": 2.0},
        "peak_memory_bytes": None,
    }


def study_of(variants: list[dict[str, Any]], *also: str, curves: list[dict[str, Any]] | None = None) -> StudyMetrics:
    corpus = {"sha256": "", "tokenizer_fingerprint": "", "train_tokens": 1, "val_tokens": 1, "val_overlap": None}
    return read_figures(
        StudyMetrics,
        {
            **dict.fromkeys(("study", "plan", "folder"), "x"),
            "baseline": "a",
            "measure": "final",
            "budget": {},
            "seeds": [1],
            "corpus": corpus,
            "notes": [],
            "variants": variants,
            "runs": [],
            "rivals": {name: {} for name in also},
            "curves": curves or [],
        },
    )


def test_pooled_interval_uses_spread_of_all_variants() -> None:
    """a: mean 2, variance 1; b: mean 3, variance 2; pooled 4/3 with 3 degrees, standard error √(4/3 · (1/3 + 1/2))."""
    metrics = study_of([variant_of("a", [1.0, 2.0, 3.0]), variant_of("b", [2.0, 4.0]), variant_of("c", [7.0])])
    pooled = {each.variant: each.pooled for each in compare_variants(metrics)}
    found, error = pooled["b"], math.sqrt(10 / 9)
    assert found is not None
    assert (found.mean, found.degrees, found.std) == (pytest.approx(1.0), 3, pytest.approx(math.sqrt(4 / 3)))
    assert (found.low, found.high) == (
        pytest.approx(1 - T_3 * error, abs=1e-5),
        pytest.approx(1 + T_3 * error, abs=1e-5),
    )
    x = 1 / error / math.sqrt(3)
    assert found.p == pytest.approx(1 - 2 * (x / (1 + x * x) + math.atan(x)) / math.pi)
    # One run of c suffices: the spread is that of the others.
    single = pooled["c"]
    assert single is not None
    assert single.high - single.low == pytest.approx(2 * T_3 * math.sqrt(4 / 3 * (1 / 3 + 1)), abs=1e-4)


def test_pooled_interval_refuses_variants_of_other_budgets() -> None:
    half = variant_of("b", [2.0, 4.0], budget_share=0.5)
    metrics = study_of([variant_of("a", [1.0, 2.0, 3.0]), half, variant_of("c", [5.0, 5.5])])
    pooled = {each.variant: each.pooled for each in compare_variants(metrics)}
    assert pooled["b"] is None
    assert pooled["c"] is not None
    assert pooled["c"].degrees == 3


def test_holm_counts_a_pair_of_variants_once() -> None:
    """a-b and a-c, then b-a again and b-c: three pairs, so that the smallest p is multiplied by three."""
    values = {"a": [1.0, 1.1, 1.2], "b": [1.5, 1.6, 1.7], "c": [1.1, 1.2, 1.3]}
    metrics = study_of([variant_of(name, losses) for name, losses in values.items()], "b")
    found = {(each.variant, each.against): each.pooled for each in compare_variants(metrics)}
    smallest = found["b", "a"]
    assert smallest is not None
    assert smallest.p_holm == pytest.approx(3 * smallest.p)
    assert found["a", "b"] is not None
    assert found["a", "b"].p_holm == smallest.p_holm
    # Of all three together: t of 1 - 0.05 / 6 at 6 degrees is 3.287 (Dunn 1961); s = 0.1, n = 3.
    half = 3.287 * 0.1 * (2 / 3) ** 0.5
    assert (smallest.low_of_all, smallest.high_of_all) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def curve_of(shift: float, tokens: tuple[float, ...] = (1e6, 2e6, 5e6, 9e6, 16e6)) -> TokenCurve:
    """Loss linear in log tokens, which the interpolation reproduces; ``shift`` times the tokens give the same loss."""
    return TokenCurve(tokens, tuple(10 - 0.3 * math.log(shift * n) for n in tokens))


def test_token_ratio_is_the_factor_between_shifted_curves() -> None:
    worse = token_ratio(curve_of(1.0), curve_of(1.7))
    assert (worse.ratio, worse.outside) == (pytest.approx(1 / 1.7), "")
    longer = token_ratio(curve_of(1.7), curve_of(1.0, (3e6, 7e6, 30e6)))
    assert (longer.ratio, longer.outside) == (pytest.approx(1.7), "")


def test_token_ratio_outside_the_curve_is_a_bound() -> None:
    better = token_ratio(curve_of(1.7), curve_of(1.0))
    assert (better.ratio, better.outside, better.own_ratio) == (1.0, "above", pytest.approx(1.7))
    far_worse = token_ratio(curve_of(0.001), curve_of(1.0))
    assert (far_worse.ratio, far_worse.outside) == (1 / 16, "below")
    far_better = token_ratio(curve_of(1000.0), curve_of(1.0))
    assert (far_better.outside, far_better.own_ratio) == ("above", None)


def test_token_ratio_reads_the_mean_curve_of_seeds() -> None:
    """Seeds 0.2 apart: their mean reaches 2.5 half way in log tokens between 1e6 and 4e6."""
    tokens = [1_000_000, 4_000_000]
    curves = [
        {"variant": name, "seed": seed, "tokens": tokens, "seconds": [], "loss": [first + off, last + off]}
        for name, first, last in (("a", 3.0, 2.0), ("b", 3.5, 2.5))
        for seed, off in enumerate((-0.1, 0.1))
    ]
    metrics = study_of([variant_of("a", [2.0]), variant_of("b", [2.5])], curves=curves)
    [found] = compare_variants(metrics)
    assert found.token_ratio is not None
    assert found.token_ratio.ratio == pytest.approx(0.5)


def test_tables_of_earlier_reports_explain_method_and_freedom() -> None:
    """A report without ``comparisons`` shows them, and its notes name degrees of freedom and number of pairs."""
    metrics = study_of([variant_of("a", [1.0, 2.0, 3.0]), variant_of("b", [2.0, 4.0])])
    assert metrics.comparisons == []
    tables = study_tables(metrics)
    [table] = [table for table in tables if table.title == "Compared to a"]
    row = dict(zip(table.headings, table.rows[0], strict=True))
    assert row["95 % interval, pooled variance"] == "−2.35 to +4.35"
    assert row["p, Holm"] == "0.41"
    assert "1.1547 with 3 degrees of freedom" in table.note
    assert "pairs of variants (1)" in table.note
