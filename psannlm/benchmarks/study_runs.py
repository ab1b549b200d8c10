"""A checked plan and its corpus become runs of equal size: a configuration each, with steps, tokens and parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psannlm.benchmarks.study_plan import StudyPlan, Variant, merge, reads_folder
from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig, config_from_mapping, differences, load_config, to_yaml
from psannlm.data.prepare import PreparedData, prepare
from psannlm.distributed import World
from psannlm.errors import ConfigError, Problem
from psannlm.models.accounting import count_parameters, flops_per_token
from psannlm.models.registry import resolve
from psannlm.reports.plain import Unreadable
from psannlm.reports.runs import CONFIG_FILE, HOUSEKEEPING, METRICS_FILE, read_run
from psannlm.storage import write_text
from psannlm.tokenizers.resolve import load_tokenizer
from psannlm.training.run import build_loader

TOLERANCE = 0.01
_TOKENIZER_SUFFIXES = {"sentencepiece": ".model"}
_ROUND_WIDTH = 8
# What a study sets unless its plan says otherwise: fewer files, and no time spent on samples that nobody reads.
_QUIETER: dict[str, Any] = {"keep_checkpoints": 1, "sample_prompts": []}
# Differences that do not make a run another one: where it is, and what it keeps and tells.
_ASIDE = HOUSEKEEPING | {"train.device", "train.sample_prompts"}

Notice = Callable[[str], None]


@dataclass(frozen=True)
class SizedVariant:
    """A variant whose width is settled, with its parameters by group and what each run of it will do."""

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
        """Learnable parameters in all."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class StudyRun:
    """One run: a configuration file ``<name>.yaml`` in the study's folder, and the run folder ``<name>`` beside it."""

    name: str
    variant: SizedVariant
    lr: float
    seed: int
    config: RunConfig
    study: Path

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
        """What the run said."""
        return self.study / f"{self.name}.log"

    @property
    def flops(self) -> int:
        """Operations of the whole run."""
        return self.variant.flops_per_token * self.variant.n_tokens


@dataclass(frozen=True)
class Study:
    """A plan with its runs, in the order in which they are made.

    Where only some seeds look for the learning rate, the others are no runs before :func:`with_best_rates`.
    """

    plan: StudyPlan
    folder: Path
    variants: tuple[SizedVariant, ...]
    runs: tuple[StudyRun, ...]
    data: dict[DataConfig, PreparedData]

    @property
    def baseline(self) -> SizedVariant:
        """The variant that the others are held against."""
        return next(variant for variant in self.variants if variant.variant.name == self.plan.settings.baseline)


def size_study(plan: StudyPlan, folder: Path, notice: Notice) -> Study:
    """Read the corpus, settle widths and steps, and check the configuration of every run; nothing is written.

    Raises:
        ConfigError: parameters are to be equal and are not, a run's configuration is refused, or ``folder`` holds runs
            of another plan.
        PsannlmError: the corpus cannot be read.
    """
    data: dict[DataConfig, PreparedData] = {}
    for variant in plan.variants:
        if variant.config.data not in data:
            data[variant.config.data] = prepare(variant.config.data, notice)
        if data[variant.config.data].val is None:
            message = (
                "nothing is held out, and there would be nothing to compare; prepare a corpus with a validation part"
            )
            raise ConfigError(Problem(f"variants.{variant.name}", message), str(plan.path))
    _refuse_other_yardsticks(plan, data)
    base = plan.baseline
    target = sum(count_parameters(_resolved(base, data)).values())
    variants = tuple(_sized(plan, variant, data, target) for variant in plan.variants)
    _refuse_unequal(plan, variants, target)
    wanted = [
        (sized, lr, seed) for seed in plan.rate_seeds for sized in variants for lr in sized.variant.learning_rates
    ]
    runs = _runs(plan, wanted, folder, data)
    _refuse_former(folder, [*_former_tokenizers(plan, data, folder), *_all_former_differences(runs, data)])
    return Study(plan, folder, variants, runs, data)


def with_best_rates(study: Study, best: Mapping[str, float]) -> Study:
    """Return the study with the runs of the seeds that did not look for a rate, at the ``best`` of each variant.

    A variant whose best rate is not known yet gets none.

    Raises:
        ConfigError: the folder holds such runs of another plan.
    """
    seeds = [seed for seed in study.plan.settings.seeds if seed not in study.plan.rate_seeds]
    wanted = [
        (sized, best[sized.variant.name], seed)
        for seed in seeds
        for sized in study.variants
        if sized.variant.name in best
    ]
    runs = _runs(study.plan, wanted, study.folder, study.data)
    _refuse_former(study.folder, list(_all_former_differences(runs, study.data)))
    return replace(study, runs=study.runs + runs)


def _all_former_differences(runs: Sequence[StudyRun], data: Mapping[DataConfig, PreparedData]) -> Iterator[Problem]:
    return (problem for run in runs for problem in _former_differences(run, data))


