"""TensorBoard files hold each step once, also after a resume; without the package they are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.config.run import RunConfig
from psannlm.errors import ConfigError
from psannlm.training import metrics
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.metrics import BOARD_FOLDER, read_metrics
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")


class Crash(Callback):
    def on_step(self, event: StepEvent) -> None:
        if event.step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_resume(tiny_run: TinyRun) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    handlers = list(logging.getLogger().handlers)
    config = tiny_run(
        tensorboard=True,
        max_steps=6,
        save_interval_steps=3,
        eval_interval_steps=2,
        sample_prompts=["Two\nlines"],
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Crash()], sampler=lambda *arguments: ["more"])
    folder = Path(config.train.checkpoint_dir)
    assert max(row["step"] for row in read_metrics(folder)) == 5  # 4 and 5 will be made again
    train(config, sampler=lambda *arguments: ["more"])
    assert logging.getLogger().handlers == handlers

    board = EventAccumulator(str(folder / BOARD_FOLDER))
    board.Reload()
    rows = read_metrics(folder)
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "bits_per_byte")):
        shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        kept = [(row["step"], row[name]) for row in rows if row["kind"] == kind]
        assert [step for step, _ in shown] == [step for step, _ in kept]
        assert [value for _, value in shown] == pytest.approx([value for _, value in kept])
    texts = board.Tensors("sample/Two\nlines/text_summary")
    assert [event.step for event in texts] == [2, 4, 6]
    assert texts[0].tensor_proto.string_val[0] == b"    Two\n    linesmore\n"


def test_tensorboard_is_off_by_default(tiny_run: TinyRun) -> None:
    assert not (train(tiny_run(max_steps=1)).folder / BOARD_FOLDER).exists()


def test_tensorboard_without_package_raises_before_writing(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    config = tiny_run(tensorboard=True)
    with pytest.raises(ConfigError, match=r"train\.tensorboard: needs the package tensorboard; run pip install"):
        train(config)
    assert not Path(config.train.checkpoint_dir).exists()
