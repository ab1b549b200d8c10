"""Tables, plots and headline of an ablation study (``reports/ablations/<ts>/metrics.json``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psannlm.reports.page_model import Headline, Picture, Table, format_float, format_value, lossy_mark, signed
from psannlm.reports.plots import Bar, Curve, draw_bars, draw_curves

NATS = "nats per token"


def study_tables(figures: dict[str, Any]) -> list[Table]:
    """Return the tables of results, differences, answers to a counting task, learning rates, parameters and runs.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: the figures are not those of a study.
    """
    answers = [_answers(figures), _answers_by_rate(figures)] if figures.get("task") else []
    # Earlier versions wrote "rivals" and "rate_seeds".
    others = figures.get("also_compare_to", figures.get("rivals", {}))
    differences = [_against(name, found) for name, found in others.items()]
    return [_results(figures), *differences, *answers, _learning_rates(figures), _parameters(figures), _runs(figures)]


def _results(figures: dict[str, Any]) -> Table:
    baseline = figures["baseline"]
    headings = (
        "variant",
        f"validation loss, {NATS}",
        "± over seeds",
        f"minus {baseline}, {NATS}",
        "95 % interval",
        "bits per byte",
        "learning rate",
        "seeds",
        "parameters",
        "tokens/s",
        "training, s",
        "peak memory, MB",
    )
    rows = []
    for variant in figures["variants"]:
        loss, bits, difference = variant["val_loss"], variant["bits_per_byte"], variant["difference"]
        rows.append(
            [
                variant["name"],
                "–" if loss is None else f"{loss['mean']:.4f}",
                "–" if loss is None or loss["std"] is None else f"{loss['std']:.4f}",
                _difference(variant, baseline),
                _interval(difference),
                "–" if bits is None else f"{bits['mean']:.4f}{lossy_mark(variant)}",
                _rate(variant),
                format_value(0 if loss is None else loss["n"]),
                format_value(variant["parameters"]),
                format_value(variant["tokens_per_s"], 3),
                format_value(variant["training_s"], 3),
                "–" if variant["peak_memory_bytes"] is None else f"{variant['peak_memory_bytes'] / 1e6:,.0f}",
            ]
        )
    return Table(
        f"{figures['study']}: each variant at its best learning rate",
        headings,
        rows,
        frozenset(range(1, len(headings))),
        "\n".join(figures["notes"]),
    )


def _against(other: str, differences: dict[str, Any]) -> Table:
    rows = []
    for name, difference in differences.items():
        if difference is None:
            rows.append([name, "–", "–", "–", "0"])
            continue
        percent = 100 * difference["mean"] / difference["baseline_mean"]
        rows.append(
            [
                name,
                signed(difference["mean"], 3),
                _interval(difference),
                signed(percent, 2),
                format_value(difference["n"]),
            ]
        )
    return Table(
        f"Compared to {other}",
        ("variant", f"minus {other}, {NATS}", "95 % interval", "in % of its loss", "seeds"),
        rows,
        frozenset(range(1, 5)),
        "Paired over the seeds that both have, each at its best learning rate.",
    )


def _difference(variant: dict[str, Any], baseline: str) -> str:
    difference = variant["difference"]
    if difference is None:
        return "baseline" if variant["name"] == baseline else "–"
    return signed(difference["mean"], 3)


def _interval(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "–"
    if difference["low"] is None:
        return "one seed: none"
    return f"{signed(difference['low'], 3)} to {signed(difference['high'], 3)}"


def _rate(variant: dict[str, Any]) -> str:
    if variant["learning_rate"] is None:
        return "–"
    # The notes mention a study with a single learning rate.
    caveats = [f"{variant['edge']} tried"] if variant["edge"] in ("lowest", "highest") else []
    if variant.get("provisional") and variant["edge"] != "only":
        caveats.append("provisional")
    return f"{variant['learning_rate']:g}" + (f" ({', '.join(caveats)})" if caveats else "")


def _answers(figures: dict[str, Any]) -> Table:
    headings = (
        "variant",
        "correct answers",
        "by seed",
        f"minus {figures['baseline']}, percentage points",
        "documents with all answers correct",
        "nats per answer",
    )
    rows = []
    for variant in figures["variants"]:
        answers = variant["answers"]
        if answers is None:
            rows.append([variant["name"], *["–"] * (len(headings) - 1)])
            continue
        points = answers["difference"]
        if points is not None:
            points = {"mean": 100 * points["mean"]}
        rows.append(
            [
                variant["name"],
                f"{answers['right']['mean']:.1%}",
                " ".join(f"{fraction:.1%}" for fraction in answers["right_by_seed"].values()),
                _difference({**variant, "difference": points}, figures["baseline"]),
                f"{answers['documents_right']:.1%}",
                f"{answers['nats_per_answer']:.4f}",
            ]
        )
    return Table(
        f"Answers to held-out documents: {figures['task'].replace('_', ' ')}",
        headings,
        rows,
        frozenset(range(1, len(headings))),
        "At the learning rate of the best validation loss. An answer is correct if its token is the most "
        "likely one. A seed learns the task or does not: such fractions are not normally distributed, so no interval "
        "is given.",
    )


def _answers_by_rate(figures: dict[str, Any]) -> Table:
    """Return the fraction of correct answers by variant and learning rate: how narrow is the range that works?"""
    rates = sorted({run["lr"] for run in figures["runs"]})
    fractions: dict[tuple[str, float], list[float]] = {}
    for run in figures["runs"]:
        if run["answers"] is not None:
            fractions.setdefault((run["variant"], run["lr"]), []).append(run["answers"]["right"])
    rows = []
    for variant in figures["variants"]:
        cells = [
            " ".join(f"{fraction:.1%}" for fraction in fractions.get((variant["name"], rate), [])) for rate in rates
        ]
        rows.append([variant["name"], *cells])
    return Table(
        "Correct answers by learning rate",
        ["variant", *(f"{rate:g}" for rate in rates)],
        rows,
        frozenset(range(1, len(rates) + 1)),
        "One figure for each seed that finished.",
    )


def _learning_rates(figures: dict[str, Any]) -> Table:
    rates = sorted({rate["lr"] for variant in figures["variants"] for rate in variant["learning_rates"]})
    rows = []
    for variant in figures["variants"]:
        cells = {rate["lr"]: rate for rate in variant["learning_rates"]}
        row = [variant["name"]]
        for lr in rates:
            cell = cells.get(lr)
            star = " *" if lr == variant["learning_rate"] and len(cells) > 1 else ""
            row.append("" if cell is None else _rate_cell(cell) + star)
        rows.append(row)
    return Table(
        f"Validation loss by learning rate, {NATS}",
        ["variant", *(f"{rate:g}" for rate in rates)],
        rows,
        frozenset(range(1, len(rates) + 1)),
        f"Means over {_seeds_of(figures)} that finished. * lowest loss; at the edge of the grid a rate outside it "
        "may be better.",
    )


def _seeds_of(figures: dict[str, Any]) -> str:
    seeds = figures.get("lr_seeds", figures.get("rate_seeds", figures["seeds"]))
    return "the seeds" if len(seeds) == len(figures["seeds"]) else f"the seeds, of {', '.join(map(str, seeds))},"


def _rate_cell(cell: dict[str, Any]) -> str:
    mean = "–" if cell["mean"] is None else f"{cell['mean']:.4f}"
    return f"{mean} ({cell['failed']} failed)" if cell["failed"] else mean


def _parameters(figures: dict[str, Any]) -> Table:
    groups = list(dict.fromkeys(group for variant in figures["variants"] for group in variant["parameters_by_group"]))
    rows = [
        [
            variant["name"],
            format_value(variant["parameters"]),
            f"{variant['parameters_over_baseline'] - 1:+.2%}".replace("-", "−"),
            format_value(variant["d_mlp"]),
            *(format_value(variant["parameters_by_group"].get(group, 0)) for group in groups),
        ]
        for variant in figures["variants"]
    ]
    headings = ["variant", "all", f"against {figures['baseline']}", "feed-forward width", *groups]
    return Table("Parameters by group", headings, rows, frozenset(range(1, len(headings))))


def _runs(figures: dict[str, Any]) -> Table:
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
            run["run"],
            run["state"] if not run["reason"] else f"{run['state']}: {run['reason']}",
            "–" if run["val_loss"] is None else f"{run['val_loss']:.4f}",
            "–" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.4f}{lossy_mark(run)}",
            format_value(run["tokens"]),
            format_value(run["tokens_per_s"], 3),
            format_value(run["training_s"], 3),
            "–" if run["peak_memory_bytes"] is None else f"{run['peak_memory_bytes'] / 1e6:,.0f}",
        ]
        for run in figures["runs"]
    ]
    return Table("Every run", headings, rows, frozenset(range(2, len(headings))))


def study_pictures(figures: dict[str, Any], prefix: str = "") -> list[Picture]:
    """Return the differences with their intervals, and the loss against tokens and against seconds of training.

    Seconds are those that a variant's tokens take at the rate of its fastest run: what else a machine does slows runs,
    and is not a property of a model.

    Files are named ``prefix`` and then ``differences.png``, ``loss_by_tokens.png`` and ``loss_by_time.png``. Raises as
    :func:`study_tables`.
    """
    pictures = []
    bars = [
        Bar(variant["name"], variant["difference"]["mean"], variant["difference"]["low"], variant["difference"]["high"])
        for variant in figures["variants"]
        if variant["difference"] is not None
    ]
    if bars:
        label = f"validation loss minus that of {figures['baseline']}\n({NATS}; left of zero is better)"
        caption = "Paired over seeds; the lines are 95 % intervals (Student t)."
        pictures.append(draw_bars(f"{prefix}differences.png", bars, label, caption, zero_line=True))
    curves = figures["curves"]
    if curves:
        for file, key, label, more in (
            ("loss_by_tokens.png", "tokens", "tokens seen", ""),
            (
                "loss_by_time.png",
                "seconds",
                "seconds of training: tokens over the rate of the fastest run",
                " Validation is left out.",
            ),
        ):
            drawn = _curves(curves, key)
            caption = f"Each variant at its best learning rate; a line for every seed.{more}"
            pictures.append(draw_curves(f"{prefix}{file}", drawn, label, f"validation loss ({NATS})", caption))
    return pictures


def _curves(curves: Sequence[dict[str, Any]], key: str) -> list[Curve]:
    """Return a marked line for the first seed of each variant and faint ones for its other seeds."""
    seen: set[str] = set()
    drawn = []
    for curve in curves:
        drawn.append(Curve(curve["variant"], curve[key], curve["loss"], curve["variant"] in seen))
        seen.add(curve["variant"])
    return drawn


def study_headline(figures: dict[str, Any]) -> Headline | None:
    """Return the largest difference to the baseline in favour of a variant, or the smallest against it.

    Its text mentions where that difference is one of several, and where its interval includes zero or there is none.
    """
    found = [variant for variant in figures["variants"] if variant["difference"] is not None]
    if not found:
        return None
    best = min(found, key=lambda variant: variant["difference"]["mean"])
    difference = best["difference"]
    interval = "one seed: no interval, no claim"
    if difference["low"] is not None:
        interval = f"95 %: {signed(difference['low'], 3)} to {signed(difference['high'], 3)}, {difference['n']} seeds"
        if difference["low"] <= 0 <= difference["high"]:
            interval += ", not shown to differ"
    fraction = abs(difference["mean"]) / difference["baseline_mean"]
    chosen = f"; the lowest of {len(found)} variants, not corrected for that choice" if len(found) > 1 else ""
    return Headline(
        signed(difference["mean"], 3),
        NATS,
        f"{best['name']} against {figures['baseline']}",
        f"{format_float(100 * fraction, 2)} % {'less' if difference['mean'] < 0 else 'more'}; {interval}{chosen}",
    )
