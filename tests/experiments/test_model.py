"""Ablation studies: equal parameters, one text order, scheduling, resuming, learning-rate selection and figures."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import load_config
from psannlm.data.loader import Loader
from psannlm.data.synthetic.algorithmic import write_task
from psannlm.errors import ConfigError, Interrupted, TrainingError
from psannlm.experiments.caveats import conditions, notes_of
from psannlm.experiments.finished_runs import RUNS_FILE, kept_runs
from psannlm.experiments.gpu_slots import Placement
from psannlm.experiments.local_launcher import Process, launch
from psannlm.experiments.lr_selection import choose, with_selected_lrs
from psannlm.experiments.measures.task_accuracy import score_runs
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.plan import load_plan
from psannlm.experiments.results import plan_tables, seconds_per_step, study_figures
from psannlm.experiments.run_state import RunState, read_status
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study, write_configs
from psannlm.io.artifact_schema import read_figures
from psannlm.io.code_identity import CODE_KEY
from psannlm.io.readers import read_json
from psannlm.models.artifact import load_model
from psannlm.reports.gather import gather
from psannlm.reports.page_model import signed
from psannlm.reports.runs import RunRecord
from psannlm.reports.schemas.measured import PairedDifference
from psannlm.reports.schemas.study import StudyMetrics, VariantFigures
from psannlm.reports.tables.study import study_headline, study_pictures, study_tables
from psannlm.runtime.distributed import World
from psannlm.training.plan import build_loader
from psannlm.training.run import train
from psannlm.training.run_folder import RunStatus, write_status

from .conftest import Ended, spare_disk, train_here

KEPT = Path(__file__).parents[2] / "reports/published/ablations/20261125_195206/metrics.json"
BASE = """\
model: {{base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  vocab_size: 512
  max_length: 16
  val_split: 0.2
train: {{batch_tokens: 128, amp: fp32, device: cpu, log_interval_steps: 1, eval_interval_steps: 3}}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 750}
seeds: [1, 2]
learning_rates: [1e-3, 1e-2]
baseline: swiglu
variants:
  swiglu:
  sine: {model: {mlp: sine}, learning_rates: [1e-2]}
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    spare_disk(monkeypatch)


def build_study(
    root: Path,
    corpus: Path,
    old: str = "",
    new: str = "",
    folder: str = "study",
    base: tuple[str, str] = ("", ""),
) -> Study:
    """Return the study of the plan with ``old`` replaced by ``new``, in ``folder`` of ``root``."""
    text = BASE.format(corpus=json.dumps(str(corpus)))
    (root / "base.yaml").write_text(text.replace(*base) if base[0] else text)
    (root / "plan.yaml").write_text(PLAN.replace(old, new) if old else PLAN)
    return size_study(load_plan(root / "plan.yaml"), root / folder)


@pytest.fixture
def make(tmp_path: Path, tiny_corpus: Path) -> Callable[..., Study]:
    """Return a builder of studies in a temporary folder; see :func:`build_study`."""
    return partial(build_study, tmp_path, tiny_corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Study:
    """Return a study whose six runs were trained without interruption."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        spare_disk(patch)
        study = build_study(root, tiny_corpus, "baseline: swiglu", "baseline: swiglu\nalso_compare_to: [sine]")
        run_all(study, launcher=train_here)
    return study


def timeless(figures: Any) -> Any:
    """Return figures without those that differ between runs of the same study."""
    moving = {"tokens_per_s", "training_s", "peak_memory_bytes", "seconds", "folder", "notes"}
    if isinstance(figures, dict):
        return {key: timeless(value) for key, value in figures.items() if key not in moving}
    return [timeless(value) for value in figures] if isinstance(figures, list) else figures


def test_size_study_equalizes_parameters_within_budget(make: Callable[..., Study]) -> None:
    study = make()
    swiglu, sine = study.variants
    assert (swiglu.was_solved, sine.was_solved) == (False, True)
    assert abs(sine.n_parameters / swiglu.n_parameters - 1) <= 0.01
    assert [run.name for run in study.runs][:3] == ["swiglu_lr0.001_seed1", "swiglu_lr0.01_seed1", "sine_lr0.01_seed1"]
    assert {run.config.train.max_steps for run in study.runs} == {swiglu.n_steps}
    loader = build_loader(study.runs[0].config, next(iter(study.data.values())), World())
    assert swiglu.n_tokens / 750 == pytest.approx(1, abs=0.5 * loader.windows.n_labels / loader.steps_per_epoch / 750)


def test_flops_budget_gives_costlier_model_fewer_steps(make: Callable[..., Study]) -> None:
    study = make("tokens: 750}", "flops: 2e9}\nparameters: shown\nsolve_d_mlp: false")
    swiglu, sine = study.variants
    assert sine.flops_per_token != swiglu.flops_per_token
    dear, cheap = sorted(study.variants, key=lambda sized: -sized.flops_per_token)
    assert dear.n_steps < cheap.n_steps
    for sized in study.variants:
        assert sized.n_tokens * sized.flops_per_token == pytest.approx(2e9, rel=0.05)


def test_budget_fraction_reduces_steps_and_adds_caveat(make: Callable[..., Study]) -> None:
    study = make()
    shorter = make("learning_rates: [1e-2]}", "learning_rates: [1e-2], budget_fraction: 0.5}")
    whole, part = study.variants[1], shorter.variants[1]
    assert 0.4 < part.n_steps / whole.n_steps < 0.6
    assert {run.config.train.max_steps for run in shorter.runs if run.variant is part} == {part.n_steps}
    assert shorter.variants[0].n_steps == whole.n_steps
    notes = [note for note in notes_of(shorter, {}, []) if "budget" in note]
    assert notes == ["sine was trained for 50% of the budget."]


def test_unequal_parameters_raise_or_are_shown(make: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match=r"variants\.sine: .* parameters, .* against swiglu's"):
        make("baseline:", "solve_d_mlp: false\nbaseline:")
    with pytest.raises(ConfigError, match=r"variants\.sine"):
        make("{mlp: sine}", "{mlp: sine, d_mlp: 500}")
    study = make("baseline:", "parameters: shown\nsolve_d_mlp: false\nbaseline:")
    assert abs(study.variants[1].n_parameters / study.variants[0].n_parameters - 1) > 0.01


def test_variants_of_a_seed_share_text_order(make: Callable[..., Study]) -> None:
    study = make()
    orders = {}
    for run in study.runs:
        loader: Loader = build_loader(run.config, study.data[run.variant.variant.config.data], World())
        windows = [
            batch.micro_batches[0].input_ids.tolist() for batch, _ in zip(loader.steps(), range(4), strict=False)
        ]
        orders.setdefault(run.seed, []).append(windows)
    assert all(order == of_seed[0] for of_seed in orders.values() for order in of_seed)
    assert orders[1][0] != orders[2][0]
    assert [sized.order_differs for sized in study.variants] == [(), ()]
    other = make("{mlp: sine}", "{mlp: sine}, data: {max_length: 8}")
    assert other.variants[1].order_differs == ("data.max_length: 16 -> 8",)


@pytest.mark.slow
def test_stopped_runs_in_any_order_give_same_figures(make: Callable[..., Study], finished: Study) -> None:
    study = make(folder="stopped")
    n_started = 0

    def stop_third(run: StudyRun, environment: Mapping[str, str]) -> Process:
        nonlocal n_started
        n_started += 1
        if n_started == 3:  # a run that ends before its last step, as after Ctrl-C
            train(load_config(run.config_path), time_budget_s=0.0)
            return Ended(130)
        return train_here(run, environment)

    with pytest.raises(Interrupted, match="2 of 6 runs done"):
        run_all(study, launcher=stop_third)
    assert read_status(study.runs[2]).state == "stopped"
    again = make(folder="stopped")
    backwards = Study(again.plan, again.folder, again.variants, tuple(reversed(again.runs)), again.data)
    trained: list[str] = []

    def record(run: StudyRun, environment: Mapping[str, str]) -> Process:
        trained.append(run.name)
        return train_here(run, environment)

    run_all(backwards, placement=Placement(3), launcher=record)
    assert trained == [run.name for run in reversed(again.runs)][:4], "finished runs are not repeated"
    wanted = {**study_figures(finished).as_dict(), "also_compare_to": {}, "plan": str(study.plan.path)}
    wanted["comparisons"] = [each for each in wanted["comparisons"] if each["against"] == "swiglu"]
    assert timeless(study_figures(make(folder="stopped")).as_dict()) == timeless(wanted)
    run_all(again, launcher=lambda run, environment: pytest.fail("all runs are finished"))


def test_study_figures_match_run_logs(finished: Study) -> None:
    figures = study_figures(finished)
    best = figures.variants[0]
    lines = (finished.folder / f"swiglu_lr{best.learning_rate:g}_seed2" / "metrics.jsonl").read_text().splitlines()
    evaluations = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    assert best.val_loss_by_seed["2"] == evaluations[-1]["loss"]
    assert best.edge in ("lowest", "highest")
    assert "edge" in " ".join(figures.notes)


def test_study_differences_are_paired_and_mirrored(finished: Study) -> None:
    figures = study_figures(finished)
    best, sine = figures.variants
    pairs = [sine.val_loss_by_seed[seed] - best.val_loss_by_seed[seed] for seed in ("1", "2")]
    assert sine.difference.mean == pytest.approx(sum(pairs) / 2)
    assert sine.difference.low < sine.difference.mean < sine.difference.high
    # Compared to the other variant, every difference changes its sign.
    mirrored = figures.also_compare_to["sine"]["swiglu"]
    assert list(figures.also_compare_to["sine"]) == ["swiglu"]
    assert (mirrored.mean, mirrored.high) == (-sine.difference.mean, -sine.difference.low)


@pytest.mark.slow
def test_study_tables_pictures_and_headline(finished: Study) -> None:
    figures = study_figures(finished)
    sine = figures.variants[1]
    tables = study_tables(read_figures(StudyMetrics, json.loads(json.dumps(figures.as_dict()))))
    assert [row[0] for row in tables[0].rows] == ["swiglu", "sine"]
    percent = -100 * sine.difference.mean / sine.val_loss.mean
    assert [table.title for table in tables[1:3]] == ["Compared to swiglu", "Compared to sine"]
    assert tables[2].rows[0][2] == signed(percent, 2)
    assert {picture.file for picture in study_pictures(figures)} == {
        "differences.png",
        "loss_by_tokens.png",
        "loss_by_time.png",
    }
    headline = study_headline(figures)
    assert headline is not None
    assert "sine against swiglu" in headline.label


def test_shared_gpus_leave_speed_out(finished: Study, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "study")
    runs = tuple(replace(run, study=tmp_path / "study") for run in finished.runs)
    study = replace(finished, runs=runs, folder=tmp_path / "study")
    speed = {"tokens/s", "training, s"}
    alone, *_, every_run = study_tables(study_figures(study))
    assert speed <= {*alone.headings} & {*every_run.headings}

    system = json.loads((runs[3].folder / "system.json").read_text())
    (runs[3].folder / "system.json").write_text(json.dumps({**system, "gpu_is_shared": True}))
    figures = read_figures(StudyMetrics, json.loads(json.dumps(study_figures(study).as_dict())))
    together, *_, every_run = study_tables(figures)
    assert not speed & {*together.headings, *every_run.headings}
    assert [row[:10] for row in together.rows] == [row[:10] for row in alone.rows], "everything else stays"
    assert {variant.tokens_per_s for variant in figures.variants} == {run.training_s for run in figures.runs} == {None}
    assert {picture.file for picture in study_pictures(figures)} == {"differences.png", "loss_by_tokens.png"}
    assert "Runs shared a GPU (--share-gpus), so throughput and times are left out." in figures.notes


def test_gather_finds_all_runs_of_a_study(finished: Study, tmp_path: Path) -> None:
    runs = gather(tmp_path / "reports", [finished.folder]).runs
    assert len(runs) == 6
    assert all(run.peak_memory_bytes for run in runs)


@pytest.mark.slow
def test_task_accuracy_uses_last_model_of_run(tmp_path: Path) -> None:
    """Counted over all held-out documents by another way than the benchmark's: one by one, without windows."""
    (tmp_path / "task.txt").write_text("".join(write_task("copying", 1, 4_000)))
    (tmp_path / "base.yaml").write_text(BASE.format(corpus=json.dumps(str(tmp_path / "task.txt"))))
    (tmp_path / "plan.yaml").write_text(PLAN + "answers: copying\n")
    study = size_study(load_plan(tmp_path / "plan.yaml"), tmp_path / "study")
    run_all(study, launcher=train_here)
    for run in study.runs:
        (run.folder / "best").unlink()  # the plan measures the last step
    (study.folder / RUNS_FILE).unlink()
    run_all(study, launcher=train_here)  # adds the runs that ended while no one waited
    assert kept_runs(study.folder).keys() == {run.name for run in study.runs}
    answers = score_runs(study, is_kept=True)
    kept = {name: (run.answers, run.task, run.measure) for name, run in kept_runs(study.folder).items()}
    assert kept == {name: (score, "copying", "final") for name, score in answers.items()}
    assert sorted(answers) == sorted(run.name for run in study.runs)

    for run in study.runs[:2]:
        data = study.data[run.variant.variant.config.data]
        assert data.val is not None
        model = load_model(next(path for path in run.folder.glob("step_*"))).model.eval()
        right, n_answers = 0, 0
        starts = data.val.starts(0, data.val.n_documents + 1).tolist()
        for start, end in pairwise(starts):
            ids = torch.tensor(data.val.tokens(start, end).astype("int64"))
            mark = ids.tolist().index(data.tokenizer.encode("|")[0])
            guesses = model.logits(model.hidden_states(ids[None, :-1]))[0].argmax(-1)
            right += int((guesses[mark:-1] == ids[mark + 1 : -1]).sum())
            n_answers += len(ids) - 2 - mark
        score = answers[run.name]
        assert (score.right, score.n_answers) == (pytest.approx(right / n_answers), n_answers)
        assert score.n_documents == data.val.n_documents

    figures = read_figures(StudyMetrics, json.loads(json.dumps(study_figures(study, answers).as_dict())))
    swiglu, sine = figures.variants
    rate = swiglu.learning_rate
    shares = [answers[f"swiglu_lr{rate:g}_seed{seed}"].right for seed in (1, 2)]
    assert list(swiglu.answers.right_by_seed.values()) == shares
    pairs = [sine.answers.right_by_seed[seed] - swiglu.answers.right_by_seed[seed] for seed in ("1", "2")]
    assert sine.answers.difference.mean == pytest.approx(sum(pairs) / 2)
    table, by_rate = study_tables(figures)[2:4]
    assert table.rows[1][3] == signed(100 * sum(pairs) / 2, 3)
    assert [row[0] for row in table.rows] == ["swiglu", "sine"]
    assert table.rows[0][-1] == "too few validations; too few validations"
    runs = [
        replace(run, plateau_exit_tokens=1e6 * run.seed, plateau="")
        if (run.variant, run.lr) == ("swiglu", rate)
        else run
        for run in figures.runs
    ]
    assert study_tables(replace(figures, runs=runs))[2].rows[0][-1] == "1,000,000; 2,000,000"
    assert by_rate.headings == ["variant", "0.001", "0.01"]
    at_high = [f"{answers[f'sine_lr0.01_seed{seed}'].right:.1%}" for seed in (1, 2)]
    assert by_rate.rows[1] == ["sine", "", " ".join(at_high)]


@pytest.mark.slow
def test_failing_run_is_reported_and_others_continue(
    make: Callable[..., Study], logged: pytest.LogCaptureFixture
) -> None:
    study = make("learning_rates: [1e-3, 1e-2]\n", "learning_rates: [1e-3, 5e-2]\n")

    def fail_high(run: StudyRun, environment: Mapping[str, str]) -> Process:
        if run.lr < 0.05 or run.seed == 2:
            return train_here(run, environment)
        run.log_path.write_text("step 1\nerror: step 3: loss nan\n  is not finite\n")
        return Ended(1)

    run_all(study, launcher=fail_high)
    assert any("swiglu_lr0.05_seed1: step 3: loss nan is not finite" in line for line in logged.messages)
    figures = study_figures(study)
    swiglu = figures.variants[0]
    assert (swiglu.learning_rate, swiglu.edge) == (0.001, "lowest")
    assert [rate.failed for rate in swiglu.learning_rates] == [0, 1]
    assert [run.state for run in figures.runs].count("diverged") == 1
    assert any(note.startswith("Diverged (non-finite) and excluded: swiglu_lr0.05_seed1") for note in figures.notes)
    run_all(study, launcher=lambda run, environment: pytest.fail(f"{run.name} would come to the same again"))


def test_run_status_file_decides_what_diverged(make: Callable[..., Study]) -> None:
    run = make().runs[0]
    run.folder.mkdir(parents=True)
    run.log_path.write_text("error: step 3: loss nan is not finite\n")
    assert read_status(run).is_diverged, "a study from before status.json is read by its log"
    write_status(run.folder, RunStatus.FAILED, "disk full")
    assert (read_status(run).state, read_status(run).is_diverged) == ("failed", False)
    run.log_path.write_text("step 1\n")
    write_status(run.folder, RunStatus.DIVERGED, "step 3: loss nan")
    failed = read_status(run)
    assert (failed.state, failed.reason, failed.is_settled) == ("failed", "step 3: loss nan", True)
    write_status(run.folder, RunStatus.STOPPED, "stopped after step 3")
    assert not read_status(run).is_settled


@pytest.mark.slow
def test_lr_is_excluded_for_divergence_only(make: Callable[..., Study]) -> None:
    """A run of NaN is the rate's own; a full disk is not, and leaves a run to be made."""
    study = make("learning_rates: [1e-3, 1e-2]\n", "learning_rates: [1e-3, 1e25]\n")
    no_room = study.runs[-2]
    assert (no_room.name, no_room.lr) == ("swiglu_lr1e+25_seed2", 1e25)

    def make_run(run: StudyRun, environment: Mapping[str, str]) -> Process:
        try:
            train(load_config(run.config_path))
        except TrainingError as error:
            run.log_path.write_text(f"error: {error}\n")
        return Ended(0)

    run_all(study, launcher=make_run)
    state = next(read_status(run) for run in study.runs if run.name == "swiglu_lr1e+25_seed1")
    assert (state.state, state.is_diverged) == ("failed", True)
    assert study_figures(study).variants[0].learning_rate == 0.001

    other = make(folder="other")
    for run in other.runs[:2]:
        train_here_after_writing(other, run)
    other.runs[3].log_path.write_text("error: no space left on device\n")
    assert not read_status(other.runs[3]).is_diverged
    swiglu = study_figures(other).variants[0]
    assert swiglu.provisional
    better = min(read_status(run).record.eval_rows[-1]["loss"] for run in other.runs[:2])  # type: ignore[union-attr]
    assert swiglu.val_loss_by_seed == {"1": better}, "both rates have seed 1, and a full disk is nobody's fault"


def train_here_after_writing(study: Study, run: StudyRun) -> None:
    write_configs(study)
    train(load_config(run.config_path))


def test_lr_selection_uses_seeds_of_all_lrs(make: Callable[..., Study]) -> None:
    """A rate with one easy seed more is not the better for it."""
    study = make(folder="shared")
    sized = study.variants[0]
    record = RunRecord(Path(), "run", {}, {}, [], [], None, None, None, ())

    def state(lr: float, seed: int, loss: float | None) -> RunState:
        run = next(run for run in study.runs if run.variant is sized and (run.lr, run.seed) == (lr, seed))
        if loss is None:
            return RunState(run, "new")
        return RunState(run, "done", record=replace(record, eval_rows=[{"step": 9, "loss": loss}]))

    half = [state(0.001, 1, 3.0), state(0.01, 1, 3.1), state(0.001, 2, 9.0), state(0.01, 2, None)]
    choice = choose(sized, half, study.plan)
    assert (choice.lr, choice.edge, choice.is_provisional) == (0.001, "lowest", True)
    whole = choose(sized, [*half[:3], state(0.01, 2, 3.2)], study.plan)
    assert (whole.lr, whole.edge, whole.is_provisional) == (0.01, "highest", False)
    apart = choose(sized, [half[0], state(0.01, 1, None), state(0.001, 2, None), state(0.01, 2, 2.0)], study.plan)
    assert (apart.lr, apart.is_provisional) == (0.01, True)


@pytest.mark.slow
def test_lr_seeds_select_lr_for_other_seeds(make: Callable[..., Study]) -> None:
    looking = ("seeds: [1, 2]", "seeds: [1, 2, 3]\nrate_seeds: [2]")
    study = make(*looking)
    assert [run.name for run in study.runs] == ["swiglu_lr0.001_seed2", "swiglu_lr0.01_seed2", "sine_lr0.01_seed2"]
    assert with_selected_lrs(study).runs == study.runs, "nothing is known of the rates yet"
    assert "then 4 more" in plan_tables(study, {"swiglu": 2.0, "sine": 3.0})[1].note
    run_all(study, launcher=train_here)
    losses = {run.lr: read_status(run).record.eval_rows[-1]["loss"] for run in study.runs[:2]}  # type: ignore[union-attr]
    best = min(losses, key=lambda lr: losses[lr])
    whole = with_selected_lrs(make(*looking))
    assert [run.name for run in whole.runs[3:]] == [
        f"swiglu_lr{best:g}_seed1",
        "sine_lr0.01_seed1",
        f"swiglu_lr{best:g}_seed3",
        "sine_lr0.01_seed3",
    ]
    run_all(whole, launcher=train_here)
    figures = study_figures(with_selected_lrs(make(*looking)))
    swiglu, sine = figures.variants
    assert (swiglu.learning_rate, swiglu.provisional) == (best, False)
    assert [set(variant.val_loss_by_seed) for variant in (swiglu, sine)] == [{"1", "2", "3"}] * 2
    assert sine.difference.n == 3
    assert {rate.lr: rate.mean for rate in swiglu.learning_rates} == losses, "of the seed that looked"
    assert any("of seed 2 only" in note for note in figures.notes)
    others = study_figures(with_selected_lrs(make(looking[0], f"{looking[1]}\nreport_seeds: others")))
    for now, before in zip(others.variants, figures.variants, strict=True):
        assert (now.learning_rate, now.learning_rates) == (before.learning_rate, before.learning_rates)
        assert now.val_loss_by_seed == {seed: before.val_loss_by_seed[seed] for seed in ("1", "3")}
    assert any("the seeds that selected do not count" in note for note in others.notes)


def test_single_lr_is_reported_without_star(make: Callable[..., Study]) -> None:
    study = make()
    run_all(study, launcher=train_here, only=["sine_lr0.01_seed1", "sine_lr0.01_seed2"])
    assert {state.run.variant.variant.name for state in map(read_status, study.runs) if state.state == "done"} == {
        "sine"
    }
    figures = study_figures(study)
    results, _, rates = study_tables(figures)[:3]
    assert results.rows[1][7] == "0.01"
    assert "*" not in " ".join(rates.rows[1])
    assert any(note == "Only one learning rate was tried, which may not be the best: sine." for note in figures.notes)


@pytest.mark.slow
def test_runs_on_changed_text_are_refused(make: Callable[..., Study], tmp_path: Path, tiny_corpus: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_corpus.read_text())
    elsewhere = (json.dumps(str(tiny_corpus)), json.dumps(str(text)))
    run_all(make(base=elsewhere), launcher=train_here, only=["sine_lr0.01_seed1", "sine_lr0.01_seed2"])
    assert len(make(base=elsewhere).runs) == 6
    text.write_text(tiny_corpus.read_text() + "".join(f"a line more: {chr(0x2200 + at)}\n" for at in range(40)))
    with pytest.raises(ConfigError, match=r"sine_lr0\.01_seed1: was trained with another text: SHA-256") as caught:
        make(base=elsewhere)
    assert "tokenizer.json: trained on other text" in str(caught.value)
    text.write_text(tiny_corpus.read_text())
    assert len(make(base=elsewhere).runs) == 6


def test_variants_with_other_tokens_or_validation_raise(make: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match=r"variants\.sine: its tokenizer is not swiglu's"):
        make("{mlp: sine}", "{mlp: sine}, data: {tokenizer: tokenizers}")
    with pytest.raises(ConfigError, match=r"variants\.sine: its (validation text|tokenizer) is not swiglu's"):
        make("{mlp: sine}", "{mlp: sine}, data: {seed: 4}")


def test_headline_states_inconclusive_difference() -> None:
    def variant(name: str, mean: float, half: float | None) -> VariantFigures:
        low, high = (None, None) if half is None else (mean - half, mean + half)
        difference = PairedDifference(mean, half, low, high, n=1 if half is None else 3, baseline_mean=2.0)
        return replace(kept.variants[0], name=name, difference=difference)

    def of(*variants: VariantFigures) -> str:
        headline = study_headline(replace(kept, variants=list(variants)))
        assert headline is not None
        return headline.of

    kept = read_figures(StudyMetrics, read_json(KEPT))
    assert "no claim" in of(variant("sine", -0.1, None))
    assert "not shown to differ" in of(variant("sine", -0.1, 0.2))
    assert of(variant("sine", -0.1, 0.05)) == "5.0 % less; 95 %: −0.150 to −0.0500, 3 seeds"
    assert "the lowest of 2 variants, not corrected" in of(variant("sine", -0.1, 0.05), variant("other", 0.1, 0.05))


def test_resumed_run_status_is_not_failed(make: Callable[..., Study]) -> None:
    run = make().runs[0]
    run.log_path.parent.mkdir(parents=True, exist_ok=True)
    run.log_path.write_text("error: no space left\n")
    assert read_status(run).state == "failed"
    process = launch(run, {})
    process.terminate()
    while process.poll() is None:
        time.sleep(0.02)
    assert read_status(run).state == "new"


def test_run_is_done_once_its_last_model_is_saved(make: Callable[..., Study]) -> None:
    """The last validation is logged before the save: a run killed between them resumes, and counts for nothing."""
    study = make()
    write_configs(study)
    run = study.runs[0]
    train_here(run, {})
    assert read_status(run).state == "done"
    (run.folder / "status.json").unlink()
    assert read_status(run).state == "done", "killed after the save"
    latest = run.folder / "latest"
    shutil.rmtree(run.folder / latest.read_text().strip())
    latest.unlink()
    assert read_status(run).state == "stopped"
    write_status(run.folder, RunStatus.FAILED, "no space left")
    assert (read_status(run).state, read_status(run).reason) == ("failed", "no space left")
    write_status(run.folder, RunStatus.FINISHED)
    assert read_status(run).state == "done", "its checkpoints were deleted afterwards"
    (run.folder / "status.json").unlink()
    system = json.loads((run.folder / "system.json").read_text())
    del system[CODE_KEY]
    (run.folder / "system.json").write_text(json.dumps(system))
    assert read_status(run).state == "done", "of a version that did not record how runs end"


def test_conditions_show_modified_and_changed_code(finished: Study) -> None:
    systems: list[dict[str, Any]] = [
        {"commit": "0123456789abcdef", CODE_KEY: ["a" * 64]},
        {"commit": "0123456789abcdef+", CODE_KEY: ["a" * 64, "b" * 64]},
        {},
    ]
    record = RunRecord(Path(), "run", {}, {}, [], [], None, None, None, ())
    states = [RunState(finished.runs[0], "done", record=replace(record, system=system)) for system in systems]
    found = conditions(states)
    assert found["commit"] == {"0123456789ab": 1, "0123456789ab+": 1, "unknown": 1}
    assert found[CODE_KEY] == {"a" * 12: 1, f"{'a' * 12} then {'b' * 12}": 1, "unknown": 1}


@pytest.mark.slow
def test_folder_of_another_study_is_refused(make: Callable[..., Study]) -> None:
    study = make()
    run_all(study, launcher=lambda run, environment: Ended(1))
    with pytest.raises(TrainingError, match="no run of the study"):
        study_figures(study)
    with pytest.raises(ConfigError, match=r"swiglu_lr0.001_seed1: was trained with other settings: train.weight_decay"):
        make("variants:", "overrides: {train: {weight_decay: 0.5}}\nvariants:")
    assert len(make("[1, 2]", "[1, 2, 3]").runs) == 9


def test_plan_tables_list_all_runs_without_writing(make: Callable[..., Study]) -> None:
    study = make()
    seconds = {run.variant.variant.name: seconds_per_step(run, study) for run in study.runs[:3]}
    assert all(value > 0 for value in seconds.values())
    variants, runs = plan_tables(study, {"swiglu": 2.0, "sine": 3.0})
    n_steps = study.variants[0].n_steps
    assert [row[4] for row in runs.rows[:3]] == [f"{n_steps * s:,.0f}" for s in (2, 2, 3)]
    assert f"{(4 * 2 + 2 * 3) * n_steps / 60:,.1f} minutes" in runs.note
    assert len(variants.rows) == 2
    assert not study.folder.exists()
