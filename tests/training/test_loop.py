"""The training loop: learning, best checkpoint, stop on signals and on non-finite values."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from psannlm.config.run import RunConfig, load_config, to_yaml
from psannlm.data.corpus.documents import Document
from psannlm.data.prepare import load_documents
from psannlm.errors import EXIT_INTERRUPTED, Interrupted, StorageError, TrainingError
from psannlm.evaluation.loss import Evaluation
from psannlm.models.tensorfile import read_tensors
from psannlm.models.transformer import Transformer
from psannlm.runtime.signals import stopping_on_signals
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import list_checkpoints, read_state, step_folder
from psannlm.training.context import TimeBudget
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train
from psannlm.training.step import seed_step

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")
SCRIPT = Path(__file__).with_name("train_script.py")


class After(Callback):
    """Does something after one step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._step, self._act = step, act

    def on_step(self, event: StepEvent) -> None:
        if event.step == self._step:
            self._act()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_overfits_one_batch(tiny_run: TinyRun, base: str, optimizer: str) -> None:
    config = tiny_run(
        model={"base": base, "d_model": 32, "d_mlp": 64},
        data={"val_split": 0.0},
        optimizer=optimizer,
        schedule="constant",
        max_steps=70,
        grad_accum_steps=1,
        batch_tokens=128,
        weight_decay=0.0,
    )
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun."
    data = load_documents([Document(text, "text 1")], config.data)
    result = train(config, data=data)
    losses = [row["loss"] for row in read_metrics(result.folder)]
    assert losses[0] == pytest.approx(math.log(260), rel=0.05)
    assert losses[-1] < 0.1


