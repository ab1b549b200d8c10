"""Tables, plots and headline of an ablation study (``reports/ablations/<ts>/metrics.json``)."""

from __future__ import annotations

from collections.abc import Sequence

from psannlm.reports.comparisons import compare_variants
from psannlm.reports.page_model import Headline, Picture, Table, format_float, format_value, lossy_mark, signed
from psannlm.reports.plateau import FEWEST_VALIDATIONS
from psannlm.reports.plots import Bar, Curve, draw_bars, draw_curves
from psannlm.reports.schemas.measured import PairedDifference, PooledDifference, TokenRatio
from psannlm.reports.schemas.study import (
    Comparison,
    HorizonFigures,
    LossCurve,
    LrScore,
    RunFigures,
    StudyMetrics,
    VariantFigures,
)
from psannlm.reports.tables.activations import study_activation_tables

NATS = "nats per token"
COMPARED = "Compared to"
HORIZONS = "Validation loss by tokens of training"
_SPEED = ("tokens/s", "training, s")
# Fewer documents than this make a bootstrap interval too narrow.
_FEW_DOCUMENTS = 20


def study_tables(metrics: StudyMetrics) -> list[Table]:
    """Return the tables of results, differences, answers, task scores, learning rates, parameters and runs."""
    answers = [_answers(metrics, metrics.task), _answers_by_rate(metrics)] if metrics.task else []
    to_baseline = {each.name: each.difference for each in metrics.variants if each.name != metrics.baseline}
    references = {metrics.baseline: to_baseline, **metrics.also_compare_to}
    compared = comparisons(metrics)
    differences = [_against(name, found, compared) for name, found in references.items() if found]
    tasks = [_tasks(metrics)] if any(variant.tasks for variant in metrics.variants) else []
    details = [_learning_rates(metrics), _parameters(metrics), _runs(metrics)]
    horizons = [_horizons(metrics)] if metrics.horizons else []
    activations = study_activation_tables(metrics.activations) if metrics.activations is not None else []
    return [_results(metrics), *differences, *answers, *horizons, *activations, *tasks, *details]


def comparisons(metrics: StudyMetrics) -> dict[tuple[str, str], Comparison]:
    """Return the comparisons by (variant, compared to); those of earlier reports are computed from their figures."""
    return {(each.variant, each.against): each for each in metrics.comparisons or compare_variants(metrics)}


def _results(metrics: StudyMetrics) -> Table:
    baseline = metrics.baseline
    headings = (
        "variant",
        f"validation loss, {NATS}",
        "± over seeds",
        f"minus {baseline}, {NATS}",
        "95 % interval",
        "token ratio",
        "bits per byte",
        "learning rate",
        "seeds",
        "parameters",
        "tokens/s",
        "training, s",
        "peak memory, MB",
    )
    rows = []
    compared = comparisons(metrics)
    for variant in metrics.variants:
        loss, bits, difference = variant.val_loss, variant.bits_per_byte, variant.difference
        rows.append(
            [
                variant.name,
                "–" if loss is None else f"{loss.mean:.4f}",
                "–" if loss is None or loss.std is None else f"{loss.std:.4f}",
                _difference(variant, difference, baseline),
                _interval(difference),
                _token_ratio(compared.get((variant.name, baseline))),
                "–" if bits is None else f"{bits.mean:.4f}{lossy_mark(variant.lossy_tokenizer)}",
                _rate(variant),
                format_value(0 if loss is None else loss.n),
                format_value(variant.parameters),
                format_value(variant.tokens_per_s, 3),
                format_value(variant.training_s, 3),
                "–" if variant.peak_memory_bytes is None else f"{variant.peak_memory_bytes / 1e6:,.0f}",
            ]
        )
    kept, rows = _without_speed(metrics, headings, rows)
    return Table(
        f"{metrics.study}: each variant at its best learning rate",
        kept,
        rows,
        frozenset(range(1, len(kept))),
        "\n".join(metrics.notes),
    )


