"""Task packs at each validation: logged, drawn, equal to a later evaluation, and without effect on training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from psannlm.config.constants import TaskPack
from psannlm.config.run import RunConfig
from psannlm.errors import ConfigError
from psannlm.evaluation.tasks.packs import PACK_GROUPS, PACKS, run_pack
from psannlm.generation.engine import Engine
from psannlm.generation.scoring import Scorer
from psannlm.models.artifact import load_model
from psannlm.reports.runs import read_run
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]


def test_eval_tasks_names_are_the_packs() -> None:
    assert {*get_args(TaskPack)} == {*PACKS, *PACK_GROUPS}


@pytest.mark.slow
@pytest.mark.usefixtures("_no_curve")
def test_eval_tasks_are_logged_at_each_validation_without_effect(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"dropout": 0.3},
        "eval_interval_steps": 2,
        "save_interval_steps": 2,
        "keep_checkpoints": 9,
        "max_steps": 5,
    }
    scored = train(tiny_run(**settings, eval_tasks=["psannlm_number"], checkpoint_dir=str(tmp_path / "scored")))
    plain = train(tiny_run(**settings, checkpoint_dir=str(tmp_path / "plain")))
    for a, b in zip(scored.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [row for row in read_metrics(scored.folder) if row["kind"] == "tasks"]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert not [row for row in read_metrics(plain.folder) if row["kind"] == "tasks"]
    for row in rows:
        loaded = load_model(scored.folder / f"step_{row['step']:08d}")
        assert loaded.tokenizer is not None
        again = run_pack("psannlm_number", Scorer(Engine(loaded.model), 5), loaded.tokenizer)
        assert (row["psannlm_number"], row["psannlm_number/stderr"]) == (again.value, again.stderr)
        assert row["psannlm_number/chance"] == 0.5
    record = read_run(scored.folder)
    assert not record.problems
    assert record.task_scores(4) == {
        "psannlm_number": (rows[1]["psannlm_number"], rows[1]["psannlm_number/stderr"], 0.5)
    }
    assert record.task_scores()["psannlm_number"][0] == rows[2]["psannlm_number"]
    assert len(record.eval_rows) == 3


def test_eval_tasks_add_a_panel_to_the_curve(tmp_path: Path) -> None:
    from psannlm.training.metrics import _curve

    rows: list[dict[str, Any]] = [
        {"kind": "eval", "step": step, "loss": 3.0 - step / 10, "bits_per_byte": 2.0} for step in (2, 4)
    ]
    assert len(_curve("a", rows).axes) == 1
    rows += [
        {"kind": "tasks", "step": step, "psannlm_number": 0.5 + step / 10, "psannlm_number/stderr": error, "x": 0.1}
        for step, error in ((2, 0.1), (4, None))
    ]
    rows[-1]["psannlm_number/chance"] = 0.5
    loss, scores = _curve("a", rows).axes
    assert loss.get_shared_x_axes().joined(loss, scores)
    assert [text.get_text() for text in scores.get_legend().get_texts()] == ["psannlm_number", "x"]
    assert [line.get_ydata()[0] for line in scores.lines if line.get_linestyle() == "--"] == [0.5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": {"max_length": 8}}, "psannlm_negation has answers of .* tokens, and the model's context is 8"),
        ({"tasks": "psannlm_last_word"}, "psannlm_last_word: the text has .* sentences"),
    ],
)
def test_eval_tasks_beyond_context_are_refused_before_training(
    settings: dict[str, Any], said: str, tiny_run: TinyRun
) -> None:
    task = settings.pop("tasks", "psannlm_negation")
    config = tiny_run(max_steps=1, eval_tasks=[task], **settings)
    with pytest.raises(ConfigError, match=said):
        train(config)
    assert not (Path(config.train.checkpoint_dir) / "metrics.jsonl").exists()


def test_eval_tasks_without_validation_are_reported(tiny_run: TinyRun, logged: pytest.LogCaptureFixture) -> None:
    train(tiny_run(max_steps=1, eval_tasks=["psannlm_number"], data={"val_split": 0.0}))
    assert "no task scores without validations; set data.val_split" in "".join(logged.messages)


def test_eval_tasks_unknown_name_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="psannlm_nummber"):
        tiny_run(eval_tasks=["psannlm_nummber"])