def test_training_keeps_best_checkpoint(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    monkeypatch.setattr("psannlm.training.validation.evaluate", lambda *a, **k: Evaluation(next(losses) * 10, 10, 10))
    config = tiny_run(max_steps=6, save_interval_steps=1, eval_interval_steps=1, keep_checkpoints=2)
    result = train(config)
    assert [path.name for path in list_checkpoints(result.folder)] == [
        "step_00000002",
        "step_00000005",
        "step_00000006",
    ]
    assert result.checkpoint == step_folder(result.folder, 2)
    assert result.best is not None
    assert (result.best["step"], result.best["loss"]) == (2, 1.0)
    assert read_state(step_folder(result.folder, 6)).best == result.best


def test_training_saves_new_best_between_saves(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("psannlm.training.validation.evaluate", lambda *a, **k: Evaluation(next(losses) * 10, 10, 10))
    result = train(tiny_run(max_steps=4, eval_interval_steps=1, keep_checkpoints=1))
    assert [path.name for path in list_checkpoints(result.folder)] == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("keep", [1, 3])
def test_training_keeps_keep_checkpoints_newest(tiny_run: TinyRun, keep: int) -> None:
    config = tiny_run(data={"val_split": 0.0}, max_steps=5, save_interval_steps=1, keep_checkpoints=keep)
    steps = [read_state(path).step for path in list_checkpoints(train(config).folder)]
    assert steps == list(range(6 - keep, 6))


def poison(model: Transformer) -> None:
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")


def poisoned_after(config: RunConfig, step: int) -> str:
    from psannlm.models.registry import build_model, resolve

    model = build_model(resolve(config.model, vocab_size=260, max_seq_len=16), seed=1)
    if step == 0:
        poison(model)
    with pytest.raises(TrainingError) as caught:
        train(config, model=model, callbacks=[After(step, lambda: poison(model))])
    return str(caught.value)


def test_nonfinite_loss_names_step_windows_and_source(tiny_run: TinyRun, tiny_corpus: Path) -> None:
    message = poisoned_after(tiny_run(max_steps=4), 0)
    assert "\n" not in message
    assert "step 1: loss nan" in message
    assert "Windows [" in message
    assert f"{tiny_corpus}:" in message
    assert "no checkpoint was written yet" in message
    assert "train.lr" in message


def test_nonfinite_loss_names_last_checkpoint(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=6, save_interval_steps=2)
    message = poisoned_after(config, 3)
    assert "step 4: loss nan" in message
    last = step_folder(Path(config.train.checkpoint_dir), 2)
    assert f"the last checkpoint is {last}" in message
    assert all(torch.isfinite(value).all() for value in read_tensors(last / "model.safetensors").tensors.values())


def test_nonfinite_validation_loss_never_becomes_best(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.training.validation.evaluate", lambda *a, **k: Evaluation(float("nan"), 10, 10))
    config = tiny_run(max_steps=4, eval_interval_steps=2)
    with pytest.raises(TrainingError, match="step 2: validation loss nan"):
        train(config)
    assert list_checkpoints(Path(config.train.checkpoint_dir)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_step_saves_and_restores_handlers(tiny_run: TinyRun, number: int) -> None:
    config = tiny_run(max_steps=50)
    former = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 3 of 50") as caught:
        train(config, callbacks=[After(3, lambda: signal.raise_signal(number))])
    assert caught.value.exit_code == EXIT_INTERRUPTED
    folder = Path(config.train.checkpoint_dir)
    assert str(folder) in str(caught.value)
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000003"]
    assert signal.getsignal(number) is former


def test_signal_in_last_step_keeps_run_finished(tiny_run: TinyRun) -> None:
    result = train(tiny_run(max_steps=3), callbacks=[After(3, lambda: signal.raise_signal(signal.SIGTERM))])
    assert result.steps == 3


@pytest.mark.slow
def test_time_budget_saves_and_same_call_resumes_exactly(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    """Bit for bit as if it had never ended: no validation, no sample that the whole run would not have."""
    clock = [0.0]

    class Wind(Callback):
        def on_step(self, event: StepEvent) -> None:
            clock[0] += 10.0

    monkeypatch.setattr("psannlm.training.run.TimeBudget", lambda seconds: TimeBudget(seconds, lambda: clock[0]))
    settings = {"max_steps": 8, "eval_interval_steps": 4, "model": {"dropout": 0.2}}
    config = tiny_run(**settings)
    first = train(config, callbacks=[Wind()], time_budget_s=25.0)
    assert (first.steps, first.total_steps) == (3, 8)
    assert first.checkpoint == step_folder(first.folder, 3)
    assert logged.messages[-1] == (
        f"the time budget is spent after step 3 of 8; saved in {first.folder}; run the same command to resume"
    )
    logged.clear()
    # Already spent by the time the corpus is read: one step all the same, or a run would never get anywhere.
    assert train(config, callbacks=[Wind()], time_budget_s=0.0).steps == 4
    result = train(config, callbacks=[Wind()], time_budget_s=1000.0)
    assert (result.steps, result.total_steps) == (8, 8)
    assert "time budget" not in logged.messages[-1]
    straight = train(tiny_run(**settings, checkpoint_dir=str(tmp_path / "straight")))
    assert_same_weights(step_folder(result.folder, 8), step_folder(straight.folder, 8))
    kinds = [[(row["kind"], row["step"]) for row in read_metrics(run.folder)] for run in (result, straight)]
    assert kinds[0] == kinds[1]


def test_second_ctrl_c_interrupts_but_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("psannlm.runtime.signals.time.monotonic", lambda: clock[0])
    stop = threading.Event()
    with stopping_on_signals(stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        for clock[0] in (100.0, 100.9):
            signal.raise_signal(signal.SIGINT)
        clock[0] = 101.1
        signal.raise_signal(signal.SIGTERM)  # a scheduler that asks again is not a person in a hurry
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_training_works_in_other_thread(tiny_run: TinyRun) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny_run(max_steps=2)).steps))
    thread.start()
    thread.join()
    assert results == [2]


def test_seed_step_depends_on_seed_step_rank_only() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    places = [(seed, step, rank) for seed in (0, 1337, 2**63 - 1) for step in (1, 2, 10**9) for rank in (0, 1)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_save_error_is_not_hidden_by_curve_error(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str) -> Callable[..., object]:
        def fail(*args: object) -> object:
            raise StorageError(message)

        return fail

    monkeypatch.setattr("psannlm.training.loop.save_checkpoint", refuse("no room for the checkpoint"))
    monkeypatch.setattr("psannlm.training.run.draw_curve", refuse("no room for the curve"))
    with pytest.raises(StorageError, match="no room for the checkpoint"):
        train(tiny_run(max_steps=2))
    poisoned_after(tiny_run(max_steps=4), 0)


def start(config: RunConfig, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def lines_until(process: subprocess.Popen[str], text: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()
        if line.strip() == text:
            return


def assert_same_weights(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = read_tensors(a / name).tensors, read_tensors(b / name).tensors
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def losses_of(folder: Path, steps: Sequence[int]) -> list[float]:
    rows = {row["step"]: row["loss"] for row in read_metrics(folder) if row["kind"] == "train"}
    return [rows[step] for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_process_resumes_exactly(tiny_run: TinyRun, tmp_path: Path, number: int) -> None:
    """Stopped in one process, continued in another: the numbers of a run that was left in peace."""
    config = tiny_run(model={"dropout": 0.2}, max_steps=8, checkpoint_dir=str(tmp_path / "stopped"))
    process = start(config, tmp_path, "slow")
    assert list(lines_until(process, "step 3"))[-1] == "step 3"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Interrupted: stopped after step" in rest
    stopped_at = read_state(list_checkpoints(tmp_path / "stopped")[-1]).step
    assert 3 <= stopped_at < 8
    train(load_config(tmp_path / "config.yaml"))
    straight = config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_dir": str(tmp_path / "straight")})}
    )
    train(straight)
    assert_same_weights(tmp_path / "stopped" / "step_00000008", tmp_path / "straight" / "step_00000008")
    steps = range(1, 9)
    assert losses_of(tmp_path / "stopped", steps) == losses_of(tmp_path / "straight", steps)


@pytest.mark.slow
def test_kill_during_save_leaves_older_checkpoint_to_resume(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    config = tiny_run(max_steps=6, save_interval_steps=2, checkpoint_dir=str(folder), keep_checkpoints=9)
    process = start(config, tmp_path, "hold-save", "4")
    assert list(lines_until(process, "saving"))[-1] == "saving"
    process.kill()
    process.communicate(timeout=60)
    (leftover,) = folder.glob(".psannlm-*.tmp/step_00000004")
    assert any(leftover.iterdir())
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002"]
    assert (folder / "latest").read_text(encoding="utf-8").strip() == "step_00000002"
    train(config)
    assert list(folder.glob(".*")) == []
    straight = config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_dir": str(tmp_path / "straight")})}
    )
    train(straight)
    assert_same_weights(folder / "step_00000006", tmp_path / "straight" / "step_00000006")
