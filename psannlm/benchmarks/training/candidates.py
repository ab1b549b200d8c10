"""Candidate models of the training benchmark: ours, its variants, the baseline, and models of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from psannlm.benchmarks.harness.interleaved import Count
from psannlm.benchmarks.harness.reference_gpt import TrainableGpt, gpt_flops_per_token, gpt_parameters, gpt_width
from psannlm.benchmarks.harness.reference_llama import (
    TrainableLlama,
    llama_flops_per_token,
    llama_parameters,
    llama_width,
)
from psannlm.benchmarks.harness.reference_models import require_reference_model
from psannlm.config.model import ModelConfig
from psannlm.config.train import Amp
from psannlm.data.loader import MicroBatch
from psannlm.errors import ConfigError, nearest
from psannlm.kernels.compile import compiled
from psannlm.kernels.compiler import require_compiler
from psannlm.models.accounting import count_parameters, flops_per_token, match_mlp_width, refuse_oversize
from psannlm.models.activations import GainedActivation, SineActivation
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import pick_precision
from psannlm.training.optim import OptimizerSet
from psannlm.training.step import train_step

Also = Literal["grad-checkpoint", "gelu", "silu", "transformer", "compile"]
Maker = Literal["psannlm", "transformers", "pytorch"]
# Models of other makers: the Llama of transformers, and a GPT in plain PyTorch.
REFERENCE_MODELS = ("transformers", "pytorch")
# Activations that may replace the sine, by their names in ``also``.
_ACTIVATIONS = {"gelu": "GELU", "silu": "SiLU"}
# The learning rate does not affect the timing; this one keeps the loss finite at every size.
_LEARNING_RATE = 3e-4
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Candidate:
    """A model of the training benchmark: its library, and how it differs from ours.

    ``activation`` replaces the sine: ``GELU``, ``SiLU``, or "" for the sine itself. ``is_baseline``: the base
    ``transformer`` of equal size, with its own feed-forward and without short convolutions.
    """

    name: str
    maker: Maker = "psannlm"
    activation: str = ""
    is_baseline: bool = False
    is_compiled: bool = False
    grad_checkpoint: bool = False


@dataclass(frozen=True)
class ThroughputSettings:
    """Settings of the training benchmark: windows of ``seq_len`` random tokens, ``batch_tokens`` tokens per step.

    Attributes:
        model: resolved configuration of our model.
        steps: steps of each counted run; None: about one second of the fastest candidate.
        also: further candidates: ours with gradient checkpointing (without it, where the settings have it), with GELU
            or SiLU instead of the sine, the base ``transformer`` of equal size, or ``compile``: ours and all of these
            but the one with checkpointing once more, compiled.
        against: libraries whose models of equal size are trained in the same run, of ``REFERENCE_MODELS``.

    Raises:
        ConfigError: a number is too small to measure anything, a name is unknown, or a package is missing.
    """

    model: ModelConfig
    seq_len: int = 256
    batch_tokens: int = 4096
    amp: Amp = "auto"
    is_compiled: bool = False
    grad_checkpoint: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: int | None = None
    repeats: int = 5
    warmup: int = 2
    seed: int = 1337
    also: tuple[Also, ...] = ()
    against: tuple[str, ...] = ()
    tokens_per_step: int = field(init=False)

    def __post_init__(self) -> None:
        lowest = {"seq_len": 1, "repeats": 1, "warmup": 1, "seed": 0, "steps": 1, "batch_tokens": self.seq_len}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                reason = " (one window of seq_len)" if name == "batch_tokens" else ""
                raise ConfigError(f"{name} {value} is too small; use {least}{reason} or more")
        for name in self.also:
            if name not in get_args(Also):
                known = get_args(Also)
                raise ConfigError(f"--also {name!r:.40} is not one of {', '.join(known)}{nearest(name, known)}")
        for name in _ACTIVATIONS.keys() & set(self.also):
            if self.model.mlp not in ("sine", "sineglu"):
                raise ConfigError(
                    f"--also {name} replaces the sine with {_ACTIVATIONS[name]}, but {self.model.base} has "
                    f"{self.model.mlp}; use --base respsann or waveresnet"
                )
            if self.model.sine_quadrature:
                raise ConfigError(f"--also {name} replaces the sine, and model.sine_quadrature needs it; leave one out")
        if "transformer" in self.also and self.model.base == "transformer":
            raise ConfigError("--also transformer adds the base transformer, which --base already is; leave one out")
        for library in self.against:
            if library not in REFERENCE_MODELS:
                meant = nearest(library, REFERENCE_MODELS)
                raise ConfigError(f"--against {library!r:.40} is not one of {', '.join(REFERENCE_MODELS)}{meant}")
            if library == "transformers":
                require_reference_model(library)
        if len(set(self.against)) < len(self.against):
            raise ConfigError("--against names a library twice; name it once")
        object.__setattr__(self, "tokens_per_step", self.batch_tokens // self.seq_len * self.seq_len)

    def candidates(self) -> list[Candidate]:
        """Return the candidates, ours first."""
        base = self.model.base
        plain = Candidate(base, is_compiled=self.is_compiled, grad_checkpoint=self.grad_checkpoint)
        others = [
            self._like(plain, f"{base} with {activation}", activation=activation)
            for name, activation in _ACTIVATIONS.items()
            if name in self.also
        ]
        if "transformer" in self.also:
            others.append(self._like(plain, "transformer", is_baseline=True))
        others += [self._like(plain, name, maker=name) for name in self.against]
        found = [plain, *others]
        if "grad-checkpoint" in self.also:
            word = "without" if self.grad_checkpoint else "with"
            name = f"{base} {word} checkpointing"
            found.append(self._like(plain, name, grad_checkpoint=not self.grad_checkpoint))
        if "compile" in self.also and not self.is_compiled:
            found += [self._like(like, f"{like.name}, compiled", is_compiled=True) for like in (plain, *others)]
        return found

    def _like(self, plain: Candidate, name: str, **changes: Any) -> Candidate:
        return Candidate(**{**vars(plain), "name": name, **changes})


class TrainingRun:
    """A candidate on the device with the batch, optimizer and scaler of the project's own training step."""

    def __init__(self, candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> None:
        self.candidate, self._device = candidate, device
        self._precision = pick_precision(settings.amp, device)
        model, self.description = _build(candidate, settings)
        model.to(device).train()
        if candidate.is_compiled:
            require_compiler(device)
        self._module: nn.Module = compiled(model) if candidate.is_compiled else model
        self._optimizers = OptimizerSet(model, settings.optimizer, _WEIGHT_DECAY)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision.needs_scaler)
        self._batch = random_batch(settings, device)
        self.losses: list[float] = []

    @property
    def precision(self) -> str:
        """The dtype of matrix products, and the reason."""
        return self._precision.reason

    def step(self) -> None:
        """Make one optimizer step and wait for the device."""
        result = train_step(
            self._module,
            [self._batch],
            self._optimizers,
            precision=self._precision,
            scaler=self._scaler,
            lr=_LEARNING_RATE,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.losses.append(result.loss)

    def steps(self, n_steps: int, count: Count) -> None:
        """Make ``n_steps`` steps and report each to ``count``."""
        for done in range(1, n_steps + 1):
            self.step()
            count(done, n_steps)


TrainingRunBuilder = Callable[[Candidate, ThroughputSettings, torch.device], TrainingRun]


def size_of(candidate: Candidate, settings: ThroughputSettings) -> tuple[int, int]:
    """Return a candidate's parameter count and operations per training token (see ``accounting.flops_per_token``)."""
    config = settings.model
    ours = sum(count_parameters(config).values())
    if candidate.maker == "transformers":
        width = llama_width(config, ours)
        return llama_parameters(config, width), llama_flops_per_token(config, width, settings.seq_len)
    if candidate.maker == "pytorch":
        width = gpt_width(config, ours, settings.seq_len)
        return gpt_parameters(config, width, settings.seq_len), gpt_flops_per_token(config, width, settings.seq_len)
    config = config_of(candidate, settings)
    sine = count_parameters(config).get("sine", 0) if candidate.activation else 0
    return sum(count_parameters(config).values()) - sine, flops_per_token(config, settings.seq_len)


def config_of(candidate: Candidate, settings: ThroughputSettings) -> ModelConfig:
    """Return the configuration of a candidate that is a model of ours."""
    ours = settings.model
    if not candidate.is_baseline:
        return ours
    short_conv = ours.short_conv.model_copy(update={"enabled": None})
    changes = {"base": "transformer", "mlp": None, "d_mlp": None, "short_conv": short_conv, "residual_scale": None}
    plain = resolve(ours.model_copy(update=changes))

    def count(width: int) -> int:
        return sum(count_parameters(plain.model_copy(update={"d_mlp": width})).values())

    return plain.model_copy(update={"d_mlp": match_mlp_width(count, sum(count_parameters(ours).values()))})


def random_batch(settings: ThroughputSettings, device: torch.device) -> MicroBatch:
    """Return windows of ids sampled uniformly from the vocabulary, determined by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_tokens // settings.seq_len, settings.seq_len + 1)
    ids = torch.randint(settings.model.vocab_size or 0, size, generator=generator).to(device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return MicroBatch(inputs, labels, labels.numel(), np.arange(size[0]))


def _build(candidate: Candidate, settings: ThroughputSettings) -> tuple[nn.Module, str]:
    """Return a candidate's model on the CPU, and its description."""
    config = settings.model
    if candidate.maker != "psannlm":
        parameters = sum(count_parameters(config).values())
        kind = TrainableLlama if candidate.maker == "transformers" else TrainableGpt
        other = kind(config, parameters, settings.seq_len, settings.seed, candidate.grad_checkpoint)
        return other, other.description
    config = config_of(candidate, settings)
    refuse_oversize(config, config.vocab_size or 1)
    model = build_model(config, seed=settings.seed)
    model.grad_checkpoint = candidate.grad_checkpoint
    if not candidate.activation:
        return model, f"psannlm, {config.base}, {config.mlp}"
    replace_sine(model, candidate.activation)
    return model, f"psannlm, {config.base}, {config.mlp} with {candidate.activation} instead of the sine"


def replace_sine(model: Transformer, activation: str) -> None:
    """Replace the sine by ``GELU`` or ``SiLU`` in every feed-forward; everything else, biases included, stays."""
    for block in model.blocks:
        mlp: Any = block.mlp
        holder = mlp.activation if isinstance(mlp.activation, GainedActivation) else mlp
        if isinstance(holder.activation, SineActivation):
            holder.activation = getattr(nn, activation)()
