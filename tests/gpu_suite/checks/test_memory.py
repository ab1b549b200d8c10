"""GPU-04: detection of wrong memory estimates, and of recomputation that saves nothing or changes the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.gpu_suite.checks import memory as memory_module
from psannlm.gpu_suite.checks.memory import Peak, check_memory, memory_measures
from psannlm.gpu_suite.context import CheckContext, Shape
from psannlm.kernels import cross_entropy
from psannlm.kernels.recompute import recompute_disabled

PREDICTED = {False: 1000, True: 400}


def missed(keeping: Peak, recomputing: Peak) -> list[str]:
    measures = memory_measures("b", {False: keeping, True: recomputing}, PREDICTED)
    return [measure.name for measure in measures if not measure.is_met]


def test_memory_limits() -> None:
    assert missed(Peak(1000, 2.0), Peak(400, 2.0)) == []
    assert missed(Peak(1140, 2.0), Peak(350, 2.0)) == []
    assert missed(Peak(1300, 2.0), Peak(400, 2.0)) == [
        "b, keeping activations: off its prediction",
        "b, keeping activations: peak",
    ]
    assert missed(Peak(700, 2.0), Peak(400, 2.0)) == ["b, keeping activations: off its prediction"]
    assert "b: peak, recomputing / keeping" in missed(Peak(1000, 2.0), Peak(1000, 2.0))
    assert missed(Peak(1000, 2.0), Peak(400, 2.001)) == ["b: change of the loss by recomputing"]


@pytest.mark.slow
def test_memory_estimate_off_by_a_third_fails(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the true one is within the limit: what the profiler counts is what was predicted."""
    monkeypatch.setattr(memory_module, "BASE_NAMES", ("waveresnet",))
    result = check_memory(context)
    assert result.status == "ok", result.problems()
    original = memory_module.training_memory

    def too_much(*arguments: Any, **settings: Any) -> Any:
        found = original(*arguments, **settings)
        return replace(found, activations=int(found.activations * 1.35))

    monkeypatch.setattr(memory_module, "training_memory", too_much)
    off = [measure.name for measure in check_memory(context).missed]
    assert off == [
        "waveresnet, keeping activations: off its prediction",
        "waveresnet, recomputing activations: off its prediction",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_memory_estimate_for_gpu_matches_its_allocations(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch, base: Any, grad_checkpoint: bool, norms_of_a_gpu: Any
) -> None:
    """Measured on a CPU with the plain operations that a GPU gets, in bfloat16, by every allocation of a step."""
    shape = Shape(d_model=64, n_layers=4, n_heads=2, vocab_size=256, seq_len=128, n_rows=24)
    # As large beside the batch as a GPU's chunks are at full size.
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 1 << 18)
    config = shape.config(base)
    small = replace(context, sizes=replace(context.sizes, memory=shape))
    with recompute_disabled(), norms_of_a_gpu():
        peak = memory_module._peak_on_cpu(small, config, torch.bfloat16, grad_checkpoint)
    predicted = memory_module.training_memory(
        config, 24, 128, dtype=torch.bfloat16, grad_checkpoint=grad_checkpoint, device_type="cuda"
    )
    assert peak.n_bytes == pytest.approx(predicted.total, rel=memory_module.PREDICTION_LIMIT)
