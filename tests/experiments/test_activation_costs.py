"""What quantized activations cost a study's runs: that of each checkpoint, kept with it, compared at the best scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from psannlm.errors import ConfigError
from psannlm.evaluation.activation_quantization import QuantizationSettings, evaluate_quantized
from psannlm.experiments.finished_runs import (
    RUNS_FILE,
    ActivationRecord,
    ActivationTails,
    Measured,
    Origin,
    kept_runs,
    write_finished_runs,
)
from psannlm.experiments.lr_selection import choose
from psannlm.experiments.measures import activation_costs
from psannlm.experiments.measures.activation_costs import RunActivations, activation_figures, measure_activations
from psannlm.experiments.measures.document_losses import measure_documents
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.plan import load_plan
from psannlm.experiments.results import study_figures
from psannlm.experiments.reuse import read_kept_runs, reuse_runs
from psannlm.experiments.run_state import read_status
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study
from psannlm.models.artifact import load_model
from psannlm.reports.schemas.evaluation import QuantizedLossFigures
from psannlm.reports.tables.study import study_tables
from psannlm.runtime.device import pick_device, pick_precision
from psannlm.training.checkpoint import LATEST, read_pointer
from psannlm.training.plan import cut_windows

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
learning_rates: [1.0e-2]
activations_bits: [3, 2]
activations_places: [down]
variants:
  swiglu: {}
  sine: {model: {mlp: sine}}
"""


