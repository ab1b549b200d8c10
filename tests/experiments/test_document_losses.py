"""Losses by document of a study's runs: paired intervals, kept with the record of a run, and reasons for a dash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psannlm.data.corpus.documents import Document
from psannlm.data.memory_store import encode_documents as encode_texts
from psannlm.errors import ConfigError
from psannlm.evaluation.documents import DocumentLosses, bootstrap_difference
from psannlm.evaluation.loss import decode_documents as decode_texts
from psannlm.experiments.finished_runs import (
    RUNS_FILE,
    Measured,
    Origin,
    kept_runs,
    read_finished_runs,
    write_finished_runs,
)
from psannlm.experiments.lr_selection import with_selected_lrs
from psannlm.experiments.measures.document_losses import (
    SEED,
    RunDocuments,
    decode_documents,
    encode_documents,
    half_losses,
    measure_documents,
    reported_documents,
    tuning_documents,
)
from psannlm.experiments.model import Study
from psannlm.experiments.plan import load_plan
from psannlm.experiments.results import study_figures
from psannlm.experiments.reuse import read_kept_runs, reuse_runs
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study
from psannlm.reports.schemas.study import Comparison
from psannlm.reports.tables.study import COMPARED, study_tables

from .conftest import spare_disk, train_here

BASE = """\
model: {{base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  vocab_size: 512
  max_length: 16
  val_split: 0.5
train: {{batch_tokens: 128, amp: fp32, device: cpu, eval_interval_steps: 2}}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 500}
seeds: [1, 2]
baseline: swiglu
variants:
  swiglu: {learning_rates: [1e-2]}
  sine: {model: {mlp: sine}, learning_rates: [1e-2, 1e-5]}
"""


def build(root: Path, corpus: Path, more: str = "") -> Study:
    """Return the study of the plan, with ``more`` keys, in a new machine's folder."""
    root.mkdir(exist_ok=True)
    (root / "base.yaml").write_text(BASE.format(corpus=json.dumps(str(corpus))))
    (root / "plan.yaml").write_text(PLAN + more)
    return size_study(load_plan(root / "plan.yaml"), root / "study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Study:
    """Return a study whose six runs were trained."""
    with pytest.MonkeyPatch.context() as patch:
        spare_disk(patch)
        study = build(tmp_path_factory.mktemp("finished"), tiny_corpus)
        run_all(study, launcher=train_here)
    return study


@pytest.fixture(scope="module")
def documents(finished: Study) -> dict[str, RunDocuments]:
    return measure_documents(finished)


def compared(study: Study, documents: Mapping[str, RunDocuments]) -> Comparison:
    [comparison] = study_figures(study, {}, documents).comparisons
    return comparison


def test_study_document_losses_sum_to_logged_loss(finished: Study, documents: dict[str, RunDocuments]) -> None:
    figures = study_figures(finished)
    chosen = {run.run: run.val_loss for run in figures.runs if run.run in documents}
    assert len(chosen) == 4, "two seeds of two variants, and no run at another learning rate"
    for name, loss in chosen.items():
        losses = documents[name].losses
        assert losses is not None
        assert losses.loss() == pytest.approx(loss, rel=1e-5)


def test_study_document_interval_is_paired_over_seeds(finished: Study, documents: dict[str, RunDocuments]) -> None:
    found = compared(finished, documents).documents
    assert found is not None

    def losses(variant: str, lr: float) -> list[DocumentLosses]:
        each = [documents[f"{variant}_lr{lr:g}_seed{seed}"].losses for seed in (1, 2)]
        return [one for one in each if one is not None]

    [sine] = [v for v in study_figures(finished).variants if v.name == "sine"]
    assert sine.learning_rate is not None
    wanted = bootstrap_difference(losses("sine", sine.learning_rate), losses("swiglu", 1e-2), seed=SEED)
    assert (found.mean, found.low, found.high) == (wanted.mean, wanted.low, wanted.high)
    assert sine.difference is not None
    assert found.mean == pytest.approx(sine.difference.mean, rel=1e-4)
    # A common offset of a document cancels: the documents of both variants are the same ones.
    shifted = {
        name: replace(
            each, losses=DocumentLosses(each.losses.nats + np.arange(len(each.losses.nats)), each.losses.tokens)
        )
        for name, each in documents.items()
        if each.losses is not None
    }
    again = compared(finished, shifted).documents
    assert again is not None
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-9)


def test_reused_runs_keep_losses_by_document(
    finished: Study, documents: dict[str, RunDocuments], tmp_path: Path, tiny_corpus: Path
) -> None:
    report = tmp_path / "report"
    report.mkdir()
    records = {name: Measured(documents=each.record) for name, each in documents.items()}
    write_finished_runs(report / RUNS_FILE, finished, records)
    study = build(tmp_path / "machine", tiny_corpus)
    reuse_runs(study, [run.name for run in study.runs], read_kept_runs([report]))
    assert compared(study, measure_documents(study)) == compared(finished, documents)
    # The record grows in the study's folder too, for a report that is written without the checkpoints.
    kept = {run.run: run.documents for run in read_finished_runs(study.folder)}
    assert {name for name, record in kept.items() if record is not None} == set(documents)


def test_records_without_documents_show_dash_and_reason(finished: Study, tmp_path: Path, tiny_corpus: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    write_finished_runs(report / RUNS_FILE, finished)
    lines = [json.loads(line) for line in (report / RUNS_FILE).read_text().splitlines()]
    for line in lines:
        del line["documents"]  # as earlier versions wrote it
    (report / RUNS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = build(tmp_path / "machine", tiny_corpus)
    assert reuse_runs(study, [run.name for run in study.runs], read_kept_runs([report]))
    [table] = [
        table
        for table in study_tables(study_figures(study, {}, measure_documents(study)))
        if table.title.startswith(COMPARED)
    ]
    assert table.rows[0][list(table.headings).index("95 % interval, documents")] == "–"
    assert (
        "No interval over documents for sine: sine_lr0.01_seed1: the report it was reused from has none." in table.note
    )


@pytest.mark.parametrize("fault", ["step", "log", "code", "origin", "loss", "damaged"])
def test_kept_losses_of_another_model_are_measured_again(
    finished: Study, documents: dict[str, RunDocuments], tmp_path: Path, tiny_corpus: Path, fault: str
) -> None:
    shutil.copytree(finished.folder.parent, tmp_path / "copy")
    study = build(tmp_path / "copy", tiny_corpus)
    records = {}
    for name, each in documents.items():
        assert each.losses is not None
        assert each.record is not None
        assert each.record.origin is not None
        others = DocumentLosses(each.losses.nats * 1.1, each.losses.tokens)
        record = {
            "step": replace(each.record, origin=replace(each.record.origin, step=each.record.origin.step - 1)),
            "log": replace(each.record, origin=replace(each.record.origin, log_sha256="0")),
            "code": replace(each.record, origin=replace(each.record.origin, code_sha256="0")),
            "loss": encode_documents(others, each.record.origin),
            "origin": replace(each.record, origin=None),
            "damaged": replace(each.record, nats="?"),
        }[fault]
        records[name] = Measured(documents=record)
    write_finished_runs(study.folder / RUNS_FILE, study, records)
    assert compared(study, measure_documents(study, is_kept=True)) == compared(finished, documents)
    kept = {run.run: run.documents for run in read_finished_runs(study.folder)}
    assert kept == {run.name: documents[run.name].record if run.name in documents else None for run in study.runs}


def test_document_record_keeps_losses_and_refuses_damage() -> None:
    losses = DocumentLosses(np.array([1.25, 1e3 / 3, 7.0]), np.array([1, 200, 3]))
    record = encode_documents(losses, Origin(step=5))
    found = decode_documents(record)
    assert found is not None
    assert (record.origin, found.tokens.tolist()) == (Origin(step=5), [1, 200, 3])
    assert found.nats == pytest.approx(losses.nats, rel=1e-7)
    assert encode_documents(found, Origin(step=5)) == record
    for nats in (
        "",
        record.nats[:-2],
        record.nats[:8],
        "\0",
        encode_documents(replace(losses, nats=losses.nats * np.nan), Origin(step=5)).nats,
    ):
        assert decode_documents(replace(record, nats=nats)) is None


@pytest.fixture
def tuned(finished: Study, tmp_path: Path, tiny_corpus: Path) -> Study:
    """Return the finished study under a plan that selects learning rates on one half of the held-out documents."""
    shutil.copytree(finished.folder.parent, tmp_path / "copy")
    return build(tmp_path / "copy", tiny_corpus, "choose_on: tune\n")


def moved(
    documents: Mapping[str, RunDocuments], chosen: np.ndarray[Any, Any], by: Mapping[str, float]
) -> dict[str, RunDocuments]:
    """Return the losses with nats added to every ``chosen`` document of the runs whose names begin as the keys do."""
    found = {}
    for name, each in documents.items():
        assert each.losses is not None
        nats = each.losses.nats.copy()
        nats[chosen] += sum(value for start, value in by.items() if name.startswith(start))
        found[name] = RunDocuments(DocumentLosses(nats, each.losses.tokens))
    return found


def tuning_half(study: Study) -> np.ndarray[Any, Any]:
    [data] = study.data.values()
    assert data.val is not None
    return np.flatnonzero(tuning_documents(data.val))


def test_tuning_documents_are_half_in_any_order(finished: Study) -> None:
    [data] = finished.data.values()
    assert data.val is not None
    texts = list(decode_texts(data.val, data.tokenizer))
    assert len(set(texts)) == len(texts)

    def tuning(texts: Sequence[str]) -> set[str]:
        store = encode_texts([Document(text, "a") for text in texts], data.tokenizer)
        chosen = tuning_documents(store)
        assert int(chosen.sum()) == (len(texts) + 1) // 2
        return {text for text, is_chosen in zip(texts, chosen, strict=True) if is_chosen}

    assert tuning(texts) == tuning(texts[::-1]) == tuning(texts[3:] + texts[:3])


def test_reported_half_never_decides_learning_rate(tuned: Study) -> None:
    documents, reported = measure_documents(tuned), reported_documents(tuned)
    assert reported is not None
    assert len(documents) == len(tuned.runs), "all learning rates take part"

    def rate(documents: Mapping[str, RunDocuments]) -> float | None:
        return study_figures(tuned, {}, documents).variants[1].learning_rate

    assert rate(documents) == 1e-2
    assert rate(moved(documents, reported, {"sine_lr0.01": 1e6})) == 1e-2
    tuning = tuning_half(tuned)
    assert rate(moved(documents, tuning, {"sine_lr0.01": 1e6})) == 1e-5


def test_reported_figures_leave_tuning_half_out(tuned: Study) -> None:
    documents, reported = measure_documents(tuned), reported_documents(tuned)
    assert reported is not None
    figures = study_figures(tuned, {}, documents)
    for run in figures.runs:
        losses = documents[run.run].losses
        assert losses is not None
        assert (run.val_loss, run.bits_per_byte) == (losses.loss(reported), None)
    n_documents = len(losses.tokens)
    assert figures.reported_documents == len(reported) == n_documents // 2
    [comparison] = figures.comparisons
    assert comparison.documents is not None
    assert comparison.documents.n_documents == len(reported)
    sine = figures.variants[1]
    assert sine.difference is not None
    assert comparison.documents.mean == pytest.approx(sine.difference.mean, rel=1e-3)
    tuning = tuning_half(tuned)
    assert sorted([*tuning, *reported]) == list(range(n_documents))
    same = study_figures(tuned, {}, moved(documents, tuning, {"swiglu": 50.0, "sine": 90.0}))
    assert (same.comparisons, same.runs) == (figures.comparisons, figures.runs)
    # What the selection saw is in the table of learning rates.
    scores = [rate.mean for rate in sine.learning_rates]
    assert scores == pytest.approx([_mean(documents, f"sine_lr{lr:g}", tuning) for lr in (1e-2, 1e-5)])


def _mean(documents: Mapping[str, RunDocuments], start: str, chosen: np.ndarray[Any, Any]) -> float:
    losses = [each.losses.loss(chosen) for name, each in documents.items() if name.startswith(start) and each.losses]
    return sum(losses) / len(losses)


def test_other_seeds_run_at_rate_of_tuning_half(tuned: Study, tiny_corpus: Path) -> None:
    study = build(tuned.folder.parent, tiny_corpus, "choose_on: tune\nlr_seeds: [1]\n")
    documents, reported = measure_documents(study), reported_documents(study)
    assert reported is not None
    tuning = tuning_half(study)
    for half, lr in ((tuning, "1e-05"), (reported, "0.01")):
        found = half_losses(study, moved(documents, half, {"sine_lr0.01": 1e6}))
        names = [run.name for run in with_selected_lrs(study, found).runs]
        assert names[-2:] == ["swiglu_lr0.01_seed2", f"sine_lr{lr}_seed2"]


def test_tuning_needs_losses_of_every_run(
    finished: Study, tmp_path: Path, tiny_corpus: Path, logged: pytest.LogCaptureFixture
) -> None:
    report = tmp_path / "report"
    report.mkdir()
    write_finished_runs(report / RUNS_FILE, finished)
    study = build(tmp_path / "machine", tiny_corpus, "choose_on: tune\n")
    assert reuse_runs(study, [run.name for run in study.runs], read_kept_runs([report])) == []
    assert "its losses by document are not recorded" in logged.text
    names = {run.name: RunDocuments(None, "its checkpoint is gone") for run in study.runs}
    shutil.copytree(finished.folder, study.folder, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="its checkpoint is gone; train it again, or write choose_on: all"):
        half_losses(study, names)


def test_tuning_refuses_best_step_and_single_document(tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose_on.*measure: final"):
        build(tmp_path / "a", tiny_corpus, "choose_on: tune\nmeasure: best\n")
    lines = tiny_corpus.read_text().splitlines()
    (tmp_path / "one.txt").write_text(" ".join(lines))
    with pytest.raises(ConfigError, match=r"choose_on.*only one"):
        build(tmp_path / "b", tmp_path / "one.txt", "choose_on: tune\n")


def test_damaged_line_costs_no_other_run_its_figures(finished: Study, tmp_path: Path) -> None:
    path = tmp_path / RUNS_FILE
    write_finished_runs(path, finished)
    names = set(kept_runs(path))
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(first[:-40] + "\n" + "".join(others))
    assert kept_runs(path).keys() == names - {json.loads(first)["run"]}
    assert kept_runs(tmp_path / "nothing") == {}