def _without_speed(
    metrics: StudyMetrics, headings: tuple[str, ...], rows: list[list[str]]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the table without the columns of speed, if runs shared a GPU."""
    kept = [at for at, heading in enumerate(headings) if not (metrics.shared_gpus and heading in _SPEED)]
    return tuple(headings[at] for at in kept), [[row[at] for at in kept] for row in rows]


def _against(
    other: str, differences: dict[str, PairedDifference | None], compared: dict[tuple[str, str], Comparison]
) -> Table:
    headings = (
        "variant",
        f"minus {other}, {NATS}",
        "in % of its loss",
        "token ratio",
        "95 % interval, paired",
        "95 % interval, pooled variance",
        "95 % interval, documents",
        "p, Holm",
        "95 % of all together, in %",
        "seeds",
    )
    rows = []
    for name, difference in differences.items():
        comparison = compared.get((name, other))
        pooled = None if comparison is None else comparison.pooled
        rows.append(
            [
                name,
                "–" if difference is None else signed(difference.mean, 3),
                "–" if difference is None else signed(100 * difference.fraction, 2),
                _token_ratio(comparison),
                _interval(difference),
                "–" if pooled is None else f"{signed(pooled.low, 3)} to {signed(pooled.high, 3)}",
                _document_interval(comparison),
                "–" if pooled is None else _p_value(pooled),
                _interval_of_all(difference, pooled),
                format_value(0 if difference is None else difference.n),
            ]
        )
    here = [each for each in compared.values() if each.against == other]
    n_pairs = len({frozenset(pair) for pair, each in compared.items() if each.pooled is not None})
    notes = [f"Each at its best learning rate. Paired: over the seeds that both have. {_ratio_note(other, here)}"]
    notes += [_pooled_note([each.pooled for each in here if each.pooled is not None], n_pairs), _document_note(here)]
    return Table(
        f"{COMPARED} {other}", headings, rows, frozenset(range(1, len(headings))), "\n".join(filter(None, notes))
    )


def _pooled_note(pooled: Sequence[PooledDifference], n_pairs: int) -> str:
    if not pooled:
        return ""
    spreads = {(each.degrees, each.std): f"{each.std:.4f} with {each.degrees}" for each in pooled}
    return (
        "Pooled variance: the spread over seeds is taken to be the same in all variants with this budget, so that its "
        f"estimate uses all of their runs (standard deviation {', '.join(spreads.values())} degrees of freedom). "
        "p, Holm: how likely a difference this large is without a true one, corrected for the number of compared "
        f"pairs of variants ({n_pairs}) by Holm's method. Of all together: of the pooled variance, so wide that all of "
        "them hold at 95 % at the same time (Bonferroni), in percent of the loss; no other interval is corrected."
    )


def _interval_of_all(difference: PairedDifference | None, pooled: PooledDifference | None) -> str:
    """Return the interval of all comparisons together, in percent of the other's mean loss."""
    if pooled is None or pooled.low_of_all is None or pooled.high_of_all is None or difference is None:
        return "–"
    percent = 100 / difference.baseline_mean
    return f"{signed(percent * pooled.low_of_all, 2)} to {signed(percent * pooled.high_of_all, 2)}"


def _document_interval(comparison: Comparison | None) -> str:
    found = None if comparison is None else comparison.documents
    return "–" if found is None else f"{signed(found.low, 3)} to {signed(found.high, 3)}"


def _document_note(compared: Sequence[Comparison]) -> str:
    """Return what the interval over documents is, and why some comparisons have none."""
    lines = []
    found = next((each.documents for each in compared if each.documents is not None), None)
    if found is not None:
        few = " Of so few documents it is too narrow." if found.n_documents < _FEW_DOCUMENTS else ""
        lines.append(
            f"Documents: paired bootstrap over the {found.n_documents:,} held-out documents "
            f"({found.n_resamples:,} resamples, the same ones for both variants, weighted by tokens). It covers other "
            f"text of this kind; the intervals over seeds cover other training runs.{few}"
        )
    reasons: dict[str, list[str]] = {}
    for each in compared:
        if each.documents is None and each.documents_missing:
            reasons.setdefault(each.documents_missing, []).append(each.variant)
    lines += [f"No interval over documents for {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return "\n".join(lines)


def _ratio_note(other: str, compared: Sequence[Comparison]) -> str:
    ratios = [each.token_ratio for each in compared if each.token_ratio is not None]
    if not ratios:
        return ""
    note = (
        f"Token ratio: tokens that {other} needs for the variant's loss, over the variant's own; read on the mean loss "
        f"curve of {other}, linearly in log tokens. Where the learning rate decays, it is nearer to 1 than runs of "
        "several lengths would show."
    )
    if any(ratio.outside for ratio in ratios):
        note += (
            f" > or <: the loss is outside {other}'s curve. By own curve: {other}'s tokens over those at which the "
            f"variant reached {other}'s last loss."
        )
    return note


def _token_ratio(comparison: Comparison | None) -> str:
    ratio: TokenRatio | None = None if comparison is None else comparison.token_ratio
    if ratio is None:
        return "–"
    sign = {"above": "> ", "below": "< "}.get(ratio.outside, "")
    own = "" if ratio.own_ratio is None else f"; {ratio.own_ratio:.2f} by own curve"
    return f"{sign}{ratio.ratio:.2f}{own}"


def _p_value(pooled: PooledDifference) -> str:
    p = pooled.p if pooled.p_holm is None else pooled.p_holm
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _difference(variant: VariantFigures, difference: PairedDifference | None, baseline: str, scale: float = 1) -> str:
    if difference is None:
        return "baseline" if variant.name == baseline else "–"
    return signed(scale * difference.mean, 3)


def _interval(difference: PairedDifference | None) -> str:
    if difference is None:
        return "–"
    if difference.interval is None:
        return "one seed: none"
    return " to ".join(signed(edge, 3) for edge in difference.interval)


def _rate(variant: VariantFigures | HorizonFigures) -> str:
    if variant.learning_rate is None:
        return "–"
    # The notes mention a study with a single learning rate.
    caveats = [f"{variant.edge} tried"] if variant.edge in ("lowest", "highest") else []
    if variant.provisional and variant.edge != "only":
        caveats.append("provisional")
    return f"{variant.learning_rate:g}" + (f" ({', '.join(caveats)})" if caveats else "")


def _answers(metrics: StudyMetrics, task: str) -> Table:
    headings = (
        "variant",
        "correct answers",
        "by seed",
        f"minus {metrics.baseline}, percentage points",
        "documents with all answers correct",
        "nats per answer",
        "tokens at the plateau's exit, by seed",
    )
    exits = {(run.variant, run.lr, str(run.seed)): _plateau(run) for run in metrics.runs if run.horizon is None}
    rows = []
    for variant in metrics.variants:
        answers = variant.answers
        if answers is None:
            rows.append([variant.name, *["–"] * (len(headings) - 1)])
            continue
        rows.append(
            [
                variant.name,
                f"{answers.right.mean:.1%}",
                " ".join(f"{fraction:.1%}" for fraction in answers.right_by_seed.values()),
                _difference(variant, answers.difference, metrics.baseline, scale=100),
                f"{answers.documents_right:.1%}",
                f"{answers.nats_per_answer:.4f}",
                "; ".join(
                    exits.get((variant.name, variant.learning_rate or 0.0, seed), "–") for seed in answers.right_by_seed
                ),
            ]
        )
    return Table(
        f"Answers to held-out documents: {task.replace('_', ' ')}",
        headings,
        rows,
        frozenset(range(1, len(headings))),
        "At the learning rate of the best validation loss. An answer is correct if its token is the most "
        "likely one. A seed learns the task or does not: such fractions are not normally distributed, so no interval "
        "is given.\n"
        "Plateau's exit: tokens at which the slope of the validation loss per doubling of tokens passes half way from "
        "its flattest to the steepest after it. No plateau: no flat stretch before a fall. Flat at the "
        "end: it has not left a plateau, or has nothing left to learn. "
        f"It needs at least {FEWEST_VALIDATIONS} validations (train.eval_interval_steps).",
    )


def _plateau(run: RunFigures) -> str:
    return run.plateau or format_value(run.plateau_exit_tokens, 3)


def _tasks(metrics: StudyMetrics) -> Table:
    """Return the scores on the packs of ``train.eval_tasks``, by variant and task."""
    headings = ("variant", "task", "score", "chance level", f"minus {metrics.baseline}", "95 % interval")
    rows = [
        [
            variant.name,
            task,
            f"{found.score.mean:.3f}",
            "–" if found.chance is None else f"{found.chance:.3f}",
            _difference(variant, found.difference, metrics.baseline),
            _interval(found.difference),
        ]
        for variant in metrics.variants
        for task, found in variant.tasks.items()
    ]
    return Table(
        "Task scores",
        headings,
        rows,
        frozenset(range(2, len(headings))),
        "At the learning rate of the best validation loss, paired by seed. Where the interval includes zero, the "
        "scores do not rank the variants.",
    )


def _answers_by_rate(metrics: StudyMetrics) -> Table:
    """Return the fraction of correct answers by variant and learning rate: how narrow is the range that works?"""
    rates = sorted({run.lr for run in metrics.runs})
    fractions: dict[tuple[str, float], list[float]] = {}
    for run in metrics.runs:
        if run.answers is not None and run.horizon is None:
            fractions.setdefault((run.variant, run.lr), []).append(run.answers.right)
    rows = []
    for variant in metrics.variants:
        cells = [" ".join(f"{fraction:.1%}" for fraction in fractions.get((variant.name, rate), [])) for rate in rates]
        rows.append([variant.name, *cells])
    return Table(
        "Correct answers by learning rate",
        ["variant", *(f"{rate:g}" for rate in rates)],
        rows,
        frozenset(range(1, len(rates) + 1)),
        "One figure for each seed that finished.",
    )


def _horizons(metrics: StudyMetrics) -> Table:
    """Return the losses at every token budget: those of the horizons, and that of the plan."""
    headings = (
        "variant",
        "tokens",
        f"validation loss, {NATS}",
        "± over seeds",
        f"minus {metrics.baseline}, {NATS}",
        "95 % interval",
        "learning rate",
        "seeds",
    )
    rows = []
    for variant in metrics.variants:
        here: list[HorizonFigures | VariantFigures] = [
            each for each in metrics.horizons if each.variant == variant.name
        ]
        for found in [*here, variant]:
            loss = found.val_loss
            rows.append(
                [
                    variant.name,
                    format_value(found.tokens),
                    "–" if loss is None else f"{loss.mean:.4f}",
                    "–" if loss is None or loss.std is None else f"{loss.std:.4f}",
                    _difference(variant, found.difference, metrics.baseline),
                    _interval(found.difference),
                    _rate(found),
                    format_value(0 if loss is None else loss.n),
                ]
            )
    return Table(
        HORIZONS,
        headings,
        rows,
        frozenset(range(1, len(headings))),
        "Each at its best learning rate for these tokens. The shorter runs branched off the longest at its peak "
        "learning rate and trained only their own cooldown; their figures are those of complete runs.",
    )


def _learning_rates(metrics: StudyMetrics) -> Table:
    rates = sorted({rate.lr for variant in metrics.variants for rate in variant.learning_rates})
    rows = []
    for variant in metrics.variants:
        cells = {rate.lr: rate for rate in variant.learning_rates}
        row = [variant.name]
        for lr in rates:
            cell = cells.get(lr)
            star = " *" if lr == variant.learning_rate and len(cells) > 1 else ""
            row.append("" if cell is None else _rate_cell(cell) + star)
        rows.append(row)
    half = ", on the half of the held-out documents that selects learning rates" if metrics.choose_on == "tune" else ""
    return Table(
        f"Validation loss by learning rate, {NATS}",
        ["variant", *(f"{rate:g}" for rate in rates)],
        rows,
        frozenset(range(1, len(rates) + 1)),
        f"Means over {_seeds_of(metrics)} that finished{half}. * lowest loss; at the edge of the grid a rate "
        "outside it may be better.",
    )


def _seeds_of(metrics: StudyMetrics) -> str:
    seeds = metrics.seeds if metrics.lr_seeds is None else metrics.lr_seeds
    return "the seeds" if len(seeds) == len(metrics.seeds) else f"the seeds, of {', '.join(map(str, seeds))},"


def _rate_cell(cell: LrScore) -> str:
    mean = "–" if cell.mean is None else f"{cell.mean:.4f}"
    return f"{mean} ({cell.failed} failed)" if cell.failed else mean


def _parameters(metrics: StudyMetrics) -> Table:
    groups = list(dict.fromkeys(group for variant in metrics.variants for group in variant.parameters_by_group))
    rows = [
        [
            variant.name,
            format_value(variant.parameters),
            f"{variant.parameters_over_baseline - 1:+.2%}".replace("-", "−"),
            format_value(variant.d_mlp),
            *(format_value(variant.parameters_by_group.get(group, 0)) for group in groups),
        ]
        for variant in metrics.variants
    ]
    headings = ["variant", "all", f"against {metrics.baseline}", "feed-forward width", *groups]
    return Table("Parameters by group", headings, rows, frozenset(range(1, len(headings))))


def _runs(metrics: StudyMetrics) -> Table:
    headings = (
        "run",
        "state",
        f"validation loss, {NATS}",
        "bits per byte",
        "tokens",
        "tokens/s",
        "training, s",
        "peak memory, MB",
    )
    rows = [
        [
            run.run,
            run.state if not run.reason else f"{run.state}: {run.reason}",
            "–" if run.val_loss is None else f"{run.val_loss:.4f}",
            "–" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}{lossy_mark(run.lossy_tokenizer)}",
            format_value(run.tokens),
            format_value(run.tokens_per_s, 3),
            format_value(run.training_s, 3),
            "–" if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e6:,.0f}",
        ]
        for run in metrics.runs
    ]
    kept, rows = _without_speed(metrics, headings, rows)
    return Table("Every run", kept, rows, frozenset(range(2, len(kept))))


