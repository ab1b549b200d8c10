"""The run configuration: read from YAML and overrides, validated and frozen, and the batch sizes derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from psannlm.config.base import Check, Section
from psannlm.config.data import DataConfig, PathSource
from psannlm.config.files import holds_out, is_prepared, may_be_prepared, missing_files
from psannlm.config.model import BASE_MLP, PHASE_KINDS, ModelConfig, SineConfig
from psannlm.config.overrides import Origin, apply_override
from psannlm.config.train import TIED_HEAD, TrainConfig
from psannlm.config.validation import (
    SECTIONS,
    ConfigIssue,
    dotted,
    examine,
    show,
    touches,
    unknown_section,
    with_present_keys,
)
from psannlm.config.yaml_loader import dump_yaml, flow_yaml, read_yaml
from psannlm.errors import ConfigError, Problem, UnknownKeyError

_LONGEST_SHOWN = 300

S = TypeVar("S", bound=Section)


class RunConfig(Section):
    """All settings of a run, frozen. Built by :func:`load_config` or :func:`config_from_mapping`."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="the network")
    data: DataConfig = Field(default_factory=DataConfig, description="the corpus")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training run")

    def checks(self) -> list[Check]:
        found: list[Check] = []
        window = self.data.max_length
        if self.train.batch_tokens < window:
            message = f"{self.train.batch_tokens} tokens are less than one window of data.max_length {window}; raise it"
            found.append(Check(("train.batch_tokens", "data.max_length"), message))
        if self.model.max_seq_len is not None and self.model.max_seq_len < window:
            message = (
                f"{self.model.max_seq_len} positions are fewer than a training window of data.max_length {window}; "
                "raise it, or leave it null"
            )
            found.append(Check(("model.max_seq_len", "data.max_length"), message))
        if self.model.tie_embeddings and self.train.lr_scale.head is not None:
            found.append(Check(("train.lr_scale.head", "model.tie_embeddings"), TIED_HEAD))
        return found


def load_config(path: Path | str, overrides: Sequence[str] = (), *, check_files: bool = True) -> RunConfig:
    """Read a YAML file with the sections ``model``, ``data`` and ``train``, each optional, and apply overrides.

    Args:
        path: the file, UTF-8.
        overrides: ``section.key=value`` each, the value read by the rules of YAML; a later one wins.
        check_files: also refuse sources and tokenizer files that do not exist.

    Raises:
        ConfigError: the file cannot be read, or anything in it is wrong; every problem is in the one message.
    """
    path = Path(path)
    tree = read_yaml(path)
    if tree.value is None and not tree.faults:
        raise ConfigError(f"{path} is empty; write the sections {', '.join(SECTIONS)}")
    origin = Origin(tree.lines)
    issues = [ConfigIssue(place, message) for place, message in tree.faults]
    value = tree.value
    if isinstance(value, dict):
        value = with_present_keys(value)
        for text in overrides:
            issues += apply_override(value, text, origin)
    return _assemble(value, issues, origin, str(path), check_files)


def config_from_mapping(
    mapping: Mapping[str, Any], source: str | None = None, *, check_files: bool = True
) -> RunConfig:
    """Build a RunConfig from ``{"model": {...}, "data": {...}, "train": {...}}``, each optional.

    Args:
        mapping: the sections, as mappings or as section objects.
        source: what to call the mapping in a message.
        check_files: also refuse sources and tokenizer files that do not exist.

    Raises:
        ConfigError: anything is wrong; every problem is in the one message.
    """
    return _assemble(mapping, [], Origin({}), source, check_files)


def section_from_kwargs(cls: type[S], section_name: str, kwargs: Mapping[str, Any]) -> S:
    """Build one section from keyword arguments, as the Python API takes them.

    Raises:
        UnknownKeyError: a keyword is not known (it is a TypeError as well as a ConfigError).
        ConfigError: all keywords are known, but a value or a combination is refused.
    """
    examined = examine(cls, (section_name,), kwargs)
    if examined.issues:
        problems = [Problem(dotted(issue.path), issue.message) for issue in examined.issues]
        is_unknown = any(issue.is_unknown_key for issue in examined.issues)
        raise (UnknownKeyError if is_unknown else ConfigError)(problems)
    return examined.section


