"""Data model of an ablation study: plan, sized variants, runs and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig
from psannlm.data.prepare import PreparedData
from psannlm.experiments.plan import StudyPlan, Variant, reads_folder
from psannlm.tokenizers.resolve import file_suffix


@dataclass(frozen=True)
class SizedVariant:
    """A variant with its final width, parameters by group, and the steps and tokens of each of its runs."""

    variant: Variant
    model: ModelConfig
    was_solved: bool
    parameters: dict[str, int]
    n_steps: int
    n_tokens: int
    flops_per_token: int
    order_differs: tuple[str, ...]

    @property
    def n_parameters(self) -> int:
        """Total number of parameters."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class StudyRun:
    """One run: a configuration file ``<name>.yaml`` in the study's folder, and the run folder ``<name>`` beside it.

    Attributes:
        trunk: the run folder of the same run with the whole budget, from which a run of a shorter horizon branches off.
        branch_step: the step after which it branches off: the last before its own cooldown.
    """

    name: str
    variant: SizedVariant
    lr: float
    seed: int
    config: RunConfig
    study: Path
    trunk: Path | None = None
    branch_step: int = 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.study / self.name

    @property
    def config_path(self) -> Path:
        """The configuration to train."""
        return self.study / f"{self.name}.yaml"

    @property
    def log_path(self) -> Path:
        """The run's log."""
        return self.study / f"{self.name}.log"

    def steps_left(self, step: int) -> int:
        """Return the steps to train after ``step``; a branch begins where it leaves its trunk."""
        return self.variant.n_steps - max(step, self.branch_step)

    def flops_left(self, step: int) -> float:
        """Return the training operations after ``step``."""
        return self.variant.flops_per_token * self.variant.n_tokens * self.steps_left(step) / self.variant.n_steps


@dataclass(frozen=True)
class Horizon:
    """A token budget below that of the plan, and the variants with the steps and tokens of its runs, in their order."""

    tokens: float
    variants: tuple[SizedVariant, ...]


@dataclass(frozen=True)
class Study:
    """A plan with its runs, in the order of training.

    With ``lr_seeds``, the runs of the other seeds are added by :func:`with_best_lrs` once learning rates are selected.
    """

    plan: StudyPlan
    folder: Path
    variants: tuple[SizedVariant, ...]
    runs: tuple[StudyRun, ...]
    data: dict[DataConfig, PreparedData]
    horizons: tuple[Horizon, ...] = ()

    @property
    def baseline(self) -> SizedVariant:
        """The variant that differences are computed against."""
        return next(variant for variant in self.variants if variant.variant.name == self.plan.settings.baseline)


def fits_tokenizer(config: DataConfig) -> bool:
    """Whether the study trains the tokenizer of this text and keeps it in its folder."""
    return config.tokenizer_model_path is None and not reads_folder(config)


def tokenizer_path(plan: StudyPlan, config: DataConfig, data: Mapping[DataConfig, PreparedData], folder: Path) -> Path:
    """Return the file in the study's folder that holds the tokenizer of ``config``."""
    backend = data[config].tokenizer.backend
    known = list(dict.fromkeys(variant.config.data for variant in plan.variants))
    number = known.index(config) + 1
    stem = "tokenizer" if number == 1 else f"tokenizer_{number}"
    return folder / f"{stem}{file_suffix(backend)}"
