"""Shared context of the GPU checks: sizes, device, models, batches and training steps."""

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
from psannlm.runtime.signals import delaying_interrupt
from psannlm.training.optim import OptimizerSet
from psannlm.training.step import StepResult, train_step

# 65,536 halved this often is 1.
_MOST_SKIPS = 16
BASE_NAMES: tuple[BaseName, ...] = ("respsann", "waveresnet", "transformer")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batch: ``n_rows`` windows of ``seq_len`` tokens."""

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
    """Sizes of all checks.

    Attributes:
        gradients: GPU-01. training: GPU-02 and 08, and parity in GPU-05 and 06.
        scaling: a training step of GPU-05 and 06 that is long compared with the fixed cost of a step.
        speed: GPU-03; its rows are computed from ``batch_tokens``.
        memory: GPU-04. utilisation: the large model of GPU-03. decoding: GPU-07 and 09.
        roofline: the model of GPU-07 that is compared with memory bandwidth, with as many layers as fit.
        batch_tokens: batch sizes of GPU-03.
        n_steps: training steps of runs that are compared.
        repeats: counted runs of each timing.
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
    """Input of a check.

    Attributes:
        device: a GPU, or the CPU for a dry run.
        is_dry_run: throughputs are measured, but only have to be positive.
        folder: an empty folder for files of the check; it is removed afterwards.
        say: receives log lines.
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
        """Return ``dtype`` on the device; a dry run uses bfloat16 on any CPU, slow without hardware but correct."""
        return Precision(self.device, dtype, f"{dtype_name(dtype)} for the check")

    def low_precision(self) -> torch.dtype:
        """Return the training dtype: bfloat16 if the device has it in hardware, else float16 (GPU) or float32."""
        if computes_in_bf16(self.device):
            return torch.bfloat16
        return torch.float16 if self.is_gpu else torch.float32

    def timed(self, work: Callable[[], Tensor]) -> float:
        """Return the seconds of ``work``, from an idle device until its result is computed."""
        self.wait()
        began = self.clock()
        finish(work())
        return self.clock() - began

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Drop compiled code and free cached memory.

        The compiler silently gives up on a function that it has compiled for eight models or shapes, and what it keeps
        of a model keeps the model's memory.
        """
        with delaying_interrupt():
            gc.collect()
        torch.compiler.reset()
        if self.is_gpu:
            torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def draw_tokens(shape: Shape, seed: int, n_rows: int | None = None) -> Tensor:
    """Return (rows, seq_len + 1) int64 ids on the CPU, low ones more often, which twenty steps can learn."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_rows or shape.n_rows, shape.seq_len + 1, generator=generator)
    return (uniform**4 * shape.vocab_size).long().clamp(max=shape.vocab_size - 1)


def micro_batch(tokens: Tensor) -> MicroBatch:
    """Return the batch whose labels are ``tokens`` (B, T + 1) without the first column."""
    import numpy as np

    labels = tokens[:, 1:].contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), labels, labels.numel(), np.arange(len(tokens)))


@dataclass
class Trainer:
    """A model with its optimizer, trained by the training engine's own step."""

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
        """Build a trainer of a model whose weights depend on ``seed`` alone."""
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
        """Return the loss of each of ``n_steps`` steps, each on its own tokens.

        A step that float16 skipped, because gradients overflowed at the scaler's initial scale, is repeated on the same
        tokens and counted in ``n_skipped``, so that curves of two precisions have the same steps.
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
