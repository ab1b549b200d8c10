"""Sizes and a device in; what the checks of a GPU share out: models, batches, and the training engine's own steps."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psannlm.benchmarks.decoding.modes import finish
from psannlm.benchmarks.harness.interleaved import Clock
from psannlm.config.model import BaseName, ModelConfig
from psannlm.data.loader import MicroBatch
from psannlm.kernels.compile import compiled
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision, computes_in_bf16
from psannlm.training.optim import OptimizerSet
from psannlm.training.step import StepResult, train_step

# Halvings of a scale of 65,536 that leave nothing to halve.
_MOST_SKIPS = 16
BASE_NAMES: tuple[BaseName, ...] = ("respsann", "waveresnet", "transformer")


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it gets: ``n_rows`` windows of ``seq_len`` tokens."""

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int
    n_rows: int

    def config(self, base: BaseName, **settings: Any) -> ModelConfig:
        """Return the resolved configuration of ``base`` at these sizes."""
        sizes = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return resolve(
            ModelConfig(base=base, vocab_size=self.vocab_size, max_seq_len=self.seq_len, **{**sizes, **settings})
        )

    @property
    def n_tokens(self) -> int:
        """Tokens of a batch."""
        return self.n_rows * self.seq_len


@dataclass(frozen=True)
class Sizes:
    """How large each check is.

    Attributes:
        gradients: GPU-01. training: GPU-02 and 08, and parity in GPU-05 and 06.
        scaling: a step of GPU-05 and 06 that takes long beside what is done once a step.
        speed: GPU-03; its rows follow from ``batch_tokens``.
        memory: GPU-04. utilisation: the large model of GPU-03. decoding: GPU-07 and 09.
        roofline: the model of GPU-07 that is held against the rate of memory, with as many layers as fit.
        batch_tokens: of GPU-03.
        n_steps: of the runs that are compared.
        repeats: counted runs of what is timed.
    """

    gradients: Shape
    training: Shape
    scaling: Shape
    speed: Shape
    memory: Shape
    utilisation: Shape
    decoding: Shape
    roofline: Shape
    batch_tokens: tuple[int, ...]
    n_steps: int
    prompt_length: int
    new_tokens: int
    repeats: int


FULL = Sizes(
    gradients=Shape(d_model=128, n_layers=2, n_heads=4, vocab_size=1024, seq_len=256, n_rows=8),
    training=Shape(d_model=256, n_layers=4, n_heads=4, vocab_size=4096, seq_len=256, n_rows=32),
    scaling=Shape(d_model=768, n_layers=12, n_heads=12, vocab_size=4096, seq_len=1024, n_rows=32),
    speed=Shape(d_model=256, n_layers=4, n_heads=4, vocab_size=32_000, seq_len=1024, n_rows=64),
    memory=Shape(d_model=256, n_layers=4, n_heads=4, vocab_size=32_000, seq_len=1024, n_rows=64),
    utilisation=Shape(d_model=1024, n_layers=24, n_heads=16, vocab_size=32_000, seq_len=1024, n_rows=32),
    decoding=Shape(d_model=1024, n_layers=16, n_heads=16, vocab_size=32_000, seq_len=2048, n_rows=8),
    roofline=Shape(d_model=4096, n_layers=14, n_heads=32, vocab_size=32_000, seq_len=2048, n_rows=1),
    batch_tokens=(65_536, 131_072, 262_144),
    n_steps=20,
    prompt_length=256,
    new_tokens=128,
    repeats=5,
)
DRY_RUN = Sizes(
    gradients=Shape(d_model=16, n_layers=2, n_heads=2, vocab_size=61, seq_len=24, n_rows=2),
    training=Shape(d_model=32, n_layers=2, n_heads=2, vocab_size=300, seq_len=32, n_rows=8),
    scaling=Shape(d_model=48, n_layers=2, n_heads=2, vocab_size=300, seq_len=64, n_rows=8),
    speed=Shape(d_model=32, n_layers=2, n_heads=2, vocab_size=256, seq_len=64, n_rows=8),
    memory=Shape(d_model=64, n_layers=6, n_heads=2, vocab_size=64, seq_len=64, n_rows=32),
    utilisation=Shape(d_model=48, n_layers=2, n_heads=2, vocab_size=64, seq_len=32, n_rows=4),
    decoding=Shape(d_model=32, n_layers=1, n_heads=2, vocab_size=128, seq_len=128, n_rows=3),
    roofline=Shape(d_model=64, n_layers=2, n_heads=2, vocab_size=128, seq_len=128, n_rows=1),
    batch_tokens=(512, 1024),
    n_steps=20,
    prompt_length=12,
    new_tokens=8,
    repeats=2,
)


