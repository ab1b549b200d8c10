"""Schema of an ablation study (``reports/ablations/<ts>/metrics.json``). Losses are in nats per token."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole
from psannlm.reports.schemas.measured import BootstrapDifference, Mean, PairedDifference, PooledDifference, TokenRatio


@dataclass(frozen=True, kw_only=True)
class LrScore(Figures):
    """Mean validation loss at one learning rate, and its numbers of finished, failed and missing runs."""

    lr: Figure
    mean: OptionalFigure
    done: Whole
    failed: Whole
    missing: Whole


@dataclass(frozen=True)
class AnswerScore(Figures):
    """Fractions of correct answers, and of documents with only correct answers, in [0, 1]."""

    right: Figure
    documents_right: Figure
    nats_per_answer: Figure
    n_answers: Whole
    n_documents: Whole


@dataclass(frozen=True, kw_only=True)
class VariantAnswers(Figures):
    """Accuracy of a variant's runs at its best learning rate, and the difference to the baseline's."""

    right: Mean
    right_by_seed: dict[str, Figure]
    difference: PairedDifference | None
    documents_right: Figure
    nats_per_answer: Figure


@dataclass(frozen=True, kw_only=True)
class VariantTask(Figures):
    """Score of a variant's runs on a task at its best learning rate, and the difference to the baseline's."""

    score: Mean
    chance: OptionalFigure
    difference: PairedDifference | None


@dataclass(frozen=True, kw_only=True)
class VariantFigures(Figures):
    """One variant at its best learning rate; ``edge`` and ``provisional`` as in ``lr_selection.Choice``."""

    name: str
    settings: dict[str, Any]
    learning_rate: OptionalFigure
    edge: str
    provisional: Flag = False
    learning_rates: list[LrScore]
    parameters: Whole
    parameters_over_baseline: Figure
    parameters_by_group: dict[str, Whole]
    d_mlp: Whole | None
    d_mlp_was_solved: Flag
    steps: Whole
    tokens: Whole
    flops_per_token: Whole
    val_loss: Mean | None
    val_loss_by_seed: dict[str, Figure]
    bits_per_byte: Mean | None
    lossy_tokenizer: Flag | None = None
    difference: PairedDifference | None
    tokens_per_s: OptionalFigure
    training_s: OptionalFigure
    peak_memory_bytes: Whole | None
    answers: VariantAnswers | None = None
    tasks: dict[str, VariantTask] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFigures(Figures):
    """One run; figures of a run that is not finished are None. ``reused_from``: the kept report they come from.

    ``plateau_exit_tokens``: tokens at which the validation loss left its plateau (``reports.plateau``); where it is
    None, ``plateau`` says why. ``horizon``: the token budget of a run that branched off another; None for others.
    """

    run: str
    variant: str
    lr: Figure
    seed: Whole
    state: str
    reason: str
    val_loss: OptionalFigure
    bits_per_byte: OptionalFigure
    lossy_tokenizer: Flag | None = None
    tokens: Whole | None
    tokens_per_s: OptionalFigure
    training_s: OptionalFigure
    peak_memory_bytes: Whole | None
    folder: str
    answers: AnswerScore | None = None
    reused_from: str | None = None
    plateau_exit_tokens: OptionalFigure = None
    plateau: str = ""
    horizon: OptionalFigure = None


@dataclass(frozen=True, kw_only=True)
class LossCurve(Figures):
    """Validation losses of a run by tokens seen and by seconds of training (empty where runs shared a GPU)."""

    variant: str
    seed: Whole
    tokens: list[Whole]
    seconds: list[Figure]
    loss: list[Figure]

    def __post_init__(self) -> None:
        """Refuse lists of different lengths."""
        if len(self.tokens) != len(self.loss) or len(self.seconds) not in (0, len(self.loss)):
            raise ValueError("the lists of a curve differ in length")


@dataclass(frozen=True, kw_only=True)
class Comparison(Figures):
    """Validation loss of ``variant`` minus that of ``against``, and the ratio of tokens for the same loss.

    ``documents``: the interval by bootstrap over held-out documents; ``documents_missing`` says why there is none.
    """

    variant: str
    against: str
    pooled: PooledDifference | None
    token_ratio: TokenRatio | None
    documents: BootstrapDifference | None = None
    documents_missing: str = ""


@dataclass(frozen=True, kw_only=True)
class HorizonFigures(Figures):
    """A variant at one of the plan's ``horizons``, at the best learning rate of that horizon.

    Attributes:
        horizon: the token budget of the plan.
        steps, tokens: of each run.
    """

    variant: str
    horizon: Figure
    steps: Whole
    tokens: Whole
    learning_rate: OptionalFigure
    edge: str
    provisional: Flag
    val_loss: Mean | None
    val_loss_by_seed: dict[str, Figure]
    difference: PairedDifference | None


@dataclass(frozen=True, kw_only=True)
class ActivationCost(Figures):
    """Increase of a variant's loss by matrix inputs of ``bits`` with one kind of ``scale``, over its seeds."""

    variant: str
    bits: Whole
    scale: str
    cost: Mean
    cost_by_seed: dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class ActivationComparison(Figures):
    """The cost of ``variant`` at ``scale`` minus that of ``against`` at ``against_scale``."""

    variant: str
    against: str
    bits: Whole
    scale: str
    against_scale: str
    difference: PairedDifference | None


