"""One training at a time in a run folder, from reading the corpus to the last step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.config.run import RunConfig
from psannlm.errors import PsannlmError, StorageError
from psannlm.io.lock import LOCK_FILE
from psannlm.runtime.log import receiving_messages
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_run_lock_is_held_from_reading_to_last_step(tiny_run: TinyRun, resume: str) -> None:
    refused: list[str] = []

    class Second(Callback):
        def on_step(self, event: StepEvent) -> None:
            again()

    def again(message: str = "") -> None:
        with pytest.raises(StorageError, match="is using"):
            train(config, resume=resume)
        refused.append(message)

    config = tiny_run(max_steps=2)
    train(config)
    with receiving_messages(again):
        train(config, resume="never", callbacks=[Second()])
    assert len(refused) > 4
    folder = Path(config.train.checkpoint_dir)
    (aside,) = folder.parent.glob("run_until_*")
    assert not [path for path in (*folder.iterdir(), *aside.iterdir()) if path.name == LOCK_FILE]


def test_run_unwritable_folder_raises_before_reading_corpus(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.training.run.load_corpus", lambda *a: pytest.fail("read the corpus"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="a file is in the place of a folder"):
            train(tiny_run(checkpoint_dir=str(folder)))


def test_run_failing_before_writing_leaves_no_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    lost = {"tokenizer_model_path": str(tmp_path / "absent.json")}
    with pytest.raises(PsannlmError, match=r"absent\.json"):
        train(tiny_run(data=lost, checkpoint_dir=str(tmp_path / "runs" / "a")))
    assert not (tmp_path / "runs").exists()
