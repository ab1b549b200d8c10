"""psannlm train: what is written, said and answered."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest


@pytest.mark.slow
def test_train_writes_its_run_and_prints_the_folder(psannlm, project: Path) -> None:
    done = psannlm("train", "config.yaml")
    assert done.code == 0
    run = project / "runs" / "tiny"
    written = {path.name for path in run.iterdir()}
    assert {
        "step_00000004",
        "latest",
        "best",
        "metrics.jsonl",
        "loss_curve.png",
        "config.yaml",
        "system.json",
    } <= written
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(row["bits_per_byte"] for row in rows if row["kind"] == "eval")
    assert f"{best:.4f}" in done.out
    assert "runs/tiny" in done.out
    assert "psannlm generate" in done.out
    assert "step 4/4" in done.err  # plain lines where there is no terminal
    assert "left" in done.err


@pytest.mark.slow
def test_json_prints_one_document_and_nothing_else(psannlm, project: Path) -> None:
    done = psannlm("train", "config.yaml", "--json")
    result = json.loads(done.out)
    assert result["steps"] == 4
    assert result["best"]["bits_per_byte"] > 0
    assert Path(result["checkpoint"]).is_dir()


@pytest.mark.slow
def test_set_and_out_override_the_file(psannlm, project: Path) -> None:
    done = psannlm("train", "config.yaml", "--set", "train.max_steps=2", "--out", "elsewhere, here", "--json")
    assert json.loads(done.out)["steps"] == 2
    assert (project / "elsewhere, here" / "step_00000002").is_dir()
    assert not (project / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["it's", 'a "b"', "back\\slash", "[/b] [red]x", "wörter 中", "a: #b", "$x_{$"])
def test_out_takes_any_name_and_shows_it(psannlm, project: Path, name: str) -> None:
    done = psannlm("train", "config.yaml", "--set", "train.max_steps=1", "--out", name)
    assert done.code == 0, done.err
    assert (project / name / "step_00000001").is_dir()
    assert name in done.out


@pytest.mark.slow
def test_the_next_command_finds_the_model(psannlm, project: Path) -> None:
    for out in ("elsewhere, here", "runs/inside"):
        told = psannlm("train", "config.yaml", "--set", "train.max_steps=1", "--out", out).out
        [command] = [line for line in told.splitlines() if line.startswith("next: psannlm ")]
        found = psannlm(*shlex.split(command)[2:], "--max-new-tokens", "2", "--device", "cpu", "--json")
        assert json.loads(found.out)["checkpoint"] == f"{out}/step_00000001"


@pytest.mark.slow
def test_train_ends_at_time_budget_or_step_count(psannlm, project: Path) -> None:
    spent = psannlm("train", "config.yaml", "--time-budget", "0.001s")
    assert spent.code == 0
    assert "the time budget is spent after step 1 of 4; saved in runs/tiny" in spent.err
    assert "1 of 4: the time budget is spent" in spent.out
    assert (project / "runs" / "tiny" / "step_00000001").is_dir()
    result = json.loads(psannlm("train", "config.yaml", "--time-budget", "1h30m", "--json").out)
    assert (result["steps"], result["total_steps"]) == (4, 4)
    assert json.loads(psannlm("train", "config.yaml", "--max-steps", "3", "--out", "b", "--json").out)["steps"] == 3


@pytest.mark.slow
def test_samples_are_printed_on_the_way(psannlm, project: Path) -> None:
    said = psannlm("train", "config.yaml", "--set", "train.sample_prompts=[The tide]").err
    assert "sample at step 2: The tide" in said
    assert "sample at step 4: The tide" in said


def test_one_rank_of_several_prints_the_result(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psannlm.training import run

    monkeypatch.setattr(run, "train", lambda *arguments, **options: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert psannlm("train", "config.yaml", "--json").out == ""


@pytest.mark.slow
def test_dry_run_writes_nothing_and_adds_up(psannlm, project: Path) -> None:
    before = sorted(path.name for path in project.rglob("*"))
    plan = json.loads(psannlm("train", "config.yaml", "--dry-run", "--json").out)
    assert sorted(path.name for path in project.rglob("*")) == before
    assert plan["n_parameters"] == sum(plan["parameters"].values())
    assert plan["memory"]["total"] == sum(v for k, v in plan["memory"].items() if k != "total")
    assert plan["tokens_per_step"] == 64
    trained = json.loads(psannlm("train", "config.yaml", "--json").out)
    assert plan["n_parameters"] == trained["parameters"]
    assert plan["n_steps"] == trained["steps"]


def test_dry_run_prints_the_configuration_and_the_table(psannlm, project: Path) -> None:
    done = psannlm("train", "config.yaml", "--dry-run")
    assert "positional_encoding: rope" in done.out
    for resolved in ("mlp: sineglu", "d_mlp: 64", "vocab_size: 260", "max_seq_len: 16", "enabled: true"):
        assert f"  {resolved}\n" in done.out
    assert "FLOPs per token" in done.out
    assert "memory: total" in done.out


@pytest.mark.slow
def test_train_same_command_resumes_the_run(psannlm, project: Path) -> None:
    assert psannlm("train", "config.yaml").code == 0
    again = psannlm("train", "config.yaml")
    assert again.code == 0
    assert "resuming from" in again.err
    assert "step 4 of 4" in again.err


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(psannlm, project: Path) -> None:
    psannlm("train", "config.yaml")
    refused = psannlm("train", "config.yaml", "--set", "model.d_model=32")
    assert refused.code == 2
    assert "model.d_model: 16 -> 32" in refused.err
    assert "--resume never" in refused.err
    anew = psannlm("train", "config.yaml", "--set", "model.d_model=32", "--resume", "never")
    assert anew.code == 0
    assert len(list((project / "runs").glob("tiny_until_*"))) == 1


def test_every_problem_is_named_at_once(psannlm, project: Path) -> None:
    (project / "bad.yaml").write_text(
        "model: {base: wavresnet, n_heads: 5}\ndata: {sources: [corpse.txt], max_lenght: 32}\ntrain: {lr: fast}\n"
    )
    refused = psannlm("train", "bad.yaml")
    assert refused.code == 2
    for said in ("model.base", "waveresnet", "n_heads", "corpse.txt", "corpus.txt", "max_length", "train.lr", "fast"):
        assert said in refused.err
    assert "Traceback" not in refused.err
    assert not (project / "runs").exists()


@pytest.mark.parametrize("text", ["", "   \n \n"])
def test_a_corpus_without_text_is_refused(psannlm, project: Path, text: str) -> None:
    (project / "corpus.txt").write_text(text)
    refused = psannlm("train", "config.yaml")
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()[-1]) > 20
    assert "Traceback" not in refused.err


def test_bytes_not_utf8_are_refused_with_their_position(psannlm, project: Path) -> None:
    (project / "corpus.txt").write_bytes(b"plain text, then \xe9 in Latin-1\n")
    refused = psannlm("train", "config.yaml", "--set", "data.sources=[corpus.txt]")
    assert refused.code == 2
    assert "corpus.txt" in refused.err
    assert "17" in refused.err


@pytest.mark.slow
def test_a_corpus_shorter_than_one_window_is_trained_on(psannlm, project: Path) -> None:
    overrides = ["--set", "data.max_length=5000", "--set", "train.batch_tokens=5000", "--max-steps", "1"]
    done = psannlm("train", "config.yaml", *overrides)
    assert done.code == 0, done.err
    assert "padded to data.max_length 5,000" in done.err


def test_a_traceback_is_shown_only_with_debug(psannlm, project: Path) -> None:
    from psannlm.commands.app import main
    from psannlm.errors import ConfigError

    assert psannlm("train", "missing.yaml").code == 2
    with pytest.raises(ConfigError):
        main(["train", "missing.yaml", "--debug"])
