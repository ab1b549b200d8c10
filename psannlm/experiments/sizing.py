"""Sizing of an ablation study: widths at equal parameters, steps for the budget, and each run's configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig, config_from_mapping, differences, to_yaml
from psannlm.data.prepare import PreparedData, load_corpus
from psannlm.errors import ConfigError, Problem
from psannlm.experiments.existing_runs import check_existing_runs
from psannlm.experiments.model import Horizon, SizedVariant, Study, StudyRun, fits_tokenizer, tokenizer_path
from psannlm.experiments.plan import StudyPlan, Variant, merge
from psannlm.io.atomic import write_text
from psannlm.models.accounting import WIDTH_TOLERANCE, count_parameters, flops_per_token, match_mlp_width
from psannlm.models.registry import resolve
from psannlm.runtime.distributed import World
from psannlm.training.plan import build_loader
from psannlm.training.run_folder import has_same_config

# Defaults of a study's runs, unless its plan sets them: few checkpoints and no samples.
_RUN_DEFAULTS: dict[str, Any] = {"keep_checkpoints": 1, "sample_prompts": []}


def size_study(plan: StudyPlan, folder: Path) -> Study:
    """Read the corpus, compute widths and steps, and validate the configuration of every run; nothing is written.

    Raises:
        ConfigError: parameter counts differ although the plan wants them equal, a run's configuration is invalid, or
            ``folder`` holds runs of another plan.
        PsannlmError: the corpus cannot be read.
    """
    data: dict[DataConfig, PreparedData] = {}
    for variant in plan.variants:
        if variant.config.data not in data:
            data[variant.config.data] = load_corpus(variant.config.data)
        if data[variant.config.data].val is None:
            message = "there is no validation split to compare losses on; prepare a corpus with one"
            raise ConfigError(Problem(f"variants.{variant.name}", message), str(plan.path))
    _refuse_one_document(plan, data)
    _check_comparable_losses(plan, data)
    base = plan.baseline
    target = sum(count_parameters(_resolved(base, data)).values())
    variants = tuple(_sized(plan, variant, data, target) for variant in plan.variants)
    _refuse_unequal(plan, variants, target)
    study = Study(plan, folder, variants, (), data, _horizons(plan, variants))
    wanted = [(sized, lr, seed) for seed in plan.lr_seeds for sized in variants for lr in sized.variant.learning_rates]
    return _with_runs(study, wanted)


def _horizons(plan: StudyPlan, variants: Sequence[SizedVariant]) -> tuple[Horizon, ...]:
    """Return the variants at each horizon of the plan, the shortest first.

    Raises:
        ConfigError: a horizon has as few steps as the one before, or as many as the budget.
    """
    found: list[Horizon] = []
    for tokens in sorted(plan.settings.horizons):
        sized = tuple(_at_horizon(each, tokens) for each in variants)
        former = [0] * len(sized) if not found else [each.n_steps for each in found[-1].variants]
        for each, whole, least in zip(sized, variants, former, strict=True):
            if not least < each.n_steps < whole.n_steps:
                message = (
                    f"{tokens:g} tokens are {each.n_steps} steps of {each.variant.name}, as many as another budget"
                )
                raise ConfigError(Problem("horizons", f"{message}; leave it out"), str(plan.path))
        found.append(Horizon(tokens, sized))
    return tuple(found)


def _at_horizon(sized: SizedVariant, tokens: float) -> SizedVariant:
    """Return a variant with the steps of a budget of ``tokens``."""
    step_tokens = sized.n_tokens / sized.n_steps
    n_steps = max(1, round(tokens * sized.variant.budget_fraction / step_tokens))
    return replace(sized, n_steps=n_steps, n_tokens=round(n_steps * step_tokens))


def _refuse_one_document(plan: StudyPlan, data: Mapping[DataConfig, PreparedData]) -> None:
    """Raise ConfigError if the held-out documents cannot be divided into halves, and the plan wants that."""
    val = data[plan.baseline.config.data].val
    if plan.settings.choose_on == "tune" and val is not None and val.n_documents < 2:
        message = "tune divides the held-out documents, and there is only one; write choose_on: all, or hold out more"
        raise ConfigError(Problem("choose_on", message), str(plan.path))


def with_best_lrs(study: Study, best: Mapping[str, float]) -> Study:
    """Add the runs of the seeds outside ``lr_seeds``, at the ``best`` learning rate of each variant.

    A variant without a best learning rate gets no runs yet.

    Raises:
        ConfigError: the folder holds runs of another plan under their names.
    """
    seeds = [seed for seed in study.plan.settings.seeds if seed not in study.plan.lr_seeds]
    wanted = [
        (sized, best[sized.variant.name], seed)
        for seed in seeds
        for sized in study.variants
        if sized.variant.name in best
    ]
    return _with_runs(study, wanted)


def _with_runs(study: Study, wanted: Sequence[tuple[SizedVariant, float, int]]) -> Study:
    """Add the runs of (variant, learning rate, seed), and after them those of the horizons that branch off."""
    runs = _runs(study, wanted)
    for horizon in study.horizons:
        shorter = {sized.variant.name: sized for sized in horizon.variants}
        at_horizon = [(shorter[sized.variant.name], lr, seed) for sized, lr, seed in wanted]
        runs += _runs(study, at_horizon, horizon.tokens)
    check_existing_runs(study.plan, study.folder, runs, study.data)
    return replace(study, runs=study.runs + runs)


def _resolved(variant: Variant, data: Mapping[DataConfig, PreparedData], d_mlp: int | None = None) -> ModelConfig:
    model = variant.config.model if d_mlp is None else variant.config.model.model_copy(update={"d_mlp": d_mlp})
    vocab_size = data[variant.config.data].tokenizer.vocab_size
    return resolve(model, vocab_size=vocab_size, max_seq_len=variant.config.data.max_length)


def _sized(plan: StudyPlan, variant: Variant, data: Mapping[DataConfig, PreparedData], target: int) -> SizedVariant:
    model = _resolved(variant, data)
    is_off = abs(_count(model) / target - 1) > WIDTH_TOLERANCE
    was_solved = is_off and plan.settings.solve_d_mlp and variant.config.model.d_mlp is None
    if was_solved:
        model = _resolved(variant, data, match_mlp_width(lambda width: _count(_resolved(variant, data, width)), target))
    per_token = flops_per_token(model, variant.config.data.max_length)
    loader = build_loader(variant.config, data[variant.config.data], World())
    # The mean over an epoch, whose last step may be smaller than the others.
    step_tokens = loader.windows.n_labels / loader.steps_per_epoch
    budget = plan.settings.budget
    tokens = budget.tokens if budget.tokens is not None else (budget.flops or 0.0) / per_token
    n_steps = max(1, round(tokens * variant.budget_fraction / step_tokens))
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


def _order_differences(base: RunConfig, ours: RunConfig) -> tuple[str, ...]:
    """Return the settings that give a variant other text, or another order of the text, than the baseline."""
    named = ("data.", "train.batch_tokens:", "train.grad_accum_steps:", "train.global_batch_tokens:")
    return tuple(line for line in differences(base, ours) if line.startswith(named))


def _check_comparable_losses(plan: StudyPlan, data: Mapping[DataConfig, PreparedData]) -> None:
    """Raise ConfigError if variants differ in tokenizer or validation text, which makes losses incomparable."""
    base = data[plan.baseline.config.data]
    problems = []
    for variant in plan.variants:
        mine = data[variant.config.data]
        if mine.tokenizer.fingerprint != base.tokenizer.fingerprint:
            found = "its tokenizer is not"
        elif mine.val is not base.val and _held_out(mine) != _held_out(base):
            found = "its validation text is not"
        else:
            continue
        message = f"{found} {plan.settings.baseline}'s, so losses per token cannot be compared; use another plan"
        problems.append(Problem(f"variants.{variant.name}", f"{message} and compare bits per byte"))
    if problems:
        raise ConfigError(problems, str(plan.path))


def _held_out(data: PreparedData) -> str:
    """Return a hash of the validation tokens."""
    if data.val is None:
        return ""
    return hashlib.sha256(data.val.tokens(0, data.val.n_framed_tokens).tobytes()).hexdigest()


def _refuse_unequal(plan: StudyPlan, variants: tuple[SizedVariant, ...], target: int) -> None:
    if plan.settings.parameters != "equal":
        return
    problems = []
    for sized in variants:
        excess = sized.n_parameters / target - 1
        if abs(excess) > WIDTH_TOLERANCE:
            message = (
                f"{sized.n_parameters:,} parameters, {excess:+.1%} against {plan.settings.baseline}'s {target:,}; "
                "leave d_mlp null with solve_d_mlp true, set model.d_mlp, or write parameters: shown"
            )
            problems.append(Problem(f"variants.{sized.variant.name}", message))
    if problems:
        raise ConfigError(problems, str(plan.path))


def _runs(
    study: Study, wanted: Sequence[tuple[SizedVariant, float, int]], horizon: float | None = None
) -> tuple[StudyRun, ...]:
    """Return the runs of (variant, learning rate, seed), each with its validated configuration.

    Those of a ``horizon`` branch off the runs of the whole budget, which keep a checkpoint where they do.
    """
    problems: dict[Problem, None] = {}
    runs = []
    for sized, lr, seed in wanted:
        whole = f"{sized.variant.name}_lr{lr:g}_seed{seed}"
        name = whole if horizon is None else f"{whole}_tokens{horizon:g}"
        try:
            config = _run_config(study, sized, lr, seed, study.folder / name)
        except ConfigError as error:
            for problem in error.problems:
                problems[Problem(f"variants.{sized.variant.name}.{problem.path}", problem.message)] = None
            continue
        trunk, step = (None, 0) if horizon is None else (study.folder / whole, _flat_steps(config))
        runs.append(StudyRun(name, sized, lr, seed, config, study.folder, trunk, step))
    if problems:
        raise ConfigError(list(problems), str(study.plan.path))
    return tuple(runs)


def _flat_steps(config: RunConfig) -> int:
    """Return the steps of a run before its cooldown."""
    n_steps = config.train.max_steps or 0
    return n_steps - config.train.cooldown_steps(n_steps)


def _run_config(study: Study, sized: SizedVariant, lr: float, seed: int, folder: Path) -> RunConfig:
    plan, data, variant = study.plan, study.data, sized.variant
    decided = {"lr": lr, "seed": seed, "max_steps": sized.n_steps, "checkpoint_dir": str(folder)}
    if sized in study.variants and study.horizons:
        at = study.variants.index(sized)
        train = variant.config.train
        ends = [horizon.variants[at].n_steps for horizon in study.horizons]
        kept = {*train.keep_steps, *(end - train.cooldown_steps(end) for end in ends)}
        decided["keep_steps"] = sorted(kept - {0})
    settings = merge({"train": _RUN_DEFAULTS}, variant.settings)
    settings = merge(settings, {"train": decided, "model": {"d_mlp": sized.model.d_mlp}})
    if fits_tokenizer(variant.config.data):
        path = tokenizer_path(plan, variant.config.data, data, folder.parent)
        settings = merge(settings, {"data": {"tokenizer_model_path": str(path)}})
    # The tokenizer file is written before the first run, so that no run trains it again.
    return config_from_mapping(settings, check_files=False)


def write_configs(study: Study) -> None:
    """Write tokenizers and the configuration of every run to the study's folder. Raises StorageError if it cannot."""
    for config, prepared in study.data.items():
        if fits_tokenizer(config):
            path = tokenizer_path(study.plan, config, study.data, study.folder)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                prepared.tokenizer.save(path)
    for run in study.runs:
        if not has_same_config(run.config_path, run.config):
            write_text(run.config_path, to_yaml(run.config))
