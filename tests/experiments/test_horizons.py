"""Horizons of a study: runs that branch off one trunk are, bit for bit, the runs of their length from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import load_config
from psannlm.errors import ConfigError
from psannlm.experiments.local_launcher import Process, branch_off
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.plan import load_plan
from psannlm.experiments.results import plan_tables, study_figures
from psannlm.experiments.run_state import read_status
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study, write_configs
from psannlm.models.artifact import load_model
from psannlm.reports.tables.study import study_tables
from psannlm.training.checkpoint import list_checkpoints, read_optimizer, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

from .conftest import Ended, spare_disk

BASE = """\
model: {{base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu, dropout: 0.1}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  vocab_size: 512
  max_length: 16
  val_split: 0.2
train: {{batch_tokens: 128, amp: fp32, device: cpu, compile: false, schedule: wsd, cooldown_share: 0.4, warmup_steps: 3,
  min_lr: 1.1e-4, ema: 0.9, optimizer: adamw, log_interval_steps: 1,
  eval_interval_steps: 4}}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 2400}
horizons: [1250, 700]
seeds: [1]
learning_rates: [1e-2]
baseline: swiglu
variants: {swiglu: null}
"""


def train_here(run: StudyRun, environment: Mapping[str, str]) -> Process:
    train(load_config(run.config_path), resume=str(branch_off(run) or "auto"))
    return Ended()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    spare_disk(monkeypatch)


def build(root: Path, corpus: Path, old: str = "", new: str = "") -> Study:
    """Return the study of the plan, with ``old`` replaced by ``new`` in its files."""
    text, plan = BASE.format(corpus=json.dumps(str(corpus))), PLAN
    assert not old or old in text + plan
    root.mkdir(exist_ok=True)
    (root / "base.yaml").write_text(text.replace(old, new) if old else text)
    (root / "plan.yaml").write_text(plan.replace(old, new) if old else plan)
    return size_study(load_plan(root / "plan.yaml"), root / "study")


def train_all(study: Study) -> None:
    """Train the trunks, then the branches."""
    for is_branch in (False, True):
        names = [run.name for run in study.runs if (run.trunk is not None) == is_branch]
        run_all(study, only=names, launcher=train_here)


def end_of(folder: Path) -> dict[str, Any]:
    """Return weights, optimizer, average and losses at the end of a run, without times and names of files."""
    checkpoint = list_checkpoints(folder)[-1]
    state = read_state(checkpoint)
    moving = {"tokens_per_s", "peak_memory_bytes", "step_s"}
    rows = [{key: value for key, value in row.items() if key not in moving} for row in read_metrics(folder)]
    tensors = {
        **load_model(checkpoint).model.state_dict(),
        **{f"ema.{name}": each for name, each in load_model(checkpoint / "ema.safetensors").model.state_dict().items()},
        **{f"optimizer.{name}": each for name, each in read_optimizer(checkpoint).items()},
    }
    kept = {"step": state.step, "position": state.position, "tokens": state.tokens, "total_steps": state.total_steps}
    return {"rows": rows, "tensors": tensors, **kept}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for name, tensor in wanted["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    assert {**found, "tensors": 0} == {**wanted, "tensors": 0}


def from_scratch(run: StudyRun, folder: Path) -> dict[str, Any]:
    train(run.config.model_copy(update={"train": run.config.train.model_copy(update={"checkpoint_dir": str(folder)})}))
    return end_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_branch_equals_run_from_scratch_bit_for_bit(
    tmp_path: Path, tiny_corpus: Path, optimizer: str, logged: pytest.LogCaptureFixture
) -> None:
    study = build(tmp_path / "plan", tiny_corpus, "optimizer: adamw", f"optimizer: {optimizer}")
    train_all(study)
    trunk, *branches = study.runs
    assert [run.variant.n_steps for run in (trunk, *branches)] == [20, 6, 10]
    for run in branches:
        started = step_folder(trunk.folder, run.branch_step)
        assert f"resuming from {started}: step {run.branch_step} of {run.variant.n_steps}" in logged.text
        assert run.branch_step == run.variant.n_steps - round(0.4 * run.variant.n_steps)
        assert_same(end_of(run.folder), from_scratch(run, tmp_path / run.name))
    # The trunk is what it would be without branches.
    alone = trunk.config.train.model_copy(update={"keep_steps": ()})
    config = trunk.config.model_copy(update={"train": alone})
    assert_same(end_of(trunk.folder), from_scratch(replace(trunk, config=config), tmp_path / "trunk"))


@pytest.mark.slow
def test_stopped_branch_resumes_and_missing_trunk_is_replaced(
    tmp_path: Path, tiny_corpus: Path, logged: pytest.LogCaptureFixture
) -> None:
    study = build(tmp_path / "plan", tiny_corpus)
    write_configs(study)
    trunk, short, long = study.runs
    # No trunk yet: the same run from scratch.
    train_here(short, {})
    assert (
        f"{short.name} is trained from scratch: there is no {step_folder(trunk.folder, short.branch_step)}"
        in logged.text
    )
    train_here(trunk, {})
    checkpoint = branch_off(long)
    assert checkpoint == step_folder(trunk.folder, long.branch_step)
    assert read_status(long).step == long.branch_step
    train(load_config(long.config_path), resume=str(checkpoint), time_budget_s=0.0)
    assert read_status(long).state == "stopped"
    assert branch_off(long) is None, "it has a checkpoint of its own"
    train_here(long, {})
    for run in (short, long):
        assert_same(end_of(run.folder), from_scratch(run, tmp_path / run.name))


@pytest.mark.slow
def test_horizon_figures_select_rate_of_their_own(tmp_path: Path, tiny_corpus: Path) -> None:
    study = build(tmp_path, tiny_corpus, "learning_rates: [1e-2]", "learning_rates: [1e-2, 1e-3]")
    assert [run.name for run in study.runs if run.trunk is None] == ["swiglu_lr0.01_seed1", "swiglu_lr0.001_seed1"]
    train_all(study)
    figures = study_figures(study)
    logged = {run.name: read_status(run) for run in study.runs}
    for found, tokens in zip(figures.horizons, ("700", "1250"), strict=True):
        losses = {
            lr: state.record.eval_rows[-1]["loss"]
            for lr in (1e-2, 1e-3)
            if (state := logged[f"swiglu_lr{lr:g}_seed1_tokens{tokens}"]).record is not None
        }
        assert found.val_loss is not None
        assert (found.val_loss.mean, found.learning_rate) == min((loss, lr) for lr, loss in losses.items())
    assert {run.horizon for run in figures.runs} == {None, 700.0, 1250.0}
    [table] = [table for table in study_tables(figures) if table.title == "Validation loss by tokens of training"]
    assert [row[1] for row in table.rows] == [f"{each.tokens:,}" for each in (*figures.horizons, *figures.variants)]
    whole = figures.variants[0].val_loss
    assert whole is not None
    assert table.rows[-1][2] == f"{whole.mean:.4f}"


def test_branches_cost_their_cooldown_only(tmp_path: Path, tiny_corpus: Path) -> None:
    study = build(tmp_path, tiny_corpus)
    trunk, _, long = study.runs
    assert trunk.config.train.keep_steps == (4, 6)
    assert [run.steps_left(0) for run in study.runs] == [20, 2, 4]
    assert long.flops_left(0) == pytest.approx(trunk.flops_left(0) * 4 / 20, rel=1e-2)
    note = plan_tables(study, {"swiglu": 60.0})[1].note
    assert note.startswith("3 of 3 runs to train: about 26.0 minutes")
    assert long.steps_left(8) == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schedule: wsd, cooldown_share: 0.4", "schedule: cosine", "need train.schedule: wsd, and it is cosine"),
        ("compile: false, ", "", "need train.compile: true or false"),
        ("[1250, 700]", "[2400]", "2400 tokens are not below the budget, which is 2400 tokens"),
        ("{tokens: 2400}", "{flops: 1e9}", "which is in operations"),
        ("[1250, 700]", "[700, 710]", "as many as another budget"),
        ("[1250, 700]", "[1250, 300]", "warm-up steps exceed max_steps 2"),
    ],
)
def test_horizons_that_cannot_branch_are_refused(
    tmp_path: Path, tiny_corpus: Path, old: str, new: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, tiny_corpus, old, new)


def test_run_without_trunk_never_branches(tmp_path: Path, tiny_corpus: Path) -> None:
    run = build(tmp_path, tiny_corpus).runs[0]
    assert branch_off(run) is None
    assert branch_off(replace(run, trunk=tmp_path, branch_step=0)) is None