@dataclass(frozen=True)
class CheckContext:
    """What a check gets.

    Attributes:
        device: a GPU, or the CPU for a rehearsal.
        is_dry_run: rates are measured and held against nothing but zero.
        folder: an empty folder for what a check writes; it is removed afterwards.
        say: takes lines for people and for the log.
    """

    device: torch.device
    sizes: Sizes
    is_dry_run: bool
    folder: Path
    say: Callable[[str], None] = lambda line: None
    clock: Clock = time.perf_counter

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def precision(self, dtype: torch.dtype) -> Precision:
        """Return ``dtype`` on the device. A rehearsal takes bfloat16 on any CPU: slow without hardware, and right."""
        return Precision(self.device, dtype, f"{dtype_name(dtype)} for the check")

    def low_precision(self) -> torch.dtype:
        """Return what the device trains in: bfloat16 where it computes in it, else float16 (a GPU) or float32."""
        if computes_in_bf16(self.device):
            return torch.bfloat16
        return torch.float16 if self.is_gpu else torch.float32

    def timed(self, work: Callable[[], Tensor]) -> float:
        """Return the seconds that ``work`` takes from an idle device until its result is there."""
        self.wait()
        began = self.clock()
        finish(work())
        return self.clock() - began

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Forget what was compiled, and hand cached memory back.

        The compiler gives up, and says little of it, on a function that it has compiled for eight models or shapes; and
        what it keeps of a model keeps the model's memory.
        """
        gc.collect()
        torch.compiler.reset()
        if self.is_gpu:
            torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def draw_tokens(shape: Shape, seed: int, n_rows: int | None = None) -> Tensor:
    """Return (rows, seq_len + 1) int64 ids on the CPU, low ones more often: something that twenty steps can learn."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_rows or shape.n_rows, shape.seq_len + 1, generator=generator)
    return (uniform**4 * shape.vocab_size).long().clamp(max=shape.vocab_size - 1)


def micro_batch(tokens: Tensor) -> MicroBatch:
    """Return the batch in which each of ``tokens`` (B, T + 1) but the first is a label."""
    import numpy as np

    labels = tokens[:, 1:].contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), labels, labels.numel(), np.arange(len(tokens)))


@dataclass
class Trainer:
    """A model with an optimiser, that makes the training engine's own steps."""

    model: Transformer
    module: nn.Module
    precision: Precision
    optimizers: OptimizerSet
    scaler: torch.amp.GradScaler
    lr: float = 1e-3
    n_skipped: int = 0

    @classmethod
    def build(
        cls,
        context: CheckContext,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        seed: int = 1337,
        is_compiled: bool = False,
        grad_checkpoint: bool = False,
    ) -> Trainer:
        """Return a trainer of a model whose weights depend on ``seed`` alone."""
        model = build_model(config, seed=seed, device=context.device).train()
        model.grad_checkpoint = grad_checkpoint
        module: nn.Module = compiled(model) if is_compiled else model
        precision = context.precision(dtype)
        scaler = torch.amp.GradScaler(context.device.type, enabled=precision.needs_scaler)
        return cls(model, module, precision, OptimizerSet(model, "adamw", 0.1), scaler)

    def step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Make one optimiser step."""
        return train_step(
            self.module, batches, self.optimizers, precision=self.precision, scaler=self.scaler, lr=self.lr
        )

    def curve(self, shape: Shape, n_steps: int, *, seed: int = 7) -> list[float]:
        """Return the loss of each of ``n_steps`` steps, each on tokens of its own.

        A step that float16 skipped, because gradients overflowed at the scaler's first guesses, is made again on the
        same tokens, and counted in ``n_skipped``: curves of two precisions stay in step.
        """
        losses = []
        for step in range(n_steps):
            batches = [micro_batch(draw_tokens(shape, seed + step))]
            result = self.step(batches)
            for _ in range(_MOST_SKIPS):
                if math.isfinite(result.grad_norm) or not result.may_continue:
                    break
                self.n_skipped += 1
                result = self.step(batches)
            losses.append(result.loss)
        return losses
