"""What quantized activations cost the runs of a study, kept with the record of each run, and compared by variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from psannlm.config.run import plan_batches
from psannlm.evaluation.activation_quantization import QuantizationSettings, evaluate_quantized
from psannlm.experiments.finished_runs import (
    ActivationRecord,
    ActivationTails,
    Measured,
    Origin,
    keep_measured,
    kept_runs,
    origin_of,
)
from psannlm.experiments.lr_selection import Choice, score_of
from psannlm.experiments.measures.document_losses import compared_runs
from psannlm.experiments.measures.measured_models import measured_model, why_no_model
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.statistics import paired_difference
from psannlm.reports.schemas.evaluation import QuantizedLossFigures
from psannlm.reports.schemas.measured import Mean
from psannlm.reports.schemas.study import ActivationComparison, ActivationCost, ActivationInput, StudyActivations
from psannlm.runtime.device import pick_precision
from psannlm.training.plan import cut_windows

# Scales of a variant and of the other that are compared, named before anything is measured: the best of several would
# favour those that have more of them.
_COMPARED_SCALES = (
    ("static_least_error", "static_least_error"),
    ("static_known_range", "static_least_error"),
    ("dynamic", "dynamic"),
)

# Costs in nats per token by seed, of a variant with one number of bits and one kind of scale.
_Costs = dict[int, float]


@dataclass(frozen=True)
class RunActivations:
    """Costs of a run, or the reason why there are none."""

    record: ActivationRecord | None
    reason: str = ""


def measure_activations(
    study: Study, *, is_kept: bool = False, on_status: Callable[[str], None] = lambda text: None
) -> dict[str, RunActivations]:
    """Return what the plan's ``activations_bits`` cost the compared runs, by name; nothing if it names none.

    The runs are those at the best learning rate of each variant, on the whole held-out text, in float32; static scales
    are calibrated on the training text. Records in the study's ``runs.jsonl`` are taken from there; the others are
    measured with the checkpoints.

    Args:
        is_kept: add those measured here to the study's ``runs.jsonl``.

    Raises:
        ArtifactError: a checkpoint cannot be read.
        ConfigError: a model lacks a place of the plan.
        StorageError: ``runs.jsonl`` cannot be written, or another process uses the folder.
    """
    if not study.plan.settings.activations_bits:
        return {}
    kept = kept_runs(study.folder)
    found: dict[str, RunActivations] = {}
    for state in compared_runs(study):
        assert state.record is not None
        name, row = state.run.name, score_of(state.record, study.plan.settings.measure)
        origin = origin_of(state.record, row["step"])
        record = kept[name].activations if name in kept else None
        if record is not None and record.origin == origin and wanted_losses(study, record) is not None:
            found[name] = RunActivations(record)
        elif reason := why_no_model(study, state, row["step"]):
            found[name] = RunActivations(None, reason)
        else:
            on_status(f"quantized activations: {name}")
            record = _evaluate(study, state.run, origin)
            found[name] = RunActivations(record)
            if is_kept:
                keep_measured(study, state, Measured(activations=record))
    return found


def _evaluate(study: Study, run: StudyRun, origin: Origin) -> ActivationRecord:
    settings, data = study.plan.settings, study.data[run.variant.variant.config.data]
    assert data.val is not None
    model, device = measured_model(study, run)
    found = evaluate_quantized(
        model,
        cut_windows(run.config, data.val, data.tokenizer),
        QuantizationSettings(settings.activations_bits, settings.activations_places),
        precision=pick_precision("fp32", device),
        calibration=cut_windows(run.config, data.train, data.tokenizer),
        batch_size=plan_batches(run.config).micro_batch_size,
    )
    return ActivationRecord(
        origin=origin,
        places=None if settings.activations_places is None else list(settings.activations_places),
        tokens=found.tokens,
        loss=found.loss,
        losses=[
            QuantizedLossFigures(
                bits=each.bits,
                scale=each.scale,
                loss=each.loss,
                difference=each.difference,
                bits_per_byte=each.bits_per_byte,
            )
            for each in found.losses
        ],
        tails={
            each.place: ActivationTails(kurtosis=each.kurtosis, max_over_rms=each.max_over_rms)
            for each in found.places
            if each.is_quantized
        },
    )


def wanted_losses(study: Study, record: ActivationRecord | None) -> list[QuantizedLossFigures] | None:
    """Return the losses of a record that the plan asks for; None where it lacks some, or is of other places."""
    settings = study.plan.settings
    places = None if settings.activations_places is None else list(settings.activations_places)
    if record is None or record.places != places:
        return None
    if not set(settings.activations_bits) <= {each.bits for each in record.losses}:
        return None
    return [each for each in record.losses if each.bits in settings.activations_bits]


def activation_figures(
    study: Study, chosen: Mapping[str, Choice], found: Mapping[str, RunActivations]
) -> StudyActivations | None:
    """Return the costs by variant, bits and scale, their differences between variants, and the tails of the inputs.

    A variant is compared with the baseline and with those of ``also_compare_to``, paired by seed, at the same scale of
    both: the static one of least error, and the dynamic one; and at its known range, where it has one, with the static
    scale of least error of the other. None if the plan asks for no bits.
    """
    settings = study.plan.settings
    if not settings.activations_bits:
        return None
    records = {
        variant: {
            seed: each.record
            for seed, run in sorted(choice.done.items())
            if (each := found.get(run.name)) is not None and each.record is not None
        }
        for variant, choice in chosen.items()
    }
    costs = {variant: _costs(study, by_seed) for variant, by_seed in records.items()}
    tokens = [record.tokens for by_seed in records.values() for record in by_seed.values()]
    return StudyActivations(
        places=None if settings.activations_places is None else list(settings.activations_places),
        tokens=max(tokens, default=0),
        costs=[
            ActivationCost(
                variant=variant,
                bits=bits,
                scale=scale,
                cost=Mean.of(list(by_seed.values())),
                cost_by_seed={str(seed): cost for seed, cost in by_seed.items()},
            )
            for variant, of_variant in costs.items()
            for (bits, scale), by_seed in of_variant.items()
        ],
        comparisons=[
            comparison
            for against in (settings.baseline, *settings.also_compare_to)
            for variant in costs
            if variant != against
            for comparison in _comparisons(variant, against, costs, settings.activations_bits)
        ],
        inputs=[each for variant, by_seed in records.items() for each in _inputs(variant, list(by_seed.values()))],
        missing={name: each.reason for name, each in found.items() if each.record is None},
    )


def _costs(study: Study, records: Mapping[int, ActivationRecord]) -> dict[tuple[int, str], _Costs]:
    costs: dict[tuple[int, str], _Costs] = {}
    for seed, record in records.items():
        for each in wanted_losses(study, record) or []:
            if each.difference is not None:
                costs.setdefault((each.bits, each.scale), {})[seed] = each.difference
    return costs


def _comparisons(
    variant: str, against: str, costs: Mapping[str, dict[tuple[int, str], _Costs]], all_bits: Sequence[int]
) -> Iterator[ActivationComparison]:
    for bits in all_bits:
        for scale, their_scale in _COMPARED_SCALES:
            ours, theirs = costs[variant].get((bits, scale)), costs[against].get((bits, their_scale))
            if ours is not None and theirs is not None:
                yield ActivationComparison(
                    variant=variant,
                    against=against,
                    bits=bits,
                    scale=scale,
                    against_scale=their_scale,
                    difference=paired_difference(ours, theirs),
                )


def _inputs(variant: str, records: Sequence[ActivationRecord]) -> Iterator[ActivationInput]:
    for place in dict.fromkeys(place for record in records for place in record.tails):
        tails = [record.tails[place] for record in records if place in record.tails]
        kurtoses = [each.kurtosis for each in tails if each.kurtosis is not None]
        ratios = [each.max_over_rms for each in tails if each.max_over_rms is not None]
        yield ActivationInput(
            variant=variant,
            place=place,
            kurtosis=Mean.of(kurtoses) if kurtoses else None,
            max_over_rms=Mean.of(ratios) if ratios else None,
        )
