"""Deferred read-back: a step is read after the next is enqueued, without changing any output of the run."""

from __future__ import annotations

import io
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.config.run import RunConfig
from psannlm.errors import Interrupted, TrainingError
from psannlm.kernels.onednn import prefers_onednn
from psannlm.kernels.recompute import recompute_disabled
from psannlm.models.tensorfile import read_tensors
from psannlm.runtime.device import AsyncReadback, Precision
from psannlm.training import loop, validation
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import list_checkpoints, step_folder
from psannlm.training.failures import find_non_finite
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")
# What a tensor is asked with, and the operations whose result depends on the numbers in one: a GPU would be waited for.
ASKING = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount")


class Waits(TorchDispatchMode):
    """Notes whatever, on this thread and in this context, would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_allowed = False

    def note(self, what: str) -> None:
        if not self.is_allowed:
            self.found.append(what)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in WAITING or (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])):
            self.note(name)
        return operation(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits, here = Waits(), threading.get_ident()

    def asked(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def ask(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
            if threading.get_ident() == here:
                waits.note(name)
            return original(tensor, *arguments, **settings)

        return ask

    with monkeypatch.context() as patch, waits:
        for name in ASKING:
            patch.setattr(torch.Tensor, name, asked(name))
        yield waits


@pytest.fixture
def _deferred_readback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a GPU is treated."""
    monkeypatch.setattr(loop.Run, "defer_readback", True)


def events_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Train, and return in order which step was made and which was read; what else waits is ``(what, step)``."""
    events: list[tuple[str, int]] = []
    steps: dict[int, int] = {}
    kept: list[Any] = []
    original, read, evaluate, save = loop.train_step, AsyncReadback.read, validation.evaluate, loop._save

    def quiet(work: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **settings: Any) -> Any:
            waits.is_allowed = True
            try:
                return work(*arguments, **settings)
            finally:
                waits.is_allowed = False

        return do

    def noted(*arguments: Any, **settings: Any) -> Any:
        step = len(steps) + 1
        events.extend((what, step - 1) for what in waits.found)
        waits.found.clear()
        result = original(*arguments, **settings)
        events.extend((what, step) for what in waits.found)
        waits.found.clear()
        steps[id(result._metrics)] = step
        kept.append(result)
        events.append(("made", step))
        return result

    def reading(unread: AsyncReadback) -> list[float]:
        if unread._numbers.numel() == 3:  # a step's, not a vote
            events.append(("read", steps.get(id(unread), len(steps) + 1)))
        found: list[float] = quiet(read)(unread)
        return found

    with watched(monkeypatch) as waits, monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", noted)
        patch.setattr(AsyncReadback, "read", reading)
        # Validation and saving are allowed to wait.
        patch.setattr(validation, "evaluate", quiet(evaluate))
        patch.setattr(loop, "_save", quiet(save))
        train(config, console=Console(file=io.StringIO(), force_terminal=True, force_interactive=True))
    return events


SETTINGS = {"max_steps": 13, "log_interval_steps": 5, "eval_interval_steps": 7, "save_interval_steps": 11}
DUE = (1, 5, 7, 10, 11, 13)


@pytest.mark.slow
@pytest.mark.usefixtures("_deferred_readback")
@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
@pytest.mark.parametrize(
    ("optimizer", "amp", "grad_checkpoint"),
    [("adamw", "fp32", False), ("muon", "bf16", False), ("adamw", "bf16", True)],
)
def test_deferred_step_waits_only_for_log_validation_or_save(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, base: str, optimizer: str, amp: str, grad_checkpoint: bool
) -> None:
    """Every read of a step between those comes after the next one was given to the device."""
    model = {"base": base, "dropout": 0.1}
    monkeypatch.setattr("psannlm.runtime.device.computes_in_bf16", lambda device: True)
    config = tiny_run(model=model, optimizer=optimizer, amp=amp, grad_checkpoint=grad_checkpoint, **SETTINGS)
    expected: list[tuple[str, int]] = []
    for step in range(1, 14):
        expected.append(("made", step))
        if step > 1 and step - 1 not in DUE:
            expected.append(("read", step - 1))
        if step in DUE:
            expected.append(("read", step))
    prefers_onednn()  # asks a product of a CPU once in a process
    with recompute_disabled():  # as on a GPU, which has no use for the passes made for CPUs
        assert events_of(config, monkeypatch) == expected


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}, {"amp": "fp16"}])
def test_undeferred_step_is_read_before_the_next(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    events = [e for e in events_of(tiny_run(**SETTINGS, **settings), monkeypatch) if e[0] in ("read", "made")]
    assert events == [(what, step) for step in range(1, 14) for what in ("read", "made")]


def test_sync_detector_sees_synchronising_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself: each of these asks a tensor for its numbers."""
    tensor = torch.ones(2)
    asks: list[Callable[[], object]] = [
        lambda: float(tensor[0]),
        lambda: bool(tensor[0]),
        lambda: tensor.tolist(),
        lambda: tensor[tensor > 0],
        lambda: torch.nonzero(tensor),
        lambda: torch.equal(tensor, tensor),
        lambda: math.isfinite(tensor[0]),
    ]
    for ask in asks:
        with watched(monkeypatch) as waits:
            ask()
        assert waits.found
    with watched(monkeypatch) as waits:
        torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(tensor)], 1.0)
        tensor.mul_(2.0).sum()
    assert waits.found == []


