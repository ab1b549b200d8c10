"""Runs of kept reports: reused where they are the same runs, and never otherwise."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from psannlm.errors import ConfigError
from psannlm.experiments import reuse
from psannlm.experiments.finished_runs import RUNS_FILE, read_finished_runs, write_finished_runs
from psannlm.experiments.local_launcher import Process
from psannlm.experiments.measures.task_accuracy import score_runs
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.plan import load_plan
from psannlm.experiments.results import study_figures
from psannlm.experiments.reuse import read_kept_runs, reuse_runs
from psannlm.experiments.run_state import read_status
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study
from psannlm.io.code_identity import CODE_KEY, UNKNOWN_CODE, code_of_run, code_sha256
from psannlm.reports.runs import read_run
from psannlm.reports.schemas.study import AnswerScore

from .conftest import Ended, spare_disk, train_here

BASE = """\
model: {{base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  vocab_size: 512
  max_length: 16
  val_split: 0.2
train: {{batch_tokens: 128, amp: fp32, device: cpu, log_interval_steps: 1, eval_interval_steps: 2}}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 500}
seeds: [1, 2]
learning_rates: [1e-2]
baseline: swiglu
variants: {swiglu: null}
"""


def refuse(run: StudyRun, environment: Mapping[str, str]) -> Process:
    raise AssertionError(f"{run.name} was finished elsewhere")


def build(root: Path, corpus: Path, old: str = "", new: str = "") -> Study:
    """Return the study of the plan in a new machine's folder, with ``old`` replaced in its files."""
    root.mkdir(exist_ok=True)
    (root / "base.yaml").write_text(BASE.format(corpus=json.dumps(str(corpus))).replace(old or "\0", new))
    (root / "plan.yaml").write_text(PLAN.replace(old or "\0", new))
    return size_study(load_plan(root / "plan.yaml"), root / "study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Study:
    """Return a study whose two runs were trained, with its report in ``report`` beside it."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        spare_disk(patch)
        study = build(root, tiny_corpus)
        run_all(study, launcher=train_here)
        (root / "report").mkdir()
        write_finished_runs(root / "report" / RUNS_FILE, study)
    return study


@pytest.fixture
def report(finished: Study) -> Path:
    return finished.folder.parent / "report"


def changed(report: Path, folder: Path, **fields: Any) -> Path:
    """Return a copy of the report with other ``fields`` in its first run."""
    folder.mkdir()
    first, *others = (report / RUNS_FILE).read_text().splitlines()
    lines = [json.dumps({**json.loads(first), **fields}), *others]
    (folder / RUNS_FILE).write_text("\n".join(lines) + "\n")
    return folder


def names(study: Study) -> list[str]:
    return [run.name for run in study.runs]


@pytest.mark.parametrize("kept", ["report", "study/runs.jsonl"])
def test_reused_runs_give_same_figures_without_training(
    finished: Study, tmp_path: Path, tiny_corpus: Path, logged: pytest.LogCaptureFixture, kept: str
) -> None:
    """Of a report, and of the file that grows in the study's folder, all that was copied from a lost machine."""
    corpus = tmp_path / "the same text elsewhere.txt"
    shutil.copyfile(tiny_corpus, corpus)
    study = build(tmp_path / "machine", corpus, "device: cpu", "device: auto")
    source = finished.folder.parent / kept
    assert reuse_runs(study, names(study), read_kept_runs([source])) == names(study)
    assert logged.messages[-1] == f"2 of 2 runs reused from {source}: {', '.join(names(study))}"
    run_all(study, launcher=refuse)
    here, there = study_figures(study).as_dict(), study_figures(finished).as_dict()
    assert f"2 of 2 runs were reused from {source}: {', '.join(names(study))}." in here["notes"]
    assert [run["reused_from"] for run in here["runs"]] == [str(source)] * 2
    for figures in (here, there):
        figures.update(notes=[], folder="", plan="")
        for run in figures["runs"]:
            run.update(folder="", reused_from=None)
    assert here == there
    again = build(tmp_path / "machine", corpus, "device: cpu", "device: auto")
    assert [read_status(run).state for run in again.runs] == ["done", "done"], "they are accepted as existing runs"
    assert read_run(study.runs[0].folder).parameters == read_run(finished.runs[0].folder).parameters
    # A study of reused runs can be reused in its turn.
    third = build(tmp_path / "third", tiny_corpus)
    assert reuse_runs(third, names(third), read_kept_runs([study.folder])) == names(third)


def test_only_missing_runs_are_trained(report: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    study = build(tmp_path / "machine", tiny_corpus)
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (shorter / RUNS_FILE).write_text((report / RUNS_FILE).read_text().splitlines(keepends=True)[1])
    assert reuse_runs(study, names(study), read_kept_runs([shorter])) == names(study)[1:]
    trained = []
    run_all(study, launcher=lambda run, environment: (trained.append(run.name), Ended())[1])
    assert trained == names(study)[:1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("amp: fp32", "amp: fp32, weight_decay: 0.3", r"train.weight_decay: 0.1 -> 0.3"),
        ("mlp: swiglu", "mlp: sine", r"model.mlp: 'swiglu' -> 'sine'"),
        ("tokens: 500", "tokens: 900", r"train.max_steps: \d+ -> \d+"),
        ("max_length: 16", "max_length: 8", r"data.max_length: 16 -> 8"),
    ],
)
def test_other_settings_are_named_and_not_reused(
    report: Path, tmp_path: Path, tiny_corpus: Path, logged: pytest.LogCaptureFixture, old: str, new: str, words: str
) -> None:
    study = build(tmp_path / "machine", tiny_corpus, old, new)
    assert reuse_runs(study, names(study), read_kept_runs([report])) == []
    assert not study.folder.exists()
    for message, run in zip(logged.messages[-2:], study.runs, strict=True):
        assert re.match(f"{run.name} is not reused from {report}: .*{words}", message), message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"code": ["0" * 64]}, "another code: SHA-256 000000000000, now "),
        ({"code": ["CODE", "0" * 64]}, " then 000000000000, now "),
        ({"code": []}, "its code is not recorded"),
        ({"corpus_sha256": "1" * 64}, "another text: SHA-256 111111111111, now "),
        ({"corpus_sha256": None}, "its text is not recorded"),
        ({"tokenizer_fingerprint": "2" * 64}, "another tokenizer: SHA-256 222222222222, now "),
        ({"rows": []}, "no validation at step "),
        ({"config": {"model": {"unheard": 1}}}, "its configuration is not one of this version"),
    ],
)
def test_other_text_or_code_is_named_and_not_reused(
    report: Path,
    tmp_path: Path,
    tiny_corpus: Path,
    logged: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    words: str,
) -> None:
    study = build(tmp_path / "machine", tiny_corpus)
    fields = {
        key: [code_sha256() if each == "CODE" else each for each in value] if key == "code" else value
        for key, value in fields.items()
    }
    kept = read_kept_runs([changed(report, tmp_path / "kept", **fields)])
    assert reuse_runs(study, names(study), kept) == names(study)[1:]
    assert any(f"{study.runs[0].name} is not reused" in line and words in line for line in logged.messages)
    assert not study.runs[0].folder.exists()


