"""Tables of quantized activations: losses by bits and scale, and the activations by place, of a model or a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psannlm.reports.page_model import Table, signed
from psannlm.reports.schemas.measured import Mean, PairedDifference
from psannlm.reports.schemas.study import StudyActivations

if TYPE_CHECKING:
    from psannlm.evaluation.activation_quantization import ActivationQuantization


def quantization_tables(found: ActivationQuantization) -> list[Table]:
    """Return the table of losses and that of the activations by place."""
    places = ", ".join(each.place for each in found.places if each.is_quantized)
    tokens = f"{found.tokens:,} tokens scored after {found.calibration_tokens:,} for calibration"
    losses = Table(
        f"loss in nats per token, inputs quantized: {places}; {tokens}",
        ("bits", "scale", "loss", "difference", "bits per byte"),
        [
            ["unquantized", "", f"{found.loss:.4f}", "", f"{found.bits_per_byte:.4f}"],
            *(
                [
                    str(each.bits),
                    each.scale.replace("_", " "),
                    f"{each.loss:.4f}",
                    f"{each.difference:+.4f}",
                    f"{each.bits_per_byte:.4f}",
                ]
                for each in found.losses
            ),
        ],
        frozenset(range(2, 5)),
    )
    outliers = Table(
        "inputs, unquantized: mean and maximum over the layers (kurtosis of a normal distribution: 3)",
        ("input", "kurtosis", "highest", "max / RMS", "highest"),
        [
            [
                each.place,
                f"{each.kurtosis:.2f}",
                f"{each.largest_kurtosis:.2f}",
                f"{each.max_over_rms:.2f}",
                f"{each.largest_max_over_rms:.2f}",
            ]
            for each in found.places
        ],
        frozenset(range(1, 5)),
    )
    return [losses, outliers]


def study_activation_tables(found: StudyActivations) -> list[Table]:
    """Return what quantized activations cost each variant of a study, the differences, and the tails of the inputs."""
    return [_study_costs(found), _study_differences(found), _study_inputs(found)]


def _study_costs(found: StudyActivations) -> Table:
    scales = list(dict.fromkeys(each.scale for each in found.costs))
    cells = {(each.variant, each.bits, each.scale): _mean(each.cost, 4) for each in found.costs}
    rows = [
        [variant, str(bits), *(cells.get((variant, bits, scale), "–") for scale in scales)]
        for variant, bits in dict.fromkeys((each.variant, each.bits) for each in found.costs)
    ]
    headings = ("variant", "bits", *(scale.replace("_", " ") for scale in scales))
    places = "all" if found.places is None else ", ".join(found.places)
    missing = "".join(f"\nNot measured: {name}: {reason}." for name, reason in found.missing.items())
    return Table(
        f"Increase of the loss by quantized activations, nats per token; inputs: {places}",
        headings,
        rows,
        frozenset(range(1, len(headings))),
        f"Of {found.tokens:,} held-out tokens, in float32, weights unquantized; means and standard deviations over "
        "seeds, each variant at its best learning rate. Static scales come from the training text: from the largest "
        "magnitude, from the least squared error, or from a bound that follows from the parameters. Dynamic: "
        f"a scale for each token.{missing}",
    )


def _study_differences(found: StudyActivations) -> Table:
    rows = []
    for each in found.comparisons:
        difference = each.difference
        interval = None if difference is None else difference.interval
        rows.append(
            [
                each.variant,
                each.against,
                str(each.bits),
                each.scale.replace("_", " "),
                each.against_scale.replace("_", " "),
                "–" if difference is None else signed(difference.mean, 4),
                _percent(difference),
                "–" if interval is None else " to ".join(signed(edge, 4) for edge in interval),
            ]
        )
    headings = ("variant", "minus", "bits", "scale", "its scale", "nats per token", "in % of its cost", "95 % interval")
    return Table(
        "Cost of quantized activations, compared",
        headings,
        rows,
        frozenset((2, 5, 6, 7)),
        "Paired over the seeds that both have, Student's t; not corrected for the number of comparisons. No percentage "
        "of a cost that is not clearly above zero.",
    )


def _percent(difference: PairedDifference | None) -> str:
    """Return the difference in percent of the other's cost, where that is more than twice what it varies by."""
    if difference is None or difference.baseline_mean <= 2 * (difference.std or 0.0):
        return "–"
    return signed(100 * difference.fraction, 0)


def _study_inputs(found: StudyActivations) -> Table:
    rows = [[each.variant, each.place, _mean(each.kurtosis, 1), _mean(each.max_over_rms, 1)] for each in found.inputs]
    return Table(
        "Quantized inputs before quantization",
        ("variant", "input", "kurtosis", "max / RMS"),
        rows,
        frozenset((2, 3)),
        "Means over layers, then over seeds, with the standard deviation over seeds. Kurtosis: 3 for a normal "
        "distribution. Max / RMS: largest magnitude over the root of the mean square.",
    )


def _mean(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{mean.mean:.{digits}f}" + ("" if mean.std is None else f" ± {mean.std:.{digits}f}")