def build(root: Path, corpus: Path, old: str = "", new: str = "") -> Study:
    """Return the study of the plan with ``old`` replaced in it, in a new machine's folder."""
    root.mkdir(exist_ok=True)
    (root / "base.yaml").write_text(BASE.format(corpus=json.dumps(str(corpus))))
    (root / "plan.yaml").write_text(PLAN.replace(old or "\0", new))
    return size_study(load_plan(root / "plan.yaml"), root / "study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Study:
    """Return a study whose four runs were trained."""
    with pytest.MonkeyPatch.context() as patch:
        spare_disk(patch)
        study = build(tmp_path_factory.mktemp("finished"), tiny_corpus)
        run_all(study, launcher=train_here)
    return study


@pytest.fixture(scope="module")
def found(finished: Study) -> dict[str, RunActivations]:
    return measure_activations(finished)


def write_measured(path: Path, study: Study, found: Mapping[str, RunActivations]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_finished_runs(path, study, {name: Measured(activations=each.record) for name, each in found.items()})


def test_activation_cost_is_that_of_each_checkpoint(finished: Study, found: dict[str, RunActivations]) -> None:
    assert found.keys() == {run.name for run in finished.runs}
    run = next(run for run in finished.runs if run.name == "sine_lr0.01_seed2")
    folder, data = read_pointer(run.folder, LATEST), finished.data[run.variant.variant.config.data]
    assert folder is not None
    assert data.val is not None
    wanted = evaluate_quantized(
        load_model(folder).model,
        cut_windows(run.config, data.val, data.tokenizer),
        QuantizationSettings((3, 2), ("down",)),
        precision=pick_precision("fp32", pick_device("cpu")),
        calibration=cut_windows(run.config, data.train, data.tokenizer),
    )
    record = found[run.name].record
    assert record is not None
    assert (record.tokens, record.loss) == (wanted.tokens, pytest.approx(wanted.loss, rel=1e-6))
    [last] = [each.val_loss for each in study_figures(finished).runs if each.run == run.name]
    assert record.loss == pytest.approx(last, rel=1e-5), "the whole held-out text is scored"
    assert [(each.bits, each.scale) for each in record.losses] == [(each.bits, each.scale) for each in wanted.losses]
    costs = [each.difference for each in record.losses]
    assert costs == pytest.approx([each.difference for each in wanted.losses], abs=1e-6)
    assert any(cost is not None and abs(cost) > 1e-4 for cost in costs)
    assert record.tails.keys() == {"down"}


def test_kept_activation_costs_are_not_measured_again(
    finished: Study,
    found: dict[str, RunActivations],
    tmp_path: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished.folder.parent, tmp_path / "copy")
    study = build(tmp_path / "copy", tiny_corpus)
    assert measure_activations(study, is_kept=True) == found
    documents = measure_documents(study, is_kept=True)
    evaluated: list[str] = []
    evaluate = activation_costs._evaluate

    def counted(study: Study, run: StudyRun, origin: Origin) -> ActivationRecord:
        evaluated.append(run.name)
        return evaluate(study, run, origin)

    monkeypatch.setattr(activation_costs, "_evaluate", counted)
    assert measure_activations(study, is_kept=True) == found
    assert evaluated == [], "both kinds of figures are kept beside each other"
    assert all(kept.documents == documents[name].record for name, kept in kept_runs(study.folder).items())
    # Of fewer bits the figures are part of those kept; more bits, other places and another model are measured.
    fewer = build(tmp_path / "copy", tiny_corpus, "[3, 2]", "[2]")
    measure_activations(fewer)
    assert evaluated == []
    measure_activations(build(tmp_path / "copy", tiny_corpus, "[3, 2]", "[3, 2, 5]"))
    measure_activations(build(tmp_path / "copy", tiny_corpus, "[down]", "[down, head]"))
    assert len(evaluated) == 8
    other = found["sine_lr0.01_seed1"].record
    assert other is not None
    for number, fault in enumerate(({"log_sha256": "0"}, {"code_sha256": "0"}, {"step": 1}), 1):
        others = {**found, "sine_lr0.01_seed1": RunActivations(replace(other, origin=replace(other.origin, **fault)))}
        write_measured(study.folder / RUNS_FILE, study, others)
        assert measure_activations(study) == found
        assert evaluated[8:] == ["sine_lr0.01_seed1"] * number, "of another training, code or checkpoint"


def test_reused_runs_keep_activation_costs(
    finished: Study, found: dict[str, RunActivations], tmp_path: Path, tiny_corpus: Path
) -> None:
    write_measured(tmp_path / "report" / RUNS_FILE, finished, found)
    kept = read_kept_runs([tmp_path / "report"])
    study = build(tmp_path / "machine", tiny_corpus)
    assert len(reuse_runs(study, [run.name for run in study.runs], kept)) == 4
    assert measure_activations(study) == found
    other = build(tmp_path / "other", tiny_corpus, "[3, 2]", "[4]")
    assert len(reuse_runs(other, [run.name for run in other.runs], kept)) == 4
    missing = measure_activations(other)
    assert {each.reason for each in missing.values()} == {"the report it was reused from has none"}


def record_of(costs: dict[tuple[int, str], float], kurtosis: float) -> ActivationRecord:
    losses = [
        QuantizedLossFigures(bits=bits, scale=scale, loss=1 + cost, difference=cost, bits_per_byte=1.0)
        for (bits, scale), cost in costs.items()
    ]
    tails = {"down": ActivationTails(kurtosis=kurtosis, max_over_rms=2 * kurtosis)}
    origin = Origin(step=1)
    return ActivationRecord(origin=origin, places=["down"], tokens=9, loss=1.0, losses=losses, tails=tails)


def test_variants_are_compared_at_scales_named_beforehand(finished: Study) -> None:
    """Hand-computed; a scale that happens to be the best of several is not picked."""
    costs = {
        "swiglu_lr0.01_seed1": {"static": 0.1, "static_least_error": 0.5, "dynamic": 0.3},
        "swiglu_lr0.01_seed2": {"static": 0.1, "static_least_error": 0.6, "dynamic": 0.5},
        "sine_lr0.01_seed1": {"static_least_error": 0.2, "static_known_range": 0.1, "dynamic": 0.2},
        "sine_lr0.01_seed2": {"static_least_error": 0.1, "static_known_range": 0.4, "dynamic": 0.2},
    }
    found = {
        name: RunActivations(
            record_of({(bits, scale): cost for bits in (3, 2) for scale, cost in by.items()}, 3.0 + at)
        )
        for at, (name, by) in enumerate(costs.items())
    }
    states = [read_status(run) for run in finished.runs]
    chosen = {sized.variant.name: choose(sized, states, finished.plan) for sized in finished.variants}
    figures = activation_figures(finished, chosen, found)
    assert figures is not None
    static, known, dynamic = (each for each in figures.comparisons if each.bits == 2)
    assert (static.variant, static.against) == ("sine", "swiglu")
    assert (static.scale, static.against_scale) == ("static_least_error", "static_least_error")
    assert (known.scale, known.against_scale) == ("static_known_range", "static_least_error")
    assert static.difference is not None
    # 0.2 - 0.5 and 0.1 - 0.6; the half width is t(0.975, 1) s / sqrt(2) = 12.7062 * 0.1.
    assert static.difference.mean == pytest.approx(-0.4)
    assert static.difference.interval == pytest.approx((-0.4 - 1.27062, -0.4 + 1.27062), abs=1e-4)
    assert static.difference.fraction == pytest.approx(-0.4 / 0.55)
    assert known.difference is not None
    assert known.difference.mean == pytest.approx(-0.3)
    assert dynamic.difference is not None
    assert dynamic.difference.mean == pytest.approx(-0.2)
    (least_error,) = (
        each.cost
        for each in figures.costs
        if (each.variant, each.bits, each.scale) == ("swiglu", 3, "static_least_error")
    )
    assert (least_error.mean, least_error.n) == (pytest.approx(0.55), 2)
    sine = next(each for each in figures.inputs if each.variant == "sine")
    assert sine.kurtosis is not None
    assert sine.kurtosis.mean == pytest.approx(5.5)


def test_tables_show_costs_and_runs_without_them(finished: Study, found: dict[str, RunActivations]) -> None:
    lost = {**found, "sine_lr0.01_seed2": RunActivations(None, "its checkpoint is gone")}
    metrics = study_figures(finished, {}, {}, lost)
    titles = {table.title: table for table in study_tables(metrics)}
    costs = next(table for title, table in titles.items() if title.startswith("Increase of the loss"))
    assert "Not measured: sine_lr0.01_seed2: its checkpoint is gone." in costs.note
    assert [row[:2] for row in costs.rows] == [["swiglu", "3"], ["swiglu", "2"], ["sine", "3"], ["sine", "2"]]
    known = list(costs.headings).index("static known range")
    assert [row[known] == "–" for row in costs.rows] == [True, True, False, False]
    record = found["sine_lr0.01_seed1"].record
    assert record is not None
    (cost,) = (each.difference for each in record.losses if (each.bits, each.scale) == (3, "static_known_range"))
    assert costs.rows[2][known] == f"{cost:.4f}"
    assert metrics.as_dict()["activations"]["missing"] == {"sine_lr0.01_seed2": "its checkpoint is gone"}
    without = study_figures(finished)
    assert without.activations is not None
    assert without.activations.costs == []


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("[3, 2]", "[1]", "activations_bits", "1 bits; give numbers from 2 to 16"),
        ("[3, 2]", "[4, 4]", "activations_bits", "holds a value twice"),
        ("[3, 2]", "[]", "activations_places", "nothing is quantized without activations_bits"),
        ("[down]", "[up]", "activations_places", "'up'"),
        ("[down]", "[down, qkv_features]", "activations_places", "model.qkv_features is not set in swiglu, sine"),
        ("[down]", "[]", "activations_places", "empty; give at least one"),
    ],
)
def test_plan_refuses_bits_and_places_it_cannot_measure(
    old: str, new: str, key: str, said: str, tmp_path: Path, tiny_corpus: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(tmp_path, tiny_corpus, old, new)
    [problem] = refused.value.problems
    assert key in str(problem)
    assert said in str(problem)
