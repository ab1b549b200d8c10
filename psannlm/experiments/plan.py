"""Study configuration (plan): variants of a base configuration, baseline, seeds, learning rates and budget."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from psannlm.config.base import FileName, Flag, Real, Section, Text, Whole
from psannlm.config.constants import ACTIVATION_BITS, MatrixPlace
from psannlm.config.data import DataConfig, PathSource
from psannlm.config.files import is_prepared
from psannlm.config.overrides import Origin
from psannlm.config.run import RunConfig, config_from_mapping
from psannlm.config.validation import SECTIONS, ConfigIssue, dotted, examine, present_path, show, with_present_keys
from psannlm.config.yaml_loader import KeyPath, YamlTree, read_yaml
from psannlm.data.synthetic.algorithmic import TaskName
from psannlm.errors import ConfigError, Problem, nearest

PositiveReal = Annotated[Real, Field(gt=0)]
Fraction = Annotated[Real, Field(gt=0, le=1)]
# Keys of earlier versions, by their present names.
FORMER_KEYS = {"rivals": "also_compare_to", "rate_seeds": "lr_seeds"}
FORMER_VARIANT_KEYS = {"budget_share": "budget_fraction"}
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
_NAME = re.compile(rf"{NAME_PATTERN}\Z")
_RATES, _FRACTION = "learning_rates", "budget_fraction"
_MAY_BE_EMPTY = ("also_compare_to", "horizons", "activations_bits")
REQUIRED_KEYS = ("base", "variants", "baseline", "budget")
# Configuration keys that the plan decides for every run, and the plan's key that decides them.
OWNED_KEYS = {
    ("train", "lr"): _RATES,
    ("train", "seed"): "seeds",
    ("train", "max_steps"): "budget",
    ("train", "epochs"): "budget",
    ("train", "checkpoint_dir"): "the study's folder (--study)",
}


class Budget(Section):
    """Training budget of each run: either tokens or operations."""

    tokens: PositiveReal | None = Field(None, description="training tokens of each run")
    flops: PositiveReal | None = Field(
        None, description="training FLOPs of each run: matrix products of forward and backward pass"
    )


class PlanSettings(Section):
    """Keys of a plan file, without those inside its variants."""

    base: FileName = Field(
        "", description="configuration file that the variants change; a relative path starts at the plan's folder"
    )
    name: FileName | None = Field(None, description="name of the study; null: the plan's file name")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="changes of the base configuration for all variants"
    )
    variants: dict[str, Any] = Field(
        default_factory=dict,
        description="variants by name: sections model, data, train; learning_rates and budget_fraction",
    )
    baseline: Text = Field("", description="variant that differences are computed against")
    also_compare_to: tuple[Text, ...] = Field(
        (), description="further variants that every variant is compared to, by validation loss only"
    )
    seeds: tuple[Whole, ...] = Field((1337,), description="seeds; one run of each variant and learning rate per seed")
    learning_rates: tuple[PositiveReal, ...] | None = Field(
        None, description="learning rates to try; null: train.lr of the configuration"
    )
    lr_seeds: tuple[Whole, ...] | None = Field(
        None,
        description="seeds that are run at every learning rate; the others only at the selected one; null: all seeds",
    )
    horizons: tuple[PositiveReal, ...] = Field(
        (),
        description="further token budgets below budget.tokens: each run branches off the run of the whole budget "
        "before its cooldown, and trains only its own; needs train.schedule: wsd",
    )
    budget: Budget = Field(default_factory=Budget, description="training budget of each run: tokens or flops")
    parameters: Literal["equal", "shown"] = Field(
        "equal",
        description="equal: parameter counts must be within 1 % of the baseline's; shown: they are only reported",
    )
    solve_d_mlp: Flag = Field(True, description="choose model.d_mlp for equal parameters where a variant sets none")
    measure: Literal["final", "best"] = Field(
        "final", description="validation loss that counts: of the last step (final), or the lowest of a run (best)"
    )
    choose_on: Literal["all", "tune"] = Field(
        "all",
        description="held-out documents whose losses select the learning rates; tune: one half of them, and losses and "
        "answers are reported of the other half",
    )
    report_seeds: Literal["all", "others"] = Field(
        "all",
        description="seeds whose runs are reported; others: those outside lr_seeds, so that the luck of the runs that "
        "selected the learning rates is in no figure",
    )
    activations_bits: tuple[Whole, ...] = Field(
        (),
        description="bits of quantized activations (2 to 16) whose cost is measured on the held-out text after "
        "training, as by psannlm eval --activations-bits; empty: not measured",
    )
    activations_places: tuple[MatrixPlace, ...] | None = Field(
        None, description="inputs of matrix products that activations_bits quantizes; null: all of them"
    )
    answers: TaskName | None = Field(
        None, description="algorithmic task of the text; the accuracy on its held-out documents is reported too"
    )


@dataclass(frozen=True)
class Variant:
    """A variant: its settings as a mapping, as a validated configuration, and its learning rates.

    ``budget_fraction`` is the fraction of the plan's budget it trains for, so that a slower model takes the same time.
    """

    name: str
    settings: dict[str, Any]
    config: RunConfig
    learning_rates: tuple[float, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    budget_fraction: float = 1.0


@dataclass(frozen=True)
class StudyPlan:
    """A validated plan."""

    path: Path
    name: str
    settings: PlanSettings
    variants: tuple[Variant, ...]

    @property
    def lr_seeds(self) -> tuple[int, ...]:
        """The seeds that are run at every learning rate."""
        return self.settings.lr_seeds or self.settings.seeds

    @property
    def baseline(self) -> Variant:
        """The variant that differences are computed against."""
        return next(variant for variant in self.variants if variant.name == self.settings.baseline)


def load_plan(path: Path) -> StudyPlan:
    """Read and validate a plan: its own keys, and the configuration of every variant.

    Raises:
        ConfigError: the plan is invalid; the message lists every problem with its line in the plan.
    """
    tree, twice = _with_present_keys(read_yaml(path))
    if not isinstance(tree.value, Mapping):
        raise ConfigError(f"{path}: {show(tree.value)} instead of the keys of a plan: {', '.join(_keys())}")
    examined = examine(PlanSettings, (), tree.value)
    settings = examined.section
    issues = [ConfigIssue(place, message) for place, message in tree.faults] + twice
    issues += [_as_the_plans(issue) for issue in examined.issues]
    issues += [ConfigIssue((key,), "missing; it must be given") for key in REQUIRED_KEYS if tree.value.get(key) is None]
    refused = {issue.path[:1] for issue in issues}
    issues += [issue for issue in _plan_issues(settings) if issue.path[:1] not in refused]
    if issues:
        # Variants are validated once the base is known.
        raise ConfigError(Origin(tree.lines).problems(issues), str(path))
    base_path = Path(settings.base).expanduser()
    base_path = base_path if base_path.is_absolute() else path.parent / base_path
    base = read_yaml(base_path)
    base_value = with_present_keys(base.value) if isinstance(base.value, Mapping) else {}
    if base.faults or not base_value:
        faults = [ConfigIssue(place, message) for place, message in base.faults]
        raise ConfigError(Origin(base.lines).problems(faults) or "holds no sections", str(base_path))
    builder = _Builder(settings, base_value, tree, str(base_path))
    variants = tuple(builder.build())
    builder.problems += Origin(tree.lines).problems(list(_absent_places(settings, variants)))
    if builder.problems:
        unique = list(dict.fromkeys(builder.problems))
        raise ConfigError(sorted(unique, key=lambda problem: (problem.line is None, problem.line or 0)), str(path))
    return StudyPlan(path, settings.name or path.stem, settings, variants)


def _absent_places(settings: PlanSettings, variants: Sequence[Variant]) -> Iterator[ConfigIssue]:
    """Yield the places of ``activations_places`` that a variant does not have: all models have the others."""
    places = settings.activations_places or ()
    without = [variant.name for variant in variants if variant.config.model.qkv_features is None]
    if "qkv_features" in places and without:
        message = f"model.qkv_features is not set in {', '.join(without)}, so that there is no such input"
        yield ConfigIssue(("activations_places", places.index("qkv_features")), message)


def _with_present_keys(tree: YamlTree) -> tuple[YamlTree, list[ConfigIssue]]:
    """Return a plan with the keys of earlier versions under their present names, and those given under both names."""
    twice: list[ConfigIssue] = []
    moved: dict[KeyPath, KeyPath] = {}

    def renamed(keys: Mapping[str, Any], former: Mapping[str, str], at: KeyPath) -> dict[str, Any]:
        for old, new in former.items():
            if old in keys and new in keys:
                twice.append(ConfigIssue((*at, old), f"former name of {new}, which is given too; remove one of them"))
            elif old in keys:
                moved[(*at, old)] = (*at, new)
        both = {issue.path[-1] for issue in twice if issue.path[:-1] == at}
        return {former.get(key, key): value for key, value in keys.items() if key not in both}

    if not isinstance(tree.value, Mapping):
        return tree, twice
    value = renamed(tree.value, FORMER_KEYS, ())
    if isinstance(value.get("variants"), Mapping):
        value["variants"] = {
            name: renamed(keys, FORMER_VARIANT_KEYS, ("variants", name)) if isinstance(keys, Mapping) else keys
            for name, keys in value["variants"].items()
        }

    def present(path: KeyPath) -> KeyPath:
        starts = [end for end in range(1, len(path) + 1) if path[:end] in moved]
        return (*moved[path[: starts[0]]], *path[starts[0] :]) if starts else path

    lines = {present(path): line for path, line in tree.lines.items()}
    return YamlTree(value, lines, [(present(path), message) for path, message in tree.faults]), twice


def _as_the_plans(issue: ConfigIssue) -> ConfigIssue:
    """Suggest the nearest key of a plan, not of a configuration, for an unknown top-level key."""
    if not issue.is_unknown_key or len(issue.path) != 1:
        return issue
    key = str(issue.path[0])
    if key in SECTIONS:
        return ConfigIssue(issue.path, "unknown key here; put a section under overrides or under a variant", True)
    return ConfigIssue(issue.path, f"unknown key{nearest(key, _keys())}; known here: {', '.join(_keys())}", True)


def _keys() -> list[str]:
    return list(PlanSettings.model_fields)


def _plan_issues(settings: PlanSettings) -> Iterator[ConfigIssue]:
    for key in ("seeds", "lr_seeds", _RATES, *_MAY_BE_EMPTY, "activations_places"):
        values, may_be_empty = getattr(settings, key), key in _MAY_BE_EMPTY
        if values is not None and ((not values and not may_be_empty) or len(set(values)) < len(values)):
            yield ConfigIssue((key,), "empty; give at least one" if not values else "holds a value twice")
    for at, seed in enumerate(settings.lr_seeds or ()):
        if seed not in settings.seeds:
            yield ConfigIssue(
                ("lr_seeds", at), f"{seed} is not one of the seeds: {', '.join(map(str, settings.seeds))}"
            )
    if (settings.budget.tokens is None) == (settings.budget.flops is None):
        yield ConfigIssue(("budget",), "give either tokens or flops, not both")
    if not settings.variants:
        yield ConfigIssue(("variants",), "empty; give at least one")
    elif settings.baseline not in settings.variants:
        message = f"{settings.baseline!r} is not one of the variants{nearest(settings.baseline, settings.variants)}"
        yield ConfigIssue(("baseline",), f"{message}: {', '.join(settings.variants)}")
    for at, other in enumerate(settings.also_compare_to):
        if other == settings.baseline:
            yield ConfigIssue(("also_compare_to", at), f"{other!r} is the baseline, which all are compared to anyway")
        elif settings.variants and other not in settings.variants:
            message = f"{other!r} is not one of the variants{nearest(other, settings.variants)}"
            yield ConfigIssue(("also_compare_to", at), f"{message}: {', '.join(settings.variants)}")
    if settings.name is not None and not _NAME.match(settings.name):
        yield ConfigIssue(("name",), f"{show(settings.name)} is not a folder name; use letters, digits and . _ + -")
    for at, horizon in enumerate(settings.horizons):
        if settings.budget.tokens is None or horizon >= settings.budget.tokens:
            limit = "in operations" if settings.budget.tokens is None else f"{settings.budget.tokens:g} tokens"
            message = f"{horizon:g} tokens are not below the budget, which is {limit}; write budget: {{tokens: ...}}"
            yield ConfigIssue(("horizons", at), message)
    if settings.report_seeds == "others" and not set(settings.seeds) - set(settings.lr_seeds or settings.seeds):
        message = "others leaves no seed to report; name fewer lr_seeds than seeds"
        yield ConfigIssue(("report_seeds",), message)
    low, high = ACTIVATION_BITS
    for at, bits in enumerate(settings.activations_bits):
        if not low <= bits <= high:
            yield ConfigIssue(("activations_bits", at), f"{bits} bits; give numbers from {low} to {high}")
    if settings.activations_places is not None and not settings.activations_bits:
        yield ConfigIssue(("activations_places",), "nothing is quantized without activations_bits; give them too")
    if settings.choose_on == "tune" and settings.measure == "best":
        message = "tune needs measure: final; the best step of a run is selected by the loss of all held-out documents"
        yield ConfigIssue(("choose_on",), message)
    yield from _owned(settings.overrides, ("overrides",))


def _owned(sections: object, at: KeyPath) -> Iterator[ConfigIssue]:
    """Yield the keys in ``sections`` that the plan decides for all variants."""
    if not isinstance(sections, Mapping):
        return
    for (section, key), decider in OWNED_KEYS.items():
        group = sections.get(section)
        if isinstance(group, Mapping) and key in group:
            yield ConfigIssue((*at, section, key), f"decided by {decider} for all variants; remove it here")


class _Builder:
    """Merges base, overrides and each variant, validates the result, and finds the line of each problem."""

    def __init__(self, settings: PlanSettings, base: Mapping[str, Any], tree: YamlTree, base_name: str) -> None:
        self.problems: list[Problem] = []
        self._base, self._base_name = base, base_name
        self._settings = settings.model_copy(update={"overrides": with_present_keys(settings.overrides)})
        self._lines = {present_path(path): line for path, line in tree.lines.items()} | tree.lines
        self._shared = self._problems_of_all()

    def _problems_of_all(self) -> frozenset[Problem]:
        """Return the problems of the base with the overrides, before any variant."""
        try:
            config_from_mapping(merge(self._base, self._settings.overrides))
        except ConfigError as error:
            return frozenset(error.problems)
        return frozenset()

    def build(self) -> Iterator[Variant]:
        """Yield each valid variant; the problems of the others are in ``problems``."""
        origin = Origin(self._lines)
        for name, given in self._settings.variants.items():
            at: KeyPath = ("variants", name)
            issues = list(self._variant_issues(name, given, at))
            beside = VariantKeys() if issues else self._beside(given, at, issues)
            if issues:
                self.problems += origin.problems(issues)
                continue
            own = {key: value for key, value in with_present_keys(given or {}).items() if key != _RATES}
            sections = {key: value for key, value in own.items() if key in SECTIONS}
            merged = merge(merge(self._base, self._settings.overrides), sections)
            train = {key: value for key, value in (merged.get("train") or {}).items() if key not in ("max_steps",)}
            try:
                config = config_from_mapping({**merged, "train": train})
            except ConfigError as error:
                self.problems += [self._place(problem, name) for problem in error.problems]
                continue
            if config.data.val_split == 0 and not reads_folder(config.data):
                message = "there is no validation split to compare losses on; set data.val_split"
                self.problems += origin.problems([ConfigIssue(at, message)])
            self.problems += origin.problems(list(self._horizon_issues(config, at)))
            rates = beside.learning_rates or self._settings.learning_rates or (config.train.lr,)
            yield Variant(name, {**merged, "train": train}, config, rates, own, beside.budget_fraction)

    def _horizon_issues(self, config: RunConfig, at: KeyPath) -> Iterator[ConfigIssue]:
        """Yield what keeps the runs of a variant from branching off with the bits of a run from scratch."""
        if self._settings.horizons and config.train.schedule != "wsd":
            message = f"horizons need train.schedule: wsd, and it is {config.train.schedule}"
            yield ConfigIssue(at, f"{message}: runs of different length share their learning rates until the cooldown")
        if self._settings.horizons and config.train.compile == "auto":
            message = "horizons need train.compile: true or false: auto decides by the length of a run"
            yield ConfigIssue(at, f"{message}, and a compiled model rounds differently")

    def _variant_issues(self, name: str, given: object, at: KeyPath) -> Iterator[ConfigIssue]:
        if not _NAME.match(name):
            yield ConfigIssue(at, f"{show(name)} is not a folder name; use up to 64 letters, digits and . _ + -")
        if given is None:
            return
        if not isinstance(given, Mapping):
            yield ConfigIssue(at, f"{show(given)} is not a group of keys; write model:, data: or train: below it")
            return
        known = [*SECTIONS, _RATES, _FRACTION]
        for key in given:
            if key not in known:
                yield ConfigIssue((*at, key), f"unknown key{nearest(key, known)}; known here: {', '.join(known)}", True)
        yield from _owned(given, at)

    def _beside(self, given: object, at: KeyPath, issues: list[ConfigIssue]) -> VariantKeys:
        """Return the keys of a variant that are not sections; their problems are added to ``issues``."""
        own = given if isinstance(given, Mapping) else {}
        examined = examine(VariantKeys, at, {key: own[key] for key in (_RATES, _FRACTION) if own.get(key) is not None})
        issues += examined.issues
        rates = examined.section.learning_rates
        if not examined.issues and rates is not None and (not rates or len(set(rates)) < len(rates)):
            issues.append(ConfigIssue((*at, _RATES), "empty, or holds a value twice"))
        return examined.section

    def _place(self, problem: Problem, name: str) -> Problem:
        """Return a configuration's problem with its place in the plan, or with a reference to the base."""
        parts: list[str | int] = []
        for part in problem.path.split("."):
            words = re.split(r"\[(\d+)\]", part)
            parts += [int(word) if at % 2 else word for at, word in enumerate(words) if word]
        places: list[KeyPath] = [("overrides",)] if problem in self._shared else [("variants", name), ("overrides",)]
        # Down to one part: the problem may be in a rule across fields, of which another was changed here.
        for end in range(len(parts), 1 if problem in self._shared else 0, -1):
            for at in places:
                if line := self._lines.get((*at, *parts[:end])):
                    return Problem(f"{dotted(at)}.{problem.path}", problem.message, line)
        return Problem(problem.path, f"{problem.message} (in the base, {self._base_name})")


class VariantKeys(Section):
    """Keys of a variant that are not sections."""

    learning_rates: tuple[PositiveReal, ...] | None = Field(
        None, description="learning rates to try; null: those of the plan"
    )
    budget_fraction: Fraction = Field(1.0, description="fraction of the plan's budget that this variant trains for")


def reads_folder(data: DataConfig) -> bool:
    """Whether the corpus is a prepared folder, which holds its tokenizer and validation split."""
    paths = [source for source in data.sources if isinstance(source, PathSource)]
    # It imports NumPy, which a plan does not need.
    from psannlm.data.remote_prepared import find_remote_prepared

    return any(is_prepared(source) or find_remote_prepared(source.path) is not None for source in paths)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``changes``: groups are merged recursively, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        former = merged.get(key)
        both = isinstance(former, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(former, value) if both else value  # type: ignore[arg-type]
    return merged