def _refuse_former(folder: Path, problems: Sequence[Problem]) -> None:
    if problems:
        raise ConfigError(
            [*problems[:12], Problem("", "choose another --study folder, or remove these runs")],
            f"{folder}, an earlier study",
        )


def _resolved(variant: Variant, data: Mapping[DataConfig, PreparedData], d_mlp: int | None = None) -> ModelConfig:
    model = variant.config.model if d_mlp is None else variant.config.model.model_copy(update={"d_mlp": d_mlp})
    vocab_size = data[variant.config.data].tokenizer.vocab_size
    return resolve(model, vocab_size=vocab_size, max_seq_len=variant.config.data.max_length)


def _sized(plan: StudyPlan, variant: Variant, data: Mapping[DataConfig, PreparedData], target: int) -> SizedVariant:
    model = _resolved(variant, data)
    is_off = abs(_count(model) / target - 1) > TOLERANCE
    was_solved = is_off and plan.settings.solve_d_mlp and variant.config.model.d_mlp is None
    if was_solved:
        model = _resolved(variant, data, solve_width(lambda width: _count(_resolved(variant, data, width)), target))
    per_token = flops_per_token(model, variant.config.data.max_length)
    loader = build_loader(variant.config, data[variant.config.data], World())
    # The mean over an epoch: its last step may be smaller than the others.
    step_tokens = loader.windows.n_labels / loader.steps_per_epoch
    budget = plan.settings.budget
    tokens = budget.tokens if budget.tokens is not None else (budget.flops or 0.0) / per_token
    n_steps = max(1, round(tokens / step_tokens))
    return SizedVariant(
        variant=variant,
        model=model,
        was_solved=was_solved,
        parameters=count_parameters(model),
        n_steps=n_steps,
        n_tokens=round(n_steps * step_tokens),
        flops_per_token=per_token,
        order_differs=_order_differences(plan.baseline.config, variant.config),
    )


def _count(model: ModelConfig) -> int:
    return sum(count_parameters(model).values())


def solve_width(count: Callable[[int], int], target: int) -> int:
    """Return the feed-forward width whose parameters, ``count(width)``, come nearest to ``target``.

    Parameters grow in a line with the width. A multiple of 8, which matrices of all machines like, is taken where it
    comes within a quarter of the tolerance.
    """
    at_least = count(_ROUND_WIDTH)
    slope = (count(2 * _ROUND_WIDTH) - at_least) / _ROUND_WIDTH
    exact = _ROUND_WIDTH + (target - at_least) / slope if slope else float(_ROUND_WIDTH)
    width = max(1, round(exact))
    rounded = max(_ROUND_WIDTH, _ROUND_WIDTH * round(exact / _ROUND_WIDTH))
    return rounded if abs(count(rounded) / target - 1) <= TOLERANCE / 4 else width


def _order_differences(base: RunConfig, ours: RunConfig) -> tuple[str, ...]:
    """The settings by which a variant sees other text, or the same text in another order, than the baseline."""
    named = ("data.", "train.batch_tokens:", "train.grad_accum_steps:")
    return tuple(line for line in differences(base, ours) if line.startswith(named))


def _refuse_other_yardsticks(plan: StudyPlan, data: Mapping[DataConfig, PreparedData]) -> None:
    """Losses per token of other tokens, or of other held-out text, are no figures that a difference can be taken of."""
    base = data[plan.baseline.config.data]
    problems = []
    for variant in plan.variants:
        mine = data[variant.config.data]
        if mine.tokenizer.fingerprint != base.tokenizer.fingerprint:
            found = "its tokenizer is not"
        elif mine.val is not base.val and _held_out(mine) != _held_out(base):
            found = "its held-out text is not"
        else:
            continue
        message = f"{found} {plan.settings.baseline}'s, and losses per token would not compare; give it another plan"
        problems.append(Problem(f"variants.{variant.name}", f"{message}, and put bits per byte side by side"))
    if problems:
        raise ConfigError(problems, str(plan.path))


def _held_out(data: PreparedData) -> str:
    """A hash of the tokens that validation reads."""
    if data.val is None:
        return ""
    return hashlib.sha256(data.val.tokens(0, data.val.n_framed_tokens).tobytes()).hexdigest()


def _refuse_unequal(plan: StudyPlan, variants: tuple[SizedVariant, ...], target: int) -> None:
    if plan.settings.parameters != "equal":
        return
    problems = []
    for sized in variants:
        excess = sized.n_parameters / target - 1
        if abs(excess) > TOLERANCE:
            message = (
                f"{sized.n_parameters:,} parameters, {excess:+.1%} of {plan.settings.baseline}'s {target:,}; leave its "
                "d_mlp null and solve_d_mlp true, set model.d_mlp, or write parameters: shown"
            )
            problems.append(Problem(f"variants.{sized.variant.name}", message))
    if problems:
        raise ConfigError(problems, str(plan.path))


