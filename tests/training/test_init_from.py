"""Runs that start from the weights of another model: what is taken over, what is fresh, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig, config_from_mapping
from psannlm.errors import ArtifactError, ConfigError
from psannlm.models.artifact import load_model, save_model
from psannlm.tokenizers.char import CharTokenizer
from psannlm.training.callbacks import TrainResult
from psannlm.training.checkpoint import read_state
from psannlm.training.metrics import read_metrics
from psannlm.training.plan import plan_training
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")


@pytest.fixture
def parent(tiny_run: TinyRun, tmp_path: Path) -> TrainResult:
    """A finished tiny run in ``tmp_path / "parent"``."""
    return train(tiny_run(checkpoint_dir=str(tmp_path / "parent"), eval_interval_steps=2))


@pytest.fixture
def child(tiny_run: TinyRun, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a builder of runs without a section ``model`` that start from ``tmp_path / "parent"``."""

    def build(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        sections = tiny_run().model_dump(mode="json")
        del sections["model"]
        sections["train"] |= {
            "checkpoint_dir": str(tmp_path / "child"),
            "init_from": str(tmp_path / "parent"),
            **settings,
        }
        sections["data"] |= data or {}
        return config_from_mapping(sections if model is None else {**sections, "model": model})

    return build


class _StopAfter:
    """Callback that ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.ending = step, threading.Event()

    def on_step(self, event: Any) -> None:
        if event.step == self.step:
            self.ending.set()

    def on_validation(self, event: Any) -> None: ...
    def on_save(self, event: Any) -> None: ...
    def on_end(self, result: Any) -> None: ...


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return dict(load_model(result.checkpoint).model.state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("parent")
def test_child_starts_at_the_loss_of_its_parent(child: Callable[..., RunConfig], parent: TrainResult) -> None:
    result = train(child())
    (row,) = [row for row in read_metrics(result.folder) if row["kind"] == "parent"]
    assert parent.best is not None
    assert (row["step"], row["loss"]) == (0, parent.best["loss"])
    assert (result.steps, result.model.config) == (4, parent.model.config)


@pytest.mark.usefixtures("parent")
def test_child_takes_weights_only(child: Callable[..., RunConfig], parent: TrainResult, tmp_path: Path) -> None:
    loaded = load_model(parent.checkpoint)
    save_model(tmp_path / "copy.safetensors", loaded.model, loaded.tokenizer, {})
    results = [
        train(child(init_from=str(source), checkpoint_dir=str(tmp_path / f"child{number}")))
        for number, source in enumerate((parent.folder, parent.checkpoint, tmp_path / "copy.safetensors"))
    ]
    assert all(equal(weights(results[0]), weights(result)) for result in results[1:])
    first = next(row for row in read_metrics(results[0].folder) if row["kind"] == "train")
    of_parent = next(row for row in read_metrics(parent.folder) if row["kind"] == "train")
    assert (first["step"], first["lr"], first["tokens"]) == (1, of_parent["lr"], of_parent["tokens"])


@pytest.mark.slow
@pytest.mark.usefixtures("parent")
def test_interrupted_child_continues_without_its_parent(child: Callable[..., RunConfig], tmp_path: Path) -> None:
    unbroken = train(child(checkpoint_dir=str(tmp_path / "unbroken")))
    stop = _StopAfter(2)
    broken = train(child(), callbacks=[stop], ending=stop.ending)
    assert broken.steps == 2
    shutil.rmtree(tmp_path / "parent")
    resumed = train(child())
    assert resumed.steps == 4
    assert equal(weights(resumed), weights(unbroken))
    assert [row["kind"] for row in read_metrics(resumed.folder)].count("parent") == 1


@pytest.mark.slow
def test_lineage_is_recorded_and_survives_a_resume(
    child: Callable[..., RunConfig], parent: TrainResult, tmp_path: Path
) -> None:
    from psannlm.reports.pages import origins_table
    from psannlm.reports.runs import read_run

    stop = _StopAfter(2)
    train(child(), callbacks=[stop], ending=stop.ending)
    shutil.rmtree(tmp_path / "parent")
    result = train(child())
    lineage = json.loads((result.folder / "system.json").read_text())["init_from"]
    assert lineage == read_state(result.checkpoint).lineage
    assert parent.best is not None
    assert (Path(lineage["path"]).parent, lineage["step"]) == (parent.checkpoint, parent.best["step"])
    assert len(lineage["sha256"]) == 64
    table = origins_table([read_run(result.folder)])
    assert table.headings[-1] == "weights from"
    assert lineage["sha256"][:12] in str(table.rows[0][-1])


@pytest.mark.usefixtures("parent")
def test_given_keys_of_the_model_must_agree(child: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        train(child(model={"d_model": 24, "n_heads": 2, "short_conv": {"kernel_size": 3}}))
    assert [problem.path for problem in caught.value.problems] == ["model.d_model", "model.short_conv.kernel_size"]
    assert "24, and " in caught.value.problems[0].message
    train(child(model={"d_model": 16, "dropout": 0.1, "n_kv_heads": None}, max_steps=1))


@pytest.mark.usefixtures("parent")
def test_window_longer_than_the_context_is_refused(child: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length: 32 is longer than the context .*16 tokens"):
        train(child(data={"max_length": 32}))
    result = train(child(data={"max_length": 32}, model={"max_seq_len": 32}, max_steps=1))
    assert result.model.config.max_seq_len == 32


@pytest.mark.usefixtures("parent")
def test_other_tokenizer_file_is_refused_with_both_fingerprints(
    child: Callable[..., RunConfig], parent: TrainResult, tmp_path: Path
) -> None:
    other = CharTokenizer("éü")
    other.save(tmp_path / "other.json")
    own = load_model(parent.checkpoint).tokenizer
    assert own is not None
    with pytest.raises(ConfigError, match=f"tokenizer_model_path.*{other.fingerprint[:12]}.*{own.fingerprint[:12]}"):
        train(child(data={"tokenizer_model_path": str(tmp_path / "other.json")}))
    own.save(tmp_path / "own.json")
    train(child(data={"tokenizer_model_path": str(tmp_path / "own.json")}, max_steps=1))


@pytest.mark.usefixtures("parent")
def test_folder_prepared_with_other_tokenizer_is_refused(
    child: Callable[..., RunConfig], prepare_folder: Callable[..., Path], tmp_path: Path, tiny_texts: list[str]
) -> None:
    folder = prepare_folder(tmp_path / "prepared", CharTokenizer("éü"), tiny_texts, tiny_texts[:2], 100)
    with pytest.raises(ConfigError, match=r"data\.sources: the tokenizer has the fingerprint"):
        train(child(data={"sources": [{"path": str(folder)}], "tokenizer": "auto", "val_split": 0}))


def test_missing_parent_is_named(child: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.init_from: no model file.*parent"):
        train(child())
    (tmp_path / "parent").write_text("text")
    with pytest.raises(ArtifactError, match="not a model file"):
        train(child())
    assert not (tmp_path / "child").exists()


@pytest.mark.slow
def test_parent_without_tokenizer_needs_one_by_name(
    child: Callable[..., RunConfig], parent: TrainResult, tmp_path: Path
) -> None:
    loaded = load_model(parent.checkpoint)
    assert loaded.tokenizer is not None
    save_model(tmp_path / "bare.safetensors", loaded.model, None, {})
    with pytest.raises(ConfigError, match=r"data\.tokenizer_model_path.*has no tokenizer"):
        train(child(init_from=str(tmp_path / "bare.safetensors")))
    loaded.tokenizer.save(tmp_path / "own.json")
    named = {"tokenizer_model_path": str(tmp_path / "own.json")}
    result = train(child(init_from=str(tmp_path / "bare.safetensors"), data=named))
    assert equal(weights(result), weights(train(child(checkpoint_dir=str(tmp_path / "other")))))


@pytest.mark.usefixtures("parent")
def test_dry_run_plans_the_model_of_the_parent(child: Callable[..., RunConfig], parent: TrainResult) -> None:
    plan = plan_training(child())
    assert plan.config.model == parent.model.config
    assert plan.n_parameters == parent.parameters


def test_config_with_all_keys_of_the_parent_is_accepted(child: Callable[..., RunConfig], parent: TrainResult) -> None:
    result = train(child(model=parent.model.config.model_dump(mode="json"), max_steps=1))
    assert result.model.config == parent.model.config
