"""Non-finite steps are skipped or end the run and never reach a checkpoint; out-of-memory errors are explained."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig, to_yaml
from psannlm.errors import TrainingError
from psannlm.models.tensorfile import read_tensors
from psannlm.training import loop
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import list_checkpoints, read_state, step_folder
from psannlm.training.failures import explain_oom, find_non_finite
from psannlm.training.metrics import draw_curve, read_metrics
from psannlm.training.optim import OptimizerSet
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")
SCRIPT = Path(__file__).with_name("train_script.py")


class Notes(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.left_out: list[tuple[int, int]] = []

    def on_step(self, event: StepEvent) -> None:
        if event.is_skipped:
            self.left_out.append((event.step, event.n_skipped))
        else:
            self.steps.append(event.step)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[bool]]:
    """Let the gradients or losses of chosen steps be other than finite; return whether each such step changed nothing.

    The gradient is corrupted on its way back from the second of the step's micro-batches, so that the first one's is
    there already.
    """

    def arrange(steps: dict[int, float], where: str = "gradient") -> list[bool]:
        original, calls, untouched = loop.train_step, [0], []

        def corrupted(module: Any, micro_batches: Any, optimizers: OptimizerSet, **settings: Any) -> Any:
            calls[0] += 1
            value = steps.get(calls[0])
            if value is None:
                return original(module, micro_batches, optimizers, **settings)
            before = state_of(module, optimizers)
            hook = module.final_norm.weight.register_hook(lambda gradient: gradient * value)
            weight = module.final_norm.weight.detach().clone()
            if where == "loss":
                with torch.no_grad():
                    module.final_norm.weight[0] = value
            result = original(module, micro_batches, optimizers, **settings)
            hook.remove()
            with torch.no_grad():
                module.final_norm.weight.copy_(weight)
            after = state_of(module, optimizers)
            untouched.append(
                before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            )
            return result

        monkeypatch.setattr(loop, "train_step", corrupted)
        return untouched

    return arrange


def state_of(module: torch.nn.Module, optimizers: OptimizerSet) -> dict[str, torch.Tensor]:
    tensors = {**module.state_dict(), **optimizers.tensors()}
    return {name: value.clone() for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "value", "optimizer", "amp"),
    [
        ("gradient", math.nan, "adamw", "fp32"),
        ("gradient", math.inf, "muon", "fp32"),
        ("loss", math.nan, "muon", "fp32"),
        ("gradient", math.inf, "adamw", "fp16"),
        ("loss", math.nan, "adamw", "fp16"),
    ],
)
def test_skipped_steps_change_nothing_and_are_reported(
    tiny_run: TinyRun,
    tiny_corpus: Path,
    spoil: Callable[..., list[bool]],
    where: str,
    value: float,
    optimizer: str,
    amp: str,
    monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
) -> None:
    """Under fp16 at a scale of 1, where an overflow is no longer part of finding the scale."""
    original = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: original(device, 1.0, enabled=enabled))
    untouched = spoil({3: value, 4: value, 6: value}, where)
    notes = Notes()
    config = tiny_run(optimizer=optimizer, amp=amp, on_nonfinite="skip", max_steps=7, save_interval_steps=1)
    result = train(config, callbacks=[notes])
    assert untouched == [True, True, True]
    assert notes.steps == [1, 2, 5, 7]
    assert notes.left_out == [(3, 1), (4, 2), (6, 3)]
    assert (result.steps, result.skipped) == (7, 3)
    rows = read_metrics(result.folder)
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] != "eval"] == [
        *(("train", 1), ("train", 2), ("skipped", 3), ("skipped", 4), ("train", 5), ("skipped", 6), ("train", 7))
    ]
    assert [row["skipped"] for row in rows if "skipped" in row] == [2, 3]
    reported = [line for line in logged.messages if line.startswith("skipped step")]
    left_out = next(row for row in rows if row["kind"] == "skipped")
    assert left_out["grad_norm"] is None
    assert len(set(left_out["windows"])) == 16
    assert f"{tiny_corpus}:" in left_out["source"]
    assert f"{left_out['windows'][:8]}"[:-1] in reported[0]
    assert [line.endswith(f"; {n} skipped so far") for n, line in enumerate(reported, 1)] == [True] * 3
    assert_finite_on_disk(result.folder)


def assert_finite_on_disk(folder: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} in a checkpoint")

    assert list_checkpoints(folder)
    for checkpoint in list_checkpoints(folder):
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert find_non_finite(read_tensors(checkpoint / name).tensors.items()) is None
        json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_nonfinite_error_names_windows_of_step(tiny_run: TinyRun, spoil: Callable[..., list[bool]]) -> None:
    """Across the end of an epoch: six steps of 16 windows, the last one smaller."""
    spoil({6: math.nan, 8: math.nan})
    seen: list[list[int]] = []
    original = loop.train_step

    def note(module: Any, micro_batches: Any, *rest: Any, **settings: Any) -> Any:
        seen.append([int(window) for batch in micro_batches for window in batch.window_ids])
        return original(module, micro_batches, *rest, **settings)

    loop.train_step, former = note, loop.train_step
    try:
        result = train(tiny_run(on_nonfinite="skip", max_steps=8))
    finally:
        loop.train_step = former
    rows = {row["step"]: row["windows"] for row in read_metrics(result.folder) if row["kind"] == "skipped"}
    assert rows == {6: seen[5], 8: seen[7]}
    assert len(seen[5]) < 16


def test_nonfinite_third_step_in_a_row_raises(tiny_run: TinyRun, spoil: Callable[..., list[bool]]) -> None:
    spoil({3: math.nan, 4: math.nan, 5: math.nan})
    config = tiny_run(on_nonfinite="skip", max_steps=9, save_interval_steps=1)
    with pytest.raises(TrainingError, match=r"step 5: loss .*, as in the 2 steps before") as caught:
        train(config)
    folder = Path(config.train.checkpoint_dir)
    assert f"the last checkpoint is {step_folder(folder, 4)}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_finite_on_disk(folder)


@pytest.mark.slow
def test_resume_continues_count_of_skipped_steps(tiny_run: TinyRun, spoil: Callable[..., list[bool]]) -> None:
    spoil({2: math.nan, 3: math.nan, 4: math.nan})

    class Crash(Notes):
        def on_step(self, event: StepEvent) -> None:
            super().on_step(event)
            if event.step == 3:
                raise KeyboardInterrupt

    config = tiny_run(on_nonfinite="skip", max_steps=9, save_interval_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Crash()])
    folder = Path(config.train.checkpoint_dir)
    state = read_state(step_folder(folder, 2))
    assert (state.skipped, state.skipped_in_a_row) == (1, 1)
    # Step 3 is repeated, as the fourth call: not finite again.
    notes = Notes()
    result = train(config, callbacks=[notes])
    assert notes.left_out == [(3, 2)]
    assert result.skipped == 2
    assert [row["step"] for row in read_metrics(folder) if row["kind"] == "skipped"] == [2, 3]


@pytest.mark.slow
def test_on_nonfinite_default_stops_and_may_change_on_resume(
    tiny_run: TinyRun, spoil: Callable[..., list[bool]]
) -> None:
    spoil({3: math.nan, 4: math.nan})
    settings = {"max_steps": 5, "save_interval_steps": 1}
    with pytest.raises(TrainingError, match=r"step 3: .*train\.on_nonfinite: skip"):
        train(tiny_run(**settings))
    assert train(tiny_run(**settings, on_nonfinite="skip")).skipped == 1


def test_save_refuses_nonfinite_parameters(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of finite gradients may still lead out of the numbers; the loss tells only one step later."""

    class Spoil(Callback):
        def on_step(self, event: StepEvent) -> None:
            if event.step == 2:
                for optimizer in made[0].optimizers:
                    next(iter(optimizer.state.values()))["exp_avg"][0] = math.inf

    made: list[OptimizerSet] = []
    original = OptimizerSet.__init__

    def note(self: OptimizerSet, *arguments: Any) -> None:
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(OptimizerSet, "__init__", note)
    config = tiny_run(max_steps=4, save_interval_steps=1)
    with pytest.raises(TrainingError, match=r"after step 2 \S+/exp_avg is not finite, and nothing was saved"):
        train(config, callbacks=[Spoil()])
    folder = Path(config.train.checkpoint_dir)
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000001"]
    assert_finite_on_disk(folder)


