"""Averaged weights (train.ema): their formula, that training ignores them, exact resume, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.config.run import RunConfig
from psannlm.data.prepare import load_corpus
from psannlm.errors import ArtifactError
from psannlm.evaluation.loss import evaluate
from psannlm.models.artifact import load_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.reports.runs import read_run
from psannlm.runtime.device import Precision
from psannlm.training.averaging import WeightAverage
from psannlm.training.callbacks import Callback, StepEvent, TrainResult, ValidationEvent
from psannlm.training.checkpoint import EMA_FILE, ema_file, is_own_checkpoint, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.plan import cut_windows
from psannlm.training.run import train

pytestmark = pytest.mark.usefixtures("_no_curve")

STEPS, DECAY = 6, 0.5
# Accumulation of two micro-batches, and dropout, which a validation must not draw from. A parameter that is not learned
# is a buffer of the model.
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "eval_interval_steps": 3,
    "save_interval_steps": 2,
    "keep_checkpoints": 9,
}
MODEL = {"dropout": 0.2, "sine_params": {"learnable": ["amplitude", "frequency"]}}


class Recorder(Callback):
    """Keeps the weights after every step, and the losses of the validations."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.weights: list[dict[str, Tensor]] = []
        self.losses: list[tuple[float, float]] = []

    def on_step(self, event: StepEvent) -> None:
        self.weights.append(copy_of(self.model))

    def on_validation(self, event: ValidationEvent) -> None:
        assert event.ema is not None
        assert f"EMA of the weights: loss {event.ema.loss:.4f}" in str(event)
        self.losses.append((event.result.loss, event.ema.loss))


def copy_of(model: Transformer) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


@dataclass
class Averaged:
    """A run with averaged weights: its configuration, its result, and what happened in it."""

    config: RunConfig
    result: TrainResult
    first: dict[str, Tensor]
    recorder: Recorder

    def file(self, step: int = STEPS) -> Path:
        return ema_file(step_folder(self.result.folder, step))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Averaged:
    from psannlm.config.run import config_from_mapping
    from tests.training.conftest import TINY_DATA, TINY_MODEL, TINY_TRAIN

    folder = tmp_path_factory.mktemp("averaged")
    sections = {
        "model": {**TINY_MODEL, **MODEL},
        "data": {**TINY_DATA, "sources": [{"path": str(tiny_corpus), "per_line": True}]},
        "train": {**TINY_TRAIN, **SETTINGS, "ema": DECAY, "checkpoint_dir": str(folder / "run")},
    }
    config = config_from_mapping(sections)
    data = load_corpus(config.data)
    resolved = resolve(config.model, vocab_size=data.tokenizer.vocab_size, max_seq_len=config.data.max_length)
    model = build_model(resolved, seed=3)
    first, recorder = copy_of(model), Recorder(model)
    return Averaged(config, train(config, model=model, data=data, callbacks=[recorder]), first, recorder)


def test_ema_file_holds_the_formula_of_all_steps(averaged: Averaged) -> None:
    expected = averaged.first
    for n, weights in enumerate(averaged.recorder.weights):
        beta = min(DECAY, (1 + n) / (10 + n))
        expected = {name: beta * expected[name] + (1 - beta) * weights[name] for name in expected}
    assert n == STEPS - 1
    found = load_model(averaged.file())
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=0, msg=name)
    assert found.notes["ema"] == {"decay": DECAY, "updates": STEPS}
    assert found.tokenizer is not None


def test_ema_changes_no_bit_of_training(averaged: Averaged, tmp_path: Path) -> None:
    """Validations exchange the weights with their average in the middle of the run."""
    settings = averaged.config.train.model_copy(update={"ema": None, "checkpoint_dir": str(tmp_path / "without")})
    model = Transformer(averaged.result.model.config)
    model.load_state_dict({name: value.float() for name, value in averaged.first.items()})
    other = train(averaged.config.model_copy(update={"train": settings}), model=model)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (step_folder(run.folder, STEPS) / name for run in (averaged.result, other))
        assert ours.read_bytes() == theirs.read_bytes()
    assert not (step_folder(other.folder, STEPS) / EMA_FILE).exists()
    assert other.ema is None
    assert "ema" not in other.as_dict()


