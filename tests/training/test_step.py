"""One optimiser step: token weighting, clipping, precision and non-finite values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.loader import MicroBatch
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.training.optim import OptimizerSet
from psannlm.training.step import StepResult, train_step

Build = Callable[..., Transformer]
CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32, "test")
FP16 = Precision(CPU, torch.float16, "test")


def rows(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 8 tokens, of which only the first ``lengths[i]`` labels count."""
    ids = torch.randint(0, 17, (len(lengths), 9), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = IGNORE_INDEX
    return ids[:, :-1], labels


def batch(input_ids: torch.Tensor, labels: torch.Tensor) -> MicroBatch:
    return MicroBatch(input_ids, labels, int((labels != IGNORE_INDEX).sum()), np.arange(len(labels)))


def step(
    model: nn.Module,
    batches: list[MicroBatch],
    optimizers: OptimizerSet,
    *,
    precision: Precision = FP32,
    scaler: torch.amp.GradScaler | None = None,
    lr: float = 1e-3,
    grad_clip: float | None = None,
    label_smoothing: float = 0.0,
) -> StepResult:
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return train_step(
        model,
        batches,
        optimizers,
        precision=precision,
        scaler=scaler,
        lr=lr,
        grad_clip=grad_clip,
        label_smoothing=label_smoothing,
    )


def gradient_norm(model: nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_step_micro_batches_equal_one_batch(build_tiny: Build, base: str, optimizer: str) -> None:
    """A row with one label must not weigh as much as a full one, nor a micro-batch without any count at all."""
    input_ids, labels = rows([8, 8, 1, 3, 8, 0, 0, 5])
    results, models = [], []
    n_steps = 10 if optimizer == "adamw" else 3  # Muon's products are in bf16
    for size in (8, 4, 1):
        model = build_tiny(base=base)
        optimizers = OptimizerSet(model, optimizer, 0.1)
        parts = [batch(input_ids[i : i + size], labels[i : i + size]) for i in range(0, 8, size)]
        results.append([step(model, parts, optimizers, grad_clip=1.0) for _ in range(n_steps)])
        models.append(model)
    for run, trained in zip(results[1:], models[1:], strict=True):
        for one, several in zip(results[0], run, strict=True):
            assert several.n_labels == one.n_labels == 33
            assert several.loss == pytest.approx(one.loss, abs=2e-6)
            assert several.grad_norm == pytest.approx(one.grad_norm, rel=2e-5)
        for (name, a), b in zip(models[0].named_parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=0, msg=name)


def test_train_step_loss_is_mean_over_labels(build_tiny: Build) -> None:
    model = build_tiny()
    input_ids, labels = rows([8, 2, 0])
    with torch.no_grad():
        log_probabilities = model.logits(model.hidden_states(input_ids)).log_softmax(-1)
    counts = labels != IGNORE_INDEX
    expected = -log_probabilities[counts].gather(1, labels[counts].unsqueeze(1)).mean()
    result = step(model, [batch(input_ids, labels)], OptimizerSet(model, "adamw", 0.0))
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


class NoFloat64(TorchDispatchMode):
    """Refuses operations that mps lacks."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        assert torch.float64 not in {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_train_step_without_float64_is_equal(build_tiny: Build, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [batch(*rows([8, 8, 1, 3])), batch(*rows([5, 0, 8, 2], seed=1))]
    usual, without = build_tiny(base=base), build_tiny(base=base)
    wanted = step(usual, parts, OptimizerSet(usual, "adamw", 0.1), grad_clip=1.0)
    monkeypatch.setattr("psannlm.training.step.sum_dtype", lambda device: torch.float32)
    optimizers = OptimizerSet(without, "adamw", 0.1)
    with NoFloat64():
        result = step(without, parts, optimizers, grad_clip=1.0)
    assert (result.n_labels, result.loss) == (wanted.n_labels, pytest.approx(wanted.loss, rel=1e-6))
    for a, b in zip(usual.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [0.01, 0.5])
def test_clipping_bounds_norm_and_reports_original(build_tiny: Build, limit: float) -> None:
    parts = [batch(*rows([8, 8, 4]))]
    free, clipped = build_tiny(), build_tiny()
    before = step(free, parts, OptimizerSet(free, "adamw", 0.0))
    after = step(clipped, parts, OptimizerSet(clipped, "adamw", 0.0), grad_clip=limit)
    assert before.grad_norm > limit
    assert gradient_norm(free) == pytest.approx(before.grad_norm, rel=1e-5)
    assert after.grad_norm == pytest.approx(before.grad_norm, rel=1e-6)
    assert gradient_norm(clipped) == pytest.approx(limit, rel=1e-3)


def test_clipping_keeps_norm_below_limit(build_tiny: Build) -> None:
    parts = [batch(*rows([8, 8, 4]))]
    free, clipped = build_tiny(), build_tiny()
    step(free, parts, OptimizerSet(free, "adamw", 0.0))
    step(clipped, parts, OptimizerSet(clipped, "adamw", 0.0), grad_clip=1e6)
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), clipped.parameters(), strict=True))


def test_label_smoothing_changes_the_loss(build_tiny: Build) -> None:
    parts = [batch(*rows([8, 8]))]
    plain, smooth = build_tiny(), build_tiny()
    a = step(plain, parts, OptimizerSet(plain, "adamw", 0.0))
    b = step(smooth, parts, OptimizerSet(smooth, "adamw", 0.0), label_smoothing=0.3)
    assert abs(a.loss - b.loss) > 1e-3
    assert not torch.equal(plain.embedding.weight, smooth.embedding.weight)


def test_train_step_uses_given_learning_rate(build_tiny: Build) -> None:
    parts = [batch(*rows([8, 8]))]
    model = build_tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = OptimizerSet(model, "adamw", 0.1)
    step(model, parts, optimizers, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(model, parts, optimizers, lr=0.1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_train_step_clears_former_gradients(build_tiny: Build) -> None:
    parts = [batch(*rows([8, 8]))]
    model = build_tiny()
    optimizers = OptimizerSet(model, "adamw", 0.0)
    first = step(model, parts, optimizers, lr=0.0)
    assert step(model, parts, optimizers, lr=0.0).grad_norm == pytest.approx(first.grad_norm, rel=1e-6)


def test_fp16_clips_unscaled_gradients(build_tiny: Build) -> None:
    """At a scale of 65,536 a clip at 1.0 before unscaling would leave next to nothing of the gradients."""
    parts = [batch(*rows([8, 8, 4])), batch(*rows([3, 0], seed=1))]
    wide, half = build_tiny(), build_tiny()
    expected = step(wide, parts, OptimizerSet(wide, "adamw", 0.0), grad_clip=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    result = step(half, parts, OptimizerSet(half, "adamw", 0.0), precision=FP16, scaler=scaler, grad_clip=0.25)
    assert result.is_finite
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)
    assert gradient_norm(half) == pytest.approx(0.25, rel=1e-3)
    torch.testing.assert_close(half.embedding.weight.grad, wide.embedding.weight.grad, atol=5e-3, rtol=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_fp16_overflow_skips_step_and_lowers_scale(build_tiny: Build, optimizer: str, value: float) -> None:
    """Also where only one of two optimisers saw it: clipping by such a norm spoils the gradients of both."""
    model = build_tiny()
    model.blocks[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * value)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizers = OptimizerSet(model, optimizer, 0.1)
    result = step(model, [batch(*rows([8, 8]))], optimizers, precision=FP16, scaler=scaler, grad_clip=1.0)
    assert not result.is_finite
    assert result.may_continue
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert optimizers.tensors() == {}


def test_fp16_overflow_at_lowest_scale_may_not_continue(build_tiny: Build) -> None:
    model = build_tiny()
    model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    result = step(model, [batch(*rows([8]))], OptimizerSet(model, "adamw", 0.1), precision=FP16, scaler=scaler)
    assert not result.is_finite
    assert not result.may_continue


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nonfinite_step_changes_no_parameter(build_tiny: Build, where: str, optimizer: str) -> None:
    model = build_tiny()
    optimizers = OptimizerSet(model, optimizer, 0.1)
    step(model, [batch(*rows([8, 8]))], optimizers)
    if where == "loss":
        with torch.no_grad():
            model.final_norm.weight[3] = float("nan")
    else:
        model.final_norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in optimizers.tensors().items()}
    result = step(model, [batch(*rows([8, 8]))], optimizers, grad_clip=1.0)
    assert not result.is_finite
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert all(torch.equal(value, state[name]) for name, value in optimizers.tensors().items())


def test_bf16_steps_near_fp32(build_tiny: Build) -> None:
    parts = [batch(*rows([8, 8, 4]))]
    wide, half = build_tiny(), build_tiny()
    a = step(wide, parts, OptimizerSet(wide, "adamw", 0.0))
    b = step(half, parts, OptimizerSet(half, "adamw", 0.0), precision=Precision(CPU, torch.bfloat16, "test"))
    assert b.is_finite
    assert b.loss != a.loss
    assert b.loss == pytest.approx(a.loss, rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_train_step_ignores_batch_without_labels(build_tiny: Build) -> None:
    """What a rank with no window left computes."""
    input_ids, labels = rows([0])
    real = batch(*rows([8, 8]))
    alone, beside = build_tiny(), build_tiny()
    step(alone, [real], OptimizerSet(alone, "adamw", 0.1))
    step(beside, [real, batch(input_ids, labels)], OptimizerSet(beside, "adamw", 0.1))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), beside.parameters(), strict=True))