def study_pictures(metrics: StudyMetrics, prefix: str = "") -> list[Picture]:
    """Return the differences with their intervals, and the loss against tokens and against seconds of training.

    Seconds are those that a variant's tokens take at the rate of its fastest run: what else a machine does slows runs,
    and is not a property of a model.

    Files are named ``prefix`` and then ``differences.png``, ``loss_by_tokens.png`` and ``loss_by_time.png``.
    """
    pictures = []
    bars = [
        Bar(variant.name, variant.difference.mean, variant.difference.low, variant.difference.high)
        for variant in metrics.variants
        if variant.difference is not None
    ]
    if bars:
        label = f"validation loss minus that of {metrics.baseline}\n({NATS}; left of zero is better)"
        caption = "Paired over seeds; the lines are 95 % intervals (Student t)."
        pictures.append(draw_bars(f"{prefix}differences.png", bars, label, caption, zero_line=True))
    if metrics.curves:
        y_label = f"validation loss ({NATS})"
        caption = "Each variant at its best learning rate; a line for every seed."
        by_tokens = _curves(metrics.curves, [curve.tokens for curve in metrics.curves])
        pictures.append(draw_curves(f"{prefix}loss_by_tokens.png", by_tokens, "tokens seen", y_label, caption))
        if not all(curve.seconds for curve in metrics.curves):
            return pictures
        by_time = _curves(metrics.curves, [curve.seconds for curve in metrics.curves])
        x_label, caption = (
            "seconds of training: tokens over the rate of the fastest run",
            f"{caption} Validation is left out.",
        )
        pictures.append(draw_curves(f"{prefix}loss_by_time.png", by_time, x_label, y_label, caption))
    return pictures