@dataclass(frozen=True, kw_only=True)
class ActivationInput(Figures):
    """Kurtosis and largest magnitude over RMS of a variant's unquantized inputs of one place, over its seeds."""

    variant: str
    place: str
    kurtosis: Mean | None
    max_over_rms: Mean | None


@dataclass(frozen=True, kw_only=True)
class StudyActivations(Figures):
    """What quantized activations cost (``evaluation.activation_quantization``), in nats per token.

    Attributes:
        places: the inputs that were quantized; None: all.
        tokens: scored tokens of a run.
        missing: the runs without figures, with the reason.
    """

    places: list[str] | None
    tokens: Whole
    costs: list[ActivationCost]
    comparisons: list[ActivationComparison]
    inputs: list[ActivationInput]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyCorpus(Figures):
    """The text of the baseline; ``val_overlap`` as in ``prepare.PreparedData``."""

    sha256: str
    tokenizer_fingerprint: str
    train_tokens: Whole
    val_tokens: Whole | None
    val_overlap: OptionalFigure


@dataclass(frozen=True, kw_only=True)
class StudyMetrics(Figures):
    """The whole file. Each variant is compared at its own best learning rate, differences are paired by seed.

    ``shared_gpus``: several runs used one GPU at the same time, so there are no throughput and no times.
    ``choose_on``: ``tune`` if one half of the held-out documents selected the learning rates, and losses are those of
    the other half, ``reported_documents``.
    """

    study: str
    plan: str
    folder: str
    baseline: str
    measure: str
    choose_on: str = "all"
    reported_documents: Whole | None = None
    task: str | None = None
    budget: dict[str, Any]
    seeds: list[Whole]
    lr_seeds: Annotated[list[Whole] | None, Field(validation_alias=AliasChoices("lr_seeds", "rate_seeds"))] = None
    corpus: StudyCorpus
    conditions: dict[str, dict[str, Whole]] = field(default_factory=dict)
    shared_gpus: Flag = False
    notes: list[str]
    variants: list[VariantFigures]
    runs: list[RunFigures]
    also_compare_to: Annotated[
        dict[str, dict[str, PairedDifference | None]],
        Field(validation_alias=AliasChoices("also_compare_to", "rivals")),
    ] = field(default_factory=dict)
    curves: list[LossCurve]
    comparisons: list[Comparison] = field(default_factory=list)
    horizons: list[HorizonFigures] = field(default_factory=list)
    activations: StudyActivations | None = None