def test_defer_readback_only_on_gpu_without_decisions(tiny_run: TinyRun) -> None:
    def defer_readback(device: str, is_scaled: bool, on_nonfinite: str, callbacks: tuple[object, ...] = ()) -> bool:
        run = SimpleNamespace(
            config=tiny_run(on_nonfinite=on_nonfinite),
            scaler=torch.amp.GradScaler("cpu", enabled=is_scaled),
            precision=Precision(torch.device(device), torch.float32, "test"),
            callbacks=callbacks,
            display=object(),
        )
        found: bool = loop.Run.defer_readback.fget(run)  # type: ignore[attr-defined]
        return found

    cases = [
        (device, scaled, how) for device in ("cpu", "cuda") for scaled in (False, True) for how in ("stop", "skip")
    ]
    assert [case for case in cases if defer_readback(*case)] == [("cuda", False, "stop")]
    # A callback is to see the weights of its step; the display is not waited for.
    assert not defer_readback("cuda", False, "stop", (object(),))


def content_of(folder: Path) -> dict[str, Any]:
    """All that a run left, but for what the clock has to say."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("tokens_per_s", None)
        row.pop("peak_memory_bytes", None)
    found: dict[str, Any] = {"rows": rows}
    for checkpoint in list_checkpoints(folder):
        for name in ("model.safetensors", "optimizer.safetensors"):
            found[f"{checkpoint.name}/{name}"] = (checkpoint / name).read_bytes()
        state = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["state"]
        state["config"]["train"].pop("checkpoint_dir")
        found[checkpoint.name] = state
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_deferred_readback_changes_no_bit_of_output(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Stopped between two logged steps and gone on with, too."""
    settings = {**SETTINGS, "optimizer": optimizer, "keep_checkpoints": 9, "model": {"dropout": 0.2}}
    straight = train(tiny_run(**settings, checkpoint_dir=str(tmp_path / "straight")))
    monkeypatch.setattr(loop.Run, "defer_readback", True)
    back = tiny_run(**settings, checkpoint_dir=str(tmp_path / "back"))
    train(back)
    assert content_of(tmp_path / "back") == content_of(straight.folder)

    class Stop(Callback):
        def on_step(self, event: StepEvent) -> None:
            if event.step == 3:
                signal.raise_signal(signal.SIGTERM)

    # Told of step 3 when step 4 is on its way: that one is finished and saved.
    stopped = tiny_run(**settings, checkpoint_dir=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted, match="stopped after step 4 of 13"):
        train(stopped, callbacks=[Stop()])
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step_00000004"]
    train(stopped)
    expected, found = content_of(straight.folder), content_of(tmp_path / "stopped")
    assert {key: found[key] for key in expected} == expected


@pytest.mark.usefixtures("_deferred_readback")
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
def test_deferred_nonfinite_step_is_named_and_never_saved(
    tiny_run: TinyRun, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, step: int, where: str
) -> None:
    """At a step that is logged (1), saved (4), the last one (7), and between."""
    original, seen = loop.train_step, []

    def corrupted(module: Any, micro_batches: Any, *rest: Any, **settings: Any) -> Any:
        seen.append([int(window) for batch in micro_batches for window in batch.window_ids])
        if len(seen) != step:
            return original(module, micro_batches, *rest, **settings)
        value = float("inf") if where == "loss" else 1.0
        weight = module.final_norm.weight
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
        with torch.no_grad():
            weight.mul_(value)
        result = original(module, micro_batches, *rest, **settings)
        hook.remove()
        return result

    monkeypatch.setattr(loop, "train_step", corrupted)
    config = tiny_run(
        max_steps=7, log_interval_steps=50, save_interval_steps=2, keep_checkpoints=9, data={"val_split": 0.0}
    )
    with pytest.raises(TrainingError, match=f"^step {step}: loss") as caught:
        train(config)
    message, folder = str(caught.value), Path(config.train.checkpoint_dir)
    assert str(seen[step - 1][:8])[:-1] in message
    assert f"{tiny_corpus}:" in message
    saved = [2 * i for i in range(1, 4) if 2 * i < step]
    last = f"the last checkpoint is {step_folder(folder, saved[-1])}" if saved else "no checkpoint was written yet"
    assert last in message
    assert [path.name for path in list_checkpoints(folder)] == [f"step_{n:08d}" for n in saved]
    for checkpoint in list_checkpoints(folder):
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert find_non_finite(read_tensors(checkpoint / name).tensors.items()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_step_never_synchronises_gpu(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """torch's own watch, which sees what is asked of a device below Python too."""
    original = loop.train_step

    def strict(*arguments: Any, **settings: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*arguments, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", strict)
    config = tiny_run(optimizer=optimizer, device="cuda", amp="auto", **SETTINGS)
    assert train(config).steps == 13
