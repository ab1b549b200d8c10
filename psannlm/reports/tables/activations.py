"""Tables of an evaluation with quantized activations: losses by bits and scale, and the activations by place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psannlm.reports.page_model import Table

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