def test_ema_validation_is_that_of_its_file(averaged: Averaged) -> None:
    rows = [row for row in read_metrics(averaged.result.folder) if row["kind"] == "ema"]
    data = load_corpus(averaged.config.data)
    assert data.val is not None
    windows = cut_windows(averaged.config, data.val, data.tokenizer)
    precision = Precision(torch.device("cpu"), torch.float32, "test")
    loaded = load_model(averaged.file())
    figures = evaluate(loaded.model, windows, precision=precision, batch_size=8)
    assert [row["step"] for row in rows] == [3, 6]
    assert [row["loss"] for row in rows] == [ema for _, ema in averaged.recorder.losses]
    assert rows[-1]["loss"] == pytest.approx(figures.loss, abs=1e-6)
    assert rows[-1]["bits_per_byte"] == pytest.approx(figures.bits_per_byte, abs=1e-6)
    assert abs(rows[-1]["loss"] - averaged.recorder.losses[-1][0]) > 1e-4
    assert averaged.result.as_dict()["ema"] == {"step": STEPS, **{k: rows[-1][k] for k in figures.as_dict()}}
    assert loaded.notes["val_loss"] == rows[-1]["loss"]
    assert read_run(averaged.result.folder).row.ema_val_loss == rows[-1]["loss"]


@pytest.mark.parametrize("step", [2, 4])
def test_ema_resumes_to_identical_bits(averaged: Averaged, tmp_path: Path, step: int) -> None:
    """Also from a checkpoint between two validations."""
    settings = averaged.config.train.model_copy(update={"checkpoint_dir": str(tmp_path / "resumed")})
    result = train(
        averaged.config.model_copy(update={"train": settings}), resume=str(step_folder(averaged.result.folder, step))
    )
    assert ema_file(step_folder(result.folder, STEPS)).read_bytes() == averaged.file().read_bytes()
    assert result.ema == averaged.result.ema


def test_ema_that_a_checkpoint_lacks_starts_at_its_weights(averaged: Averaged, tmp_path: Path) -> None:
    checkpoint = step_folder(averaged.result.folder, 4)
    model = load_model(checkpoint).model
    average = WeightAverage(model, DECAY)
    for name, value in average.tensors().items():
        assert torch.equal(value, model.state_dict()[name])
    with pytest.raises(ArtifactError, match="no number of updates"):
        average.load(checkpoint / "model.safetensors")


def test_ema_skips_a_skipped_step(tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    from psannlm.training import loop

    original, calls = loop.train_step, []

    def corrupted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        hook = module.final_norm.weight.register_hook(lambda grad: grad * (float("nan") if len(calls) == 2 else 1.0))
        result = original(module, *args, **kwargs)
        hook.remove()
        return result

    monkeypatch.setattr(loop, "train_step", corrupted)
    result = train(tiny_run(max_steps=3, on_nonfinite="skip", ema=DECAY))
    loaded = load_model(ema_file(step_folder(result.folder, 3)))
    assert result.skipped == 1
    assert loaded.notes["ema"]["updates"] == 2
    assert all(torch.isfinite(value).all() for value in loaded.model.state_dict().values())


def test_ema_file_belongs_to_its_checkpoint(averaged: Averaged, tmp_path: Path) -> None:
    """A flipped bit is noticed, and a checkpoint with the file is still one that psannlm may remove."""
    import shutil

    folder = tmp_path / step_folder(averaged.result.folder, STEPS).name
    shutil.copytree(step_folder(averaged.result.folder, STEPS), folder)
    assert is_own_checkpoint(folder)
    assert read_state(folder).ema == averaged.result.ema
    content = bytearray((folder / EMA_FILE).read_bytes())
    content[-1] ^= 1
    (folder / EMA_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=EMA_FILE):
        read_state(folder)
    (folder / EMA_FILE).unlink()
    with pytest.raises(ArtifactError, match=EMA_FILE):
        read_state(folder)
    with pytest.raises(ArtifactError, match=r"train\.ema"):
        ema_file(folder)


def test_commands_take_the_average_with_ema(
    averaged: Averaged, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text has another loss with --ema, that of the file named outright."""
    from psannlm.commands.app import main

    losses = []
    for where in ([averaged.result.folder], [averaged.result.folder, "--ema"], [ema_file(averaged.result.checkpoint)]):
        options = ["--device", "cpu", "--json", "--out", str(tmp_path / str(len(losses)))]
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(tiny_corpus), *options, "-c", *map(str, where)])
        assert not ended.value.code
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1] == losses[2]