def test_renamed_variant_is_same_run(report: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    old, new = (f"baseline: {name}\nvariants: {{{name}: null}}" for name in ("swiglu", "other"))
    study = build(tmp_path / "machine", tiny_corpus, old, new)
    assert reuse_runs(study, names(study), read_kept_runs([report])) == ["other_lr0.01_seed1", "other_lr0.01_seed2"]


def test_begun_runs_are_never_replaced(report: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    study = build(tmp_path / "machine", tiny_corpus)
    study.runs[0].folder.mkdir(parents=True)
    (study.runs[0].folder / "notes.txt").write_text("of the user's")
    assert reuse_runs(study, names(study), read_kept_runs([report])) == names(study)[1:]
    assert [path.name for path in study.runs[0].folder.iterdir()] == ["notes.txt"]


def test_dry_run_of_reuse_writes_nothing(
    report: Path, tmp_path: Path, tiny_corpus: Path, logged: pytest.LogCaptureFixture
) -> None:
    study = build(tmp_path / "machine", tiny_corpus)
    assert reuse_runs(study, names(study), read_kept_runs([report]), is_dry=True) == names(study)
    assert "2 of 2 runs would be reused from" in logged.messages[-1]
    assert not study.folder.exists()


def test_answers_come_from_the_report(finished: Study, report: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    """A reused run has no model that could be scored: without its scores, it is trained."""
    study = build(tmp_path / "machine", tiny_corpus, "budget:", "answers: copying\nbudget:")
    assert reuse_runs(study, names(study), read_kept_runs([report])) == []
    lines = [json.loads(line) for line in (report / RUNS_FILE).read_text().splitlines()]
    (tmp_path / "kept").mkdir()
    [data] = finished.data.values()
    assert data.val is not None
    # Scores of other documents, such as of the half that choose_on: tune reports, are not those of this plan.
    for n_documents, wanted in ((data.val.n_documents + 1, []), (data.val.n_documents, names(study))):
        scores = {name: AnswerScore(0.5, 0.25, 1.5, 8, n_documents) for name in names(finished)}
        added = [{"answers": scores[line["run"]].as_dict(), "task": "copying", "measure": "final"} for line in lines]
        text = "".join(json.dumps({**line, **more}) + "\n" for line, more in zip(lines, added, strict=True))
        (tmp_path / "kept" / RUNS_FILE).write_text(text)
        assert reuse_runs(study, names(study), read_kept_runs([tmp_path / "kept"])) == wanted
    assert score_runs(study) == scores


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no runs.jsonl"),
        ("{}\n", "not the record of a finished run"),
        ("nonsense\n", "a line is not JSON"),
        ('{"format": "psannlm-finished-run", "run": "x"}\n', "runs.jsonl: "),
    ],
)
def test_damaged_report_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / RUNS_FILE).write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_finished_runs(tmp_path)
    with pytest.raises(ConfigError, match="no such report or study folder"):
        read_finished_runs(tmp_path / "nowhere")


def test_code_of_resumed_run_lists_all_code(finished: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    system = json.loads((finished.runs[0].folder / "system.json").read_text())
    assert system[CODE_KEY] == code_of_run(None) == [code_sha256()]
    assert code_of_run(system) == [code_sha256()]
    assert code_of_run({}) == [UNKNOWN_CODE, code_sha256()], "of a run from before this was recorded"
    monkeypatch.setattr("psannlm.io.code_identity.code_sha256", lambda: "other")
    assert code_of_run(system) == [system[CODE_KEY][0], "other"]
    assert reuse.code_sha256() != "other"