def _curves(curves: Sequence[LossCurve], x: Sequence[Sequence[float]]) -> list[Curve]:
    """Return a marked line for the first seed of each variant and faint ones for its other seeds."""
    names = [curve.variant for curve in curves]
    return [
        Curve(curve.variant, values, curve.loss, is_faint=curve.variant in names[:at])
        for at, (curve, values) in enumerate(zip(curves, x, strict=True))
    ]


def study_headline(metrics: StudyMetrics) -> Headline | None:
    """Return the largest difference to the baseline in favour of a variant, or the smallest against it.

    Its text mentions where that difference is one of several, and where its interval includes zero or there is none.
    """
    found = {variant.name: variant.difference for variant in metrics.variants if variant.difference is not None}
    if not found:
        return None
    best, difference = min(found.items(), key=lambda item: item[1].mean)
    interval = "one seed: no interval, no claim"
    if difference.interval is not None:
        low, high = difference.interval
        interval = f"95 %: {signed(low, 3)} to {signed(high, 3)}, {difference.n} seeds"
        if low <= 0 <= high:
            interval += ", not shown to differ"
    percent = f"{format_float(100 * abs(difference.fraction), 2)} % {'less' if difference.mean < 0 else 'more'}"
    comparison = comparisons(metrics).get((best, metrics.baseline))
    pooled = None if comparison is None else comparison.pooled
    holm = "" if pooled is None else f", p {_p_value(pooled)} by pooled variance after Holm's correction"
    chosen = (
        f"; the lowest of {len(found)} variants{holm or ', not corrected for that choice'}" if len(found) > 1 else ""
    )
    return Headline(
        signed(difference.mean, 3),
        NATS,
        f"{best} against {metrics.baseline}",
        f"{percent}; {interval}{chosen}",
    )
