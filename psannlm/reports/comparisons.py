"""Comparisons of a study's variants: intervals of a pooled variance, Holm's correction, and token ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from psannlm.evaluation.statistics import Pool, holm, pool_variance, student_t_cdf, student_t_quantile
from psannlm.reports.schemas.measured import PooledDifference, TokenRatio
from psannlm.reports.schemas.study import Comparison, LossCurve, StudyMetrics, VariantFigures

_ALPHA = 0.05
# Nats per token; no cross-entropy of a model comes near, and squares of it are finite.
_LARGEST_LOSS = 1e6


def compare_variants(metrics: StudyMetrics) -> list[Comparison]:
    """Return every variant against the baseline and against those of ``also_compare_to``, in this order.

    Pooled are the seed variances of all variants that train for the same fraction of the budget; differences are those
    of the means over each variant's own seeds. Holm's correction counts a pair of variants once, whichever way round.
    """
    pools = _pools(metrics.variants)
    curves = {variant.name: _mean_curve(metrics, variant.name) for variant in metrics.variants}
    found = []
    for against in _references(metrics):
        for variant in metrics.variants:
            if variant.name != against.name:
                is_alike = _fraction(variant) == _fraction(against)
                pool = pools[_fraction(variant)] if is_alike else None
                ours, theirs = curves[variant.name], curves[against.name]
                found.append(
                    Comparison(
                        variant=variant.name,
                        against=against.name,
                        pooled=pooled_difference(_losses(variant), _losses(against), pool),
                        token_ratio=None if ours is None or theirs is None else token_ratio(ours, theirs),
                    )
                )
    return _corrected(found)


def _references(metrics: StudyMetrics) -> list[VariantFigures]:
    names = [metrics.baseline, *metrics.also_compare_to]
    return [variant for name in names for variant in metrics.variants if variant.name == name]


def _pools(variants: Sequence[VariantFigures]) -> dict[float, Pool | None]:
    fractions = {_fraction(variant) for variant in variants}
    return {
        fraction: pool_variance(_losses(variant) for variant in variants if _fraction(variant) == fraction)
        for fraction in fractions
    }


def _losses(variant: VariantFigures) -> list[float]:
    return [loss for loss in variant.val_loss_by_seed.values() if _is_loss(loss)]


def _is_loss(value: float) -> bool:
    """Whether a value of a file can be a loss; comparisons with NaN are false."""
    return abs(value) < _LARGEST_LOSS


def _fraction(variant: VariantFigures) -> float:
    """Return the fraction of the plan's budget, under its present or its former name."""
    given = variant.settings.get("budget_fraction", variant.settings.get("budget_share"))
    return given if isinstance(given, (int, float)) else 1.0


def pooled_difference(values: Sequence[float], others: Sequence[float], pool: Pool | None) -> PooledDifference | None:
    """Return mean(values) - mean(others) ± t(0.975, degrees) · s · √(1/n + 1/m), with s and the degrees of ``pool``.

    The two-sided p-value is that of the same t statistic. None without values or without a positive pooled variance.
    """
    if not values or not others or pool is None or not pool.variance > 0:
        return None
    mean = statistics.fmean(values) - statistics.fmean(others)
    error = math.sqrt(pool.variance * (1 / len(values) + 1 / len(others)))
    half = student_t_quantile(1 - _ALPHA / 2, pool.degrees) * error
    return PooledDifference(
        mean=mean,
        std=math.sqrt(pool.variance),
        degrees=pool.degrees,
        low=mean - half,
        high=mean + half,
        p=2 * (1 - student_t_cdf(abs(mean) / error, pool.degrees)),
    )


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with p-values and intervals corrected for the number of distinct pairs of variants.

    The p-values by Holm's method. It gives no intervals; those are Bonferroni's.
    """
    p_values = {frozenset((each.variant, each.against)): each.pooled.p for each in found if each.pooled is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        each
        if each.pooled is None
        else replace(
            each,
            pooled=_of_all(
                replace(each.pooled, p_holm=adjusted[frozenset((each.variant, each.against))]), len(p_values)
            ),
        )
        for each in found
    ]


def _of_all(pooled: PooledDifference, n_pairs: int) -> PooledDifference:
    """Return the difference with its interval at a confidence of 1 - 0.05 / n_pairs."""
    error = (pooled.high - pooled.low) / 2 / student_t_quantile(1 - _ALPHA / 2, pooled.degrees)
    half = student_t_quantile(1 - _ALPHA / 2 / n_pairs, pooled.degrees) * error
    return replace(pooled, low_of_all=pooled.mean - half, high_of_all=pooled.mean + half)


@dataclass(frozen=True)
class TokenCurve:
    """Mean validation loss over seeds by tokens seen, up to the validation that is measured."""

    tokens: tuple[float, ...]
    loss: tuple[float, ...]

    def tokens_at(self, loss: float) -> float | None:
        """Return the tokens at which the curve first falls to ``loss``, interpolated linearly in log tokens.

        ``math.inf`` if it never does; None if its first point is below ``loss`` already, so that they are unknown.
        """
        for at, here in enumerate(self.loss):
            if here > loss:
                continue
            if at == 0:
                return self.tokens[0] if here == loss else None
            before = self.loss[at - 1]
            fraction = (before - loss) / (before - here)
            start, end = math.log(self.tokens[at - 1]), math.log(self.tokens[at])
            return math.exp(start + fraction * (end - start))
        return math.inf


def token_ratio(ours: TokenCurve, theirs: TokenCurve) -> TokenRatio:
    """Return how many times our tokens the other needs for our last loss, on its curve; above 1 we need fewer.

    Within a run whose learning rate still decays, a loss is higher than at the end of a run of that length. The ratio
    is then nearer to 1 than complete runs of several lengths would show.
    """
    needed = theirs.tokens_at(ours.loss[-1])
    if needed is None:
        return TokenRatio(ratio=theirs.tokens[0] / ours.tokens[-1], outside="below")
    if math.isfinite(needed):
        return TokenRatio(ratio=needed / ours.tokens[-1])
    sooner = ours.tokens_at(theirs.loss[-1])
    own = None if sooner is None or math.isinf(sooner) else theirs.tokens[-1] / sooner
    return TokenRatio(ratio=theirs.tokens[-1] / ours.tokens[-1], outside="above", own_ratio=own)


def _mean_curve(metrics: StudyMetrics, variant: str) -> TokenCurve | None:
    """Return the curve of a variant averaged over its runs, which validate at the same steps; None without runs."""
    curves = [curve for curve in metrics.curves if curve.variant == variant and curve.loss]
    are_alike = len({len(curve.loss) for curve in curves}) == 1
    if not are_alike or not all(_is_curve(curve) for curve in curves):
        return None
    tokens = [statistics.fmean(here) for here in zip(*(curve.tokens for curve in curves), strict=True)]
    loss = [statistics.fmean(here) for here in zip(*(curve.loss for curve in curves), strict=True)]
    end = loss.index(min(loss)) + 1 if metrics.measure == "best" else len(loss)
    return TokenCurve(tuple(tokens[:end]), tuple(loss[:end]))


def _is_curve(curve: LossCurve) -> bool:
    increases = all(now > before for before, now in pairwise([0, *curve.tokens]))
    return increases and all(map(_is_loss, curve.loss))
