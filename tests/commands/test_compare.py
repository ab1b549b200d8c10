"""psannlm compare: what a plan would take, and what is wrong with one."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from psannlm.commands.compare import _rich
from psannlm.reports.page_model import Table

PLAN = """\
base: config.yaml
budget: {tokens: 128}
baseline: swiglu
variants:
  swiglu: {model: {base: transformer, mlp: swiglu}}
  sine: {model: {base: transformer, mlp: sine}}
"""


def test_compare_dry_run_writes_nothing(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    before = sorted(project.rglob("*"))
    done = psannlm("compare", "plan.yaml", "--dry-run", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["runs"] == ["swiglu_lr0.01_seed1337", "sine_lr0.01_seed1337"]
    assert told["variants"]["sine"]["was_solved"]
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("mlp: sine", "mpl: sine", 2, "did you mean 'mlp'"),
        ("base: config.yaml", "base: nowhere.yaml", 2, "nowhere.yaml: no such file"),
        ("mlp: sine", "mlp: sine, d_mlp: 999", 2, "against swiglu's"),
    ],
)
def test_compare_invalid_plan_fails_before_training(
    psannlm, project: Path, old: str, new: str, code: int, words: str
) -> None:
    Path("plan.yaml").write_text(PLAN.replace(old, new))
    done = psannlm("compare", "plan.yaml")
    assert (done.code, "Traceback" in done.err) == (code, False)
    assert words in done.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_compare_no_train_reports_finished_runs(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    assert psannlm("compare", "plan.yaml", "--no-train").code == 1  # no run is done: no figures
    _train_swiglu(psannlm, "model.mlp=swiglu")

    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    done = psannlm("compare", "plan.yaml", "--no-train", "--json", "--out", "results")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert [run["state"] for run in told["runs"]] == ["done", "new"]
    assert "1 of 2 runs are not done yet." in told["notes"]
    assert told == {**json.loads(Path("results/metrics.json").read_text()), "folder": "results"}
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before

    # On another machine, from the report alone.
    reused = ("compare", "plan.yaml", "--no-train", "--study", "other", "--reuse", "results")
    told = json.loads(psannlm(*reused, "--out", "again", "--json").out)
    assert [(run["state"], run["reused_from"]) for run in told["runs"]] == [("done", "results"), ("new", None)]
    assert Path("again/runs.jsonl").read_text().count("\n") == 1


def test_compare_reuse_of_nothing_is_refused(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    done = psannlm("compare", "plan.yaml", "--reuse", "nowhere")
    assert (done.code, "--reuse nowhere: no such report or study folder" in done.err) == (2, True), done.err
    assert not Path("runs").exists()


def _train_swiglu(psannlm, *others: str) -> None:
    told = json.loads(psannlm("compare", "plan.yaml", "--dry-run", "--json").out)["variants"]["swiglu"]
    settings = [
        "model.base=transformer",
        f"model.d_mlp={told['d_mlp']}",
        f"train.max_steps={told['n_steps']}",
        "train.lr=0.01",
        "train.checkpoint_dir=runs/plan/swiglu_lr0.01_seed1337",
        *others,
    ]
    made = psannlm("train", "config.yaml", *(word for each in settings for word in ("--set", each)))
    assert made.code == 0, made.err


@pytest.mark.slow
@pytest.mark.parametrize("other", ["model.mlp=gelu", "train.max_steps=9", "train.weight_decay=0.3"])
def test_compare_refuses_runs_of_another_plan(psannlm, project: Path, other: str) -> None:
    Path("plan.yaml").write_text(PLAN)
    _train_swiglu(psannlm, "model.mlp=swiglu", other)
    for flag in ("--no-train", "--dry-run"):
        done = psannlm("compare", "plan.yaml", flag)
        assert (done.code, f"was trained with other settings: {other.split('=')[0]}: " in done.err) == (2, True), (
            done.err
        )


@pytest.mark.slow
def test_compare_refuses_run_without_settings(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    _train_swiglu(psannlm, "model.mlp=swiglu")
    Path("runs/plan/swiglu_lr0.01_seed1337/config.yaml").unlink()
    done = psannlm("compare", "plan.yaml", "--no-train")
    assert (done.code, "holds a run without its config.yaml" in done.err) == (2, True), done.err


def test_compare_dry_run_excludes_no_train(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    done = psannlm("compare", "plan.yaml", "--no-train", "--dry-run")
    assert (done.code, "use only one of them" in " ".join(done.err.split())) == (2, True)


def test_compare_narrow_terminal_folds_figures() -> None:
    rows = [["a_long_name", "22,500,582", "1,115,264"]]
    table = Table("t", ("variant", "tokens", "parameters"), rows, frozenset({1, 2}))
    console = Console(width=24, record=True, file=io.StringIO())
    console.print(_rich(table))
    said = console.export_text()
    assert "…" not in said
    assert sorted(re.sub(r"\D", "", said)) == sorted("22500582" + "1115264")


@pytest.mark.slow
def test_compare_divergence_is_result_but_failure_error(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN.replace("budget:", "learning_rates: [1e-2, 1e25]\nbudget:"))
    _train_swiglu(psannlm, "model.mlp=swiglu")
    done = psannlm("compare", "plan.yaml", "--only", "swiglu", "--out", "results")
    assert done.code == 0, done.err
    states = {run["run"]: run["state"] for run in json.loads(Path("results/metrics.json").read_text())["runs"]}
    assert states == {
        "swiglu_lr0.01_seed1337": "done",
        "swiglu_lr1e+25_seed1337": "diverged",
        "sine_lr0.01_seed1337": "new",
        "sine_lr1e+25_seed1337": "new",
    }

    Path("plan.yaml").write_text(PLAN)
    Path("runs/plan/sine_lr0.01_seed1337").write_text("a file where the run's folder should be")
    done = psannlm("compare", "plan.yaml", "--out", "others")
    assert (done.code, "Traceback" in done.err) == (1, False), done.err
    assert "1 of 2 runs failed, the first: sine_lr0.01_seed1337: " in done.err
    assert "the same command retries these runs" in done.err
    assert Path("others/table.txt").is_file(), "what there is has been written all the same"


def test_compare_dry_run_of_one_variant(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    told = json.loads(psannlm("compare", "plan.yaml", "--dry-run", "--only", "sine", "--json").out)
    assert told["runs"] == ["sine_lr0.01_seed1337"]


def test_compare_unknown_variant_is_refused(psannlm, project: Path) -> None:
    Path("plan.yaml").write_text(PLAN)
    done = psannlm("compare", "plan.yaml", "--only", "sin")
    assert (done.code, "did you mean 'sine'" in done.err) == (2, True), done.err
    assert not Path("runs").exists()


def test_compare_more_jobs_than_gpus_is_refused(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path("config.yaml").read_text()
    Path("config.yaml").write_text(config.replace("device: cpu", "device: auto"))
    Path("plan.yaml").write_text(PLAN)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    done = psannlm("compare", "plan.yaml", "--jobs", "8")
    assert (done.code, "there are 2 GPUs (3, 5); use --jobs 2, or --share-gpus" in done.err) == (2, True), done.err
    done = psannlm("compare", "plan.yaml", "--gpus", "0")
    assert (done.code, "CUDA_VISIBLE_DEVICES lists 3, 5" in done.err) == (2, True), done.err
    assert not Path("runs").exists()
