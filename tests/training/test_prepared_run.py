"""A run on a prepared folder equals the run on the same documents in memory, and resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.commands.train import _result_rows
from psannlm.config.data import PathSource
from psannlm.config.files import WORK_FOLDER
from psannlm.config.run import RunConfig, config_from_mapping
from psannlm.data.corpus.documents import read_documents
from psannlm.data.manifest import read_manifest, write_manifest
from psannlm.data.prepare import split_documents
from psannlm.errors import ConfigError, StorageError
from psannlm.evaluation.loss import evaluate_sources
from psannlm.models.artifact import load_model
from psannlm.prep.job import PrepSettings
from psannlm.prep.plan import Plan, write_plan
from psannlm.runtime.device import Precision
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.roundtrip import LOSSY
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import list_checkpoints, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.plan import plan_training
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")


class Halt(Exception):
    """Ends a run as abruptly as a crash would."""


class Crash(Callback):
    def on_step(self, event: StepEvent) -> None:
        if event.step == 5:
            raise Halt


@pytest.fixture
def runs(tiny_run: TinyRun, prepare_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Return a builder of two equal runs, (from text, from a folder); keywords are ``data`` and ``train`` keys."""
    tokenizer = tmp_path / "made.json"
    CharTokenizer("éü").save(tokenizer)

    def build(**settings: Any) -> tuple[RunConfig, RunConfig]:
        data = {"tokenizer_model_path": str(tokenizer), "pack_sequences": settings.pop("pack", True)}
        text = tiny_run(data=data, checkpoint_dir=str(tmp_path / "text" / "run"), **settings)
        training, held_out = split_documents(
            list(read_documents(text.data.sources)), text.data.val_split, text.data.seed
        )
        folder = prepare_folder(
            tmp_path / "folder", CharTokenizer("éü"), [d.text for d in training], [d.text for d in held_out], 2
        )
        data |= {"sources": [str(folder)], "val_split": 0.0}
        return text, tiny_run(data=data, checkpoint_dir=str(tmp_path / "shards" / "run"), **settings)

    return build


def rows(folder: Path) -> list[dict[str, Any]]:
    of_the_machine = ("tokens_per_s", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in of_the_machine} for row in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
def test_prepared_run_matches_documents_in_memory(runs: Callable[..., Any], pack: bool) -> None:
    text, shards = runs(pack=pack, max_steps=8, eval_interval_steps=3)
    one, other = train(text), train(shards)
    assert rows(one.folder) == rows(other.folder)
    assert [row["step"] for row in rows(one.folder) if row["kind"] == "eval"] == [3, 6, 8]
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert plan_training(shards).n_windows == plan_training(text).n_windows


@pytest.mark.parametrize(("lost", "is_lossy"), [(0.25, True), (None, None)])
def test_prepared_run_marks_lossy_tokenizer(
    runs: Callable[..., Any], lost: float | None, is_lossy: bool | None
) -> None:
    _, shards = runs(max_steps=1)
    folder = Path(shards.data.sources[0].path)
    write_manifest(folder, replace(read_manifest(folder), lost_fraction=lost))
    result = train(shards)
    (evaluation,) = (row for row in rows(result.folder) if row["kind"] == "eval")
    assert evaluation["lossy_tokenizer"] is result.as_dict()["lossy_tokenizer"] is is_lossy
    assert (LOSSY in dict(_result_rows(result))["bits per byte"]) is bool(is_lossy)


@pytest.mark.slow
def test_prepared_run_resumes_only_with_same_tokens(
    runs: Callable[..., Any], prepare_folder: Callable[..., Path], tiny_texts: list[str]
) -> None:
    text, shards = runs(max_steps=8, save_interval_steps=2, keep_checkpoints=9)
    straight = train(text)
    with pytest.raises(Halt):
        train(shards, callbacks=[Crash()])
    resumed = train(shards)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    folder = Path(shards.data.sources[0].path)
    last = read_state(list_checkpoints(resumed.folder)[-1])
    assert last.corpus_sha256 in (folder / "manifest.json").read_text(encoding="utf-8")
    prepare_folder(folder, CharTokenizer("éü"), tiny_texts[1:], (), 50)
    with pytest.raises(ConfigError, match="other data: corpus"):
        train(shards)


def test_prepared_run_evaluates_its_validation_split(runs: Callable[..., Any]) -> None:
    _, shards = runs(max_steps=4)
    result = train(shards)
    loaded = load_model(step_folder(result.folder, 4))
    fp32 = Precision(torch.device("cpu"), torch.float32, "fp32 as asked")
    found, report = evaluate_sources(loaded, [PathSource(path=shards.data.sources[0].path)], precision=fp32)
    assert found.loss == pytest.approx(rows(result.folder)[-1]["loss"], abs=1e-5)
    assert report.bytes == found.n_bytes
    assert any("validation part" in line for line in report.lines())


def test_prepared_run_missing_part_is_named_at_start(runs: Callable[..., Any]) -> None:
    _, shards = runs()
    folder = Path(shards.data.sources[0].path)
    (folder / "train_00001.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    sections = shards.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"sources\[0\]\.path: .* lacks tokenizer.json, train_00001.safe"):
        config_from_mapping(sections)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds shards and no manifest\.json: .*run psannlm prep again"):
        config_from_mapping(sections)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_plan(folder / WORK_FOLDER, Plan((), PrepSettings(), "0" * 64, None, 1 << 20))
    with pytest.raises(ConfigError, match=r"holds the work of psannlm prep and no manifest\.json: .*prep again"):
        config_from_mapping(sections)


def test_prepared_run_without_validation_split_refuses_validation(
    runs: Callable[..., Any], prepare_folder: Callable[..., Path], tiny_texts: list[str]
) -> None:
    _, shards = runs(eval_interval_steps=2)
    prepare_folder(Path(shards.data.sources[0].path), CharTokenizer("éü"), tiny_texts)
    with pytest.raises(ConfigError, match=r"every 2 steps, but .*folder was prepared with nothing held out"):
        config_from_mapping(shards.model_dump(mode="json"))


def test_prepared_folder_is_refused_as_run_folder(runs: Callable[..., Any], tmp_path: Path) -> None:
    """The folder's own records would be replaced by those of the run; somebody else's manifest.json is no reason."""
    _, config = runs()
    prepared = tmp_path / "folder"
    before = {path: path.read_bytes() for path in prepared.iterdir()}
    into_it = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_dir": str(prepared)})})
    with pytest.raises(StorageError, match="the output of psannlm prep"):
        train(into_it)
    assert {path: path.read_bytes() for path in prepared.iterdir()} == before

    foreign = Path(config.train.checkpoint_dir)
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_text('{"name": "a web app"}', encoding="utf-8")
    (foreign / "train_00000.safetensors").write_bytes(b"mine")
    train(config)
    assert (foreign / "manifest.json").read_text(encoding="utf-8") == '{"name": "a web app"}'