def to_yaml(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that :func:`load_config` reads back unchanged."""
    return dump_yaml(config.model_dump(mode="json"))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return one line ``train.lr: 0.0002 -> 0.0003`` for every key whose values in ``a`` and ``b`` differ.

    The parameters of a sine that neither model has are no difference: earlier versions took them without effect.
    """
    lines = _differences((), a.model_dump(mode="json"), b.model_dump(mode="json"))
    if _has_sine(a.model) or _has_sine(b.model):
        return lines
    return [line for line in lines if not line.startswith("model.sine_params.")]


def _differences(at: tuple[str, ...], a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, left in a.items():
        right = b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping) and left.keys() == right.keys():
            lines += _differences((*at, key), left, right)
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            by_place = [{str(index): item for index, item in enumerate(items)} for items in (left, right)]
            lines += _differences((*at, key), *by_place)
        elif left != right:
            lines.append(f"{'.'.join((*at, key))}: {_as_written(left)} -> {_as_written(right)}")
    return lines


def _as_written(value: object) -> str:
    """Return a value on one line: lists and mappings as YAML, shortened if long."""
    if not isinstance(value, (list, Mapping)):
        return show(value)
    text = flow_yaml(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _assemble(
    value: object, issues: list[ConfigIssue], origin: Origin, source: str | None, check_files: bool
) -> RunConfig:
    if not isinstance(value, Mapping):
        message = f"{show(value)} where the sections {', '.join(SECTIONS)} are expected"
        raise ConfigError(f"{source}: {message}" if source else message)
    unread = {issue.path for issue in issues}
    issues = issues + [unknown_section(str(key)) for key in value if key not in SECTIONS]
    sections: dict[str, Section] = {}
    for name, cls in SECTIONS.items():
        examined = examine(cls, (name,), value.get(name))
        sections[name] = examined.section
        # The placeholder of a value that could not be read is not checked.
        issues += [issue for issue in examined.issues if issue.path not in unread]
    config = RunConfig.model_validate(sections, context={"collect": True})
    refused = {issue.path for issue in issues}
    across = [*config.checks(), *_evaluation_without_data(config)]
    # Not a rule of ModelConfig: the configurations of earlier runs and model files must remain readable.
    across += _sine_without_effect(config.model) if check_files else []
    across = [check for check in across if not any(touches(refused, _path(name)) for name in check.fields)]
    issues += [ConfigIssue(_path(check.fields[0]), check.message) for check in across]
    if check_files:
        issues += missing_files(config.data)
    if issues:
        raise ConfigError(origin.problems(issues), source)
    return config


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _has_sine(model: ModelConfig) -> bool:
    mlp = model.mlp or BASE_MLP[model.base]
    has_conv = model.base == "waveresnet" if model.short_conv.enabled is None else model.short_conv.enabled
    return mlp in PHASE_KINDS or (has_conv and model.short_conv.activation == "sine")


def _sine_without_effect(model: ModelConfig) -> list[Check]:
    """Return the keys of sine_params that were changed where no part of the model has a sine."""
    if _has_sine(model):
        return []
    mlp, default = model.mlp or BASE_MLP[model.base], SineConfig()
    changed = [key for key in SineConfig.model_fields if getattr(model.sine_params, key) != getattr(default, key)]
    message = f"has no effect with mlp: {mlp}, which has no sine; drop it, or set mlp to one of "
    message += ", ".join(sorted(PHASE_KINDS))
    return [Check((f"model.sine_params.{key}", "model.mlp", "model.base"), message) for key in changed]


def _evaluation_without_data(config: RunConfig) -> list[Check]:
    # Not a rule of RunConfig: in the Python API validation data can be passed separately.
    if config.train.eval_interval_steps is None or config.data.val_split > 0:
        return []
    asked = f"asks for a validation every {config.train.eval_interval_steps} steps, but"
    paths = [source for source in config.data.sources if isinstance(source, PathSource)]
    if any(may_be_prepared(source.path) for source in paths):
        return []  # refused when the corpus is opened, if nothing is held out
    folders = [source for source in paths if is_prepared(source)]
    if folders:
        if any(holds_out(source) for source in folders):
            return []
        message = f"{asked} {folders[0].path} was prepared with nothing held out; prepare it again with psannlm prep "
        message += "--val-split, or drop this key (--set train.eval_interval_steps=null)"
    else:
        message = f"{asked} data.val_split is 0 and nothing is held out; set data.val_split (0.1 holds out a tenth), "
        message += "or drop this key (--set train.eval_interval_steps=null)"
    return [Check(("train.eval_interval_steps", "data.val_split"), message)]


@dataclass(frozen=True)
class BatchPlan:
    """Batch sizes: windows of ``seq_len`` tokens per micro-batch (one forward pass) and per step (one update)."""

    micro_batch_size: int
    seq_len: int
    grad_accum_steps: int
    world_size: int

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens per micro-batch and rank: ``batch_tokens`` rounded down to whole windows."""
        return self.micro_batch_size * self.seq_len

    @property
    def windows_per_step(self) -> int:
        """Windows per optimizer step, over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.windows_per_step * self.seq_len


def plan_batches(config: RunConfig, world_size: int = 1) -> BatchPlan:
    """Return the batch sizes for ``data.max_length``, ``train.batch_tokens`` and the number of ranks.

    ``micro_batch_size = batch_tokens // max_length`` windows per rank; one step sees
    ``micro_batch_size * max_length * grad_accum_steps * world_size`` tokens. With ``train.global_batch_tokens`` that
    product is given, and ``grad_accum_steps`` follows from it.

    Raises:
        ConfigError: ``train.global_batch_tokens`` is not a multiple of the tokens that all ranks take at once.
    """
    micro_batch_size = config.train.batch_tokens // config.data.max_length
    plan = BatchPlan(micro_batch_size, config.data.max_length, config.train.grad_accum_steps, world_size)
    wanted = config.train.global_batch_tokens
    if wanted is None:
        return plan
    at_once = plan.tokens_per_micro_batch * world_size
    n_steps, rest = divmod(wanted, at_once)
    if rest:
        ranks = f"{world_size} ranks x " if world_size > 1 else ""
        nearest = " or ".join(f"{n * at_once}" for n in (n_steps, n_steps + 1) if n)
        message = (
            f"{wanted} is not a multiple of the {at_once} tokens of a micro-batch ({ranks}{micro_batch_size} windows x "
            f"{config.data.max_length} tokens); set it to {nearest}, or change train.batch_tokens"
        )
        raise ConfigError(Problem("train.global_batch_tokens", message))
    return replace(plan, grad_accum_steps=n_steps)


@dataclass(frozen=True)
class RankMesh:
    """Ranks as a grid: ``n_replicas`` groups of ``n_shards`` consecutive ranks, each group with one copy of the model.

    One shard: every rank has a copy (DDP). One replica: all ranks share one copy (FSDP). Else both (hybrid, HSDP).
    """

    n_replicas: int = 1
    n_shards: int = 1


def plan_mesh(train: TrainConfig, n_ranks: int, n_local: int) -> RankMesh:
    """Return the mesh of ``n_ranks`` ranks, of which ``n_local`` are on this machine, for ``train.fsdp``.

    Raises:
        ConfigError: ``train.shard_size`` does not divide the ranks, or is needed and null.
    """
    if train.fsdp != "hybrid":
        return RankMesh(1, n_ranks) if train.is_sharded else RankMesh(n_ranks, 1)
    n_shards = train.shard_size or n_local
    divisors = [str(n) for n in range(2, n_ranks) if n_ranks % n == 0]
    remedy = f"set it to {' or '.join(divisors[:4])}" if divisors else "set train.fsdp: full"
    if train.shard_size is None and n_local >= n_ranks:
        message = (
            f"hybrid shards the model within each machine, and all {n_ranks} ranks are on one, where that is the same "
            f"as fsdp: full; {remedy}"
        )
    elif train.shard_size is None and n_local == 1:
        message = f"hybrid shards the model within each machine, and this one has one rank of {n_ranks}; {remedy}"
    elif n_ranks % n_shards:
        message = f"{n_shards} ranks for each copy of the model do not divide the {n_ranks} ranks; {remedy}"
    else:
        return RankMesh(n_ranks // n_shards, n_shards)
    raise ConfigError(Problem("train.shard_size", message))


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run: ``max_steps`` if given, however many epochs that takes, else
    ``epochs`` times ``steps_per_epoch``."""
    return config.train.max_steps or config.train.epochs * steps_per_epoch