def test_loss_curve_with_skipped_steps_is_drawn(tmp_path: Path) -> None:
    rows = [{"kind": "skipped", "step": 1, "loss": None, "windows": [1]}, {"kind": "train", "step": 2, "loss": 2.0}]
    assert draw_curve(tmp_path, "run", rows).stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, ["train.batch_tokens (128 now", "train.grad_checkpoint: true", "d_model is 16"], ["data.max_length"]),
        ({"grad_checkpoint": True, "batch_tokens": 16}, ["data.max_length (16 now)"], ["batch_tokens (", "grad_check"]),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_explain_oom_names_keys_to_lower(
    tiny_run: TinyRun, settings: dict[str, Any], said: list[str], unsaid: list[str], error: Exception
) -> None:
    with (
        pytest.raises(TrainingError, match="out of memory at step 7: ") as caught,
        explain_oom(tiny_run(**settings), 7),
    ):
        raise error
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == []
    assert [part for part in unsaid if part in message] == []


def test_explain_oom_passes_other_errors(tiny_run: TinyRun) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_oom(tiny_run(), 1):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.slow
def test_oom_in_first_step_is_explained(tiny_run: TinyRun, tmp_path: Path) -> None:
    model = {"base": "transformer", "mlp": "gelu", "d_mlp": 200_000}
    config = tiny_run(data={"val_split": 0.0}, batch_tokens=16_384, max_steps=1, model=model)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), "memory", "400"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stdout.startswith("TrainingError: out of memory at step 1: lower train.batch_tokens (16384 now")
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list_checkpoints(Path(config.train.checkpoint_dir)) == []