def _runs(
    plan: StudyPlan,
    wanted: Sequence[tuple[SizedVariant, float, int]],
    folder: Path,
    data: Mapping[DataConfig, PreparedData],
) -> tuple[StudyRun, ...]:
    """The runs of (variant, learning rate, seed), each with its checked configuration."""
    problems: dict[Problem, None] = {}
    runs = []
    for sized, lr, seed in wanted:
        name = f"{sized.variant.name}_lr{lr:g}_seed{seed}"
        try:
            config = _run_config(plan, sized, lr, seed, folder / name, data)
        except ConfigError as error:
            for problem in error.problems:
                problems[Problem(f"variants.{sized.variant.name}.{problem.path}", problem.message)] = None
            continue
        runs.append(StudyRun(name, sized, lr, seed, config, folder))
    if problems:
        raise ConfigError(list(problems), str(plan.path))
    return tuple(runs)


def _run_config(
    plan: StudyPlan,
    sized: SizedVariant,
    lr: float,
    seed: int,
    folder: Path,
    data: Mapping[DataConfig, PreparedData],
) -> RunConfig:
    variant = sized.variant
    decided = {"lr": lr, "seed": seed, "max_steps": sized.n_steps, "checkpoint_dir": str(folder)}
    settings = merge({"train": _QUIETER}, variant.settings)
    settings = merge(settings, {"train": decided, "model": {"d_mlp": sized.model.d_mlp}})
    if _fits_tokenizer(variant.config.data):
        path = tokenizer_path(plan, variant.config.data, data, folder.parent)
        settings = merge(settings, {"data": {"tokenizer_model_path": str(path)}})
    # The tokenizer is written before the first run, so that none of them has to fit it again.
    return config_from_mapping(settings, check_files=False)


def _fits_tokenizer(config: DataConfig) -> bool:
    return config.tokenizer_model_path is None and not reads_folder(config)


def tokenizer_path(plan: StudyPlan, config: DataConfig, data: Mapping[DataConfig, PreparedData], folder: Path) -> Path:
    """Return the file in the study's folder that holds the tokenizer of ``config``."""
    backend = data[config].tokenizer.backend
    known = list(dict.fromkeys(variant.config.data for variant in plan.variants))
    number = known.index(config) + 1
    stem = "tokenizer" if number == 1 else f"tokenizer_{number}"
    return folder / f"{stem}{_TOKENIZER_SUFFIXES.get(backend, '.json')}"


def _former_tokenizers(plan: StudyPlan, data: Mapping[DataConfig, PreparedData], folder: Path) -> Iterator[Problem]:
    """Tokenizers in the study's folder that are not those which the text of today gives."""
    for config, prepared in data.items():
        path = tokenizer_path(plan, config, data, folder)
        if _fits_tokenizer(config) and path.is_file():
            there = load_tokenizer(path).fingerprint
            if there != prepared.tokenizer.fingerprint:
                message = f"another text gave it ({there:.12}); the text as it is now gives"
                yield Problem(path.name, f"{message} {prepared.tokenizer.fingerprint:.12}")


def _former_differences(run: StudyRun, data: Mapping[DataConfig, PreparedData]) -> Iterator[Problem]:
    """By which settings or text the run that is there is not the one that the plan asks for."""
    # What was trained is told by the run's own file; the one beside it says what was to be trained.
    path = run.folder / CONFIG_FILE if (run.folder / METRICS_FILE).is_file() else run.config_path
    if not path.is_file():
        if path != run.config_path:
            yield Problem(run.name, f"holds a run without its {CONFIG_FILE}, and nothing tells what was trained")
        return
    # A tokenizer that the study fits lies in its folder, wherever that is; every other is a part of what is compared.
    aside = _ASIDE | ({"data.tokenizer_model_path"} if _fits_tokenizer(run.variant.variant.config.data) else set())
    for line in differences(load_config(path, check_files=False), run.config):
        if line.split(":")[0] not in aside:
            yield Problem(run.name, f"was made with other settings: {line}")
    if path != run.config_path:
        yield from _former_text(run, data[run.variant.variant.config.data])


def _former_text(run: StudyRun, data: PreparedData) -> Iterator[Problem]:
    """Whether a run's checkpoint tells of other text, or of other tokens, than the plan's paths hold now."""
    try:
        record = read_run(run.folder)
    except Unreadable:
        return  # stopped before its first line was whole; it starts again
    for found, wanted, name in (
        (record.corpus_sha256, data.report.sha256, "text"),
        (record.tokenizer_fingerprint, data.tokenizer.fingerprint, "tokenizer"),
    ):
        if found is not None and found != wanted:
            yield Problem(run.name, f"was made with another {name}: SHA-256 {found:.12}, and now {wanted:.12}")


def write_configs(study: Study) -> None:
    """Put tokenizers and the configuration of every run into the study's folder. Raises StorageError if it cannot."""
    for config, prepared in study.data.items():
        if _fits_tokenizer(config):
            path = tokenizer_path(study.plan, config, study.data, study.folder)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                prepared.tokenizer.save(path)
    for run in study.runs:
        write_text(run.config_path, to_yaml(run.config))
