"""GPU-08: detection of flipped bytes, unnoticed damage and inexact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.gpu_suite.checks import checkpoints
from psannlm.gpu_suite.checks.checkpoints import check_checkpoints, differing, resume_measures
from psannlm.gpu_suite.context import CheckContext
from psannlm.gpu_suite.suite import run_check

pytestmark = pytest.mark.usefixtures("_no_curve")


@pytest.fixture
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.training.run.draw_curve", lambda folder, title, rows: folder / "loss_curve.png")


def test_checkpoint_check_passes_bitwise(context: CheckContext) -> None:
    result = check_checkpoints(context)
    assert result.status == "ok", result.problems()
    assert len(result.measures) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_checkpoint_check_detects_flipped_byte(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = checkpoints.save_checkpoint

    def damaged(*arguments: Any) -> Path:
        folder = original(*arguments)
        content = bytearray((folder / name).read_bytes())
        content[-20] ^= 1
        (folder / name).write_bytes(content)
        return folder

    monkeypatch.setattr(checkpoints, "save_checkpoint", damaged)
    result = run_check("GPU-08", check_checkpoints, context)
    assert result.status == "error"
    assert name in str(result.error)


def test_checkpoint_check_detects_unnoticed_damage(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "read_state", lambda folder: None)
    monkeypatch.setattr(checkpoints, "_resume_measures", lambda context: ([], []))
    [missed] = check_checkpoints(context).missed
    assert (missed.name, missed.value) == ("flipped bits that reading did not notice", 24)
    assert missed.detail.startswith("of 24: model.safetensors, byte ")


def test_checkpoint_check_detects_changed_weights(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoints.load_model

    def rounded(folder: Path) -> Any:
        loaded = original(folder)
        with torch.no_grad():
            loaded.model.embedding.weight.copy_(loaded.model.embedding.weight.bfloat16())
        return loaded

    monkeypatch.setattr(checkpoints, "load_model", rounded)
    monkeypatch.setattr(checkpoints, "_resume_measures", lambda context: ([], []))
    assert [(measure.name, measure.detail) for measure in check_checkpoints(context).missed] == [
        ("weights that differ on the CPU", "embedding.weight"),
        ("weights that differ back on the device", "embedding.weight"),
    ]


def test_checkpoint_check_detects_changed_optimizer(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoints.read_optimizer

    def rounded(folder: Path) -> Any:
        tensors = original(folder)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim == 2)
        tensors[name] = tensors[name].bfloat16().float()
        return tensors

    monkeypatch.setattr(checkpoints, "read_optimizer", rounded)
    monkeypatch.setattr(checkpoints, "_resume_measures", lambda context: ([], []))
    [missed] = check_checkpoints(context).missed
    assert (missed.name, missed.value) == ("optimizer state that differs", 1)


def test_differing_compares_bitwise() -> None:
    a = {"same": torch.tensor([float("nan"), 0.0]), "zero": torch.tensor([0.0]), "gone": torch.ones(1)}
    b = {"same": torch.tensor([float("nan"), 0.0]), "zero": torch.tensor([-0.0]), "new": torch.ones(1)}
    assert differing(a, b) == ["gone", "new", "zero"]
    assert differing({"x": torch.ones(2)}, {"x": torch.ones(2, dtype=torch.float64)}) == ["x"]
    assert differing({"x": torch.tensor(1.0)}, {"x": torch.tensor(1.0)}) == []


def test_resume_must_be_exact_on_deterministic_device() -> None:
    straight, other = {"w": torch.ones(4)}, {"w": torch.ones(4) + 1e-6}
    for again in (None, straight):
        [measure], notes = resume_measures(straight, other, again)
        assert (measure.is_met, notes) == (False, [])
        [measure], _ = resume_measures(straight, dict(straight), again)
        assert measure.is_met


def test_resume_tolerance_on_nondeterministic_device() -> None:
    straight, again = {"w": torch.ones(4)}, {"w": torch.ones(4) * (1 + 1e-5)}
    [near], notes = resume_measures(straight, {"w": torch.ones(4) * (1 - 2e-5)}, again)
    assert near.is_met
    assert "resume is not exact here" in notes[0]
    [far], _ = resume_measures(straight, {"w": torch.ones(4) * (1 - 1e-4)}, again)
    assert not far.is_met
    exact, _ = resume_measures(straight, dict(straight), dict(straight))
    assert [m.name for m in exact] == [near.name] == [far.name], "whether the device repeats itself names nothing"
    for damaged in ({"w": torch.full((4,), float("nan"))}, {}):
        [lost], _ = resume_measures(straight, damaged, again)
        assert not lost.is_met
