"""psannlm eval: figures agree with training, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from psannlm.commands.options import LiveLine
from psannlm.errors import StorageError


@pytest.fixture
def in_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_eval_figures_are_consistent_with_the_text(psannlm, in_trained: Path, tmp_path: Path) -> None:
    text = "The sea is never late.\nThe tide is.\n"
    (tmp_path / "a.txt").write_text(text)
    out = tmp_path / "out"
    done = psannlm("eval", str(tmp_path / "a.txt"), "--device", "cpu", "--out", str(out), "--json")
    assert done.code == 0
    figures = json.loads(done.out)
    assert figures["bytes"] == len(text)
    assert figures["tokens"] == len(text) + 1  # a character each, and the end of text
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] * figures["tokens"] / math.log(2) / figures["bytes"]
    )
    written = json.loads((out / "metrics.json").read_text())
    assert written["loss"] == figures["loss"]
    assert "python" in json.loads((out / "system.json").read_text())
    assert f"{figures['bits_per_byte']:.4f}" in (out / "table.txt").read_text()


def test_eval_reproduces_validation_of_training(psannlm, in_trained: Path, tmp_path: Path) -> None:
    from psannlm.config.run import load_config
    from psannlm.data.corpus.documents import read_documents
    from psannlm.data.prepare import split_documents

    config = load_config("config.yaml").data
    _, held_out = split_documents(list(read_documents(config.sources)), config.val_split, config.seed)
    (tmp_path / "held_out.txt").write_text("\n".join(document.text for document in held_out))
    done = psannlm(
        "eval", str(tmp_path / "held_out.txt"), "--per-line", "--device", "cpu", "--out", str(tmp_path / "o"), "--json"
    )
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    best = min(row["loss"] for row in rows if row["kind"] == "eval")
    assert json.loads(done.out)["loss"] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("out", ["config.yaml/below", "config.yaml", "/proc/nothing", "n" * 256])
def test_eval_refuses_unwritable_out_before_work(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr("psannlm.evaluation.loss.evaluate_sources", lambda *arguments, **options: pytest.fail("worked"))
    done = psannlm("eval", "corpus.txt", "--device", "cpu", "--out", out)
    assert done.code == 1
    assert done.err.startswith(("error: could not write", "error: not allowed to write"))
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_eval_prints_figures_when_the_disk_is_full(
    psannlm, in_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def fail(path: Path, content: object) -> None:
        raise StorageError(f"no room to write {path}")

    monkeypatch.setattr("psannlm.io.run_metadata.write_json", fail)
    options = ["--device", "cpu", "--out", str(tmp_path / "out"), *(["--json"] if as_json else [])]
    done = psannlm("eval", "corpus.txt", *options)
    assert done.code == 1
    assert "error: no room to write" in done.err
    assert "perplexity" in done.out


def test_eval_missing_file_exits_2(psannlm, in_trained: Path) -> None:
    refused = psannlm("eval", "corpse.txt")
    assert refused.code == 2
    assert "corpus.txt" in refused.err
    assert not Path("reports").exists()


def test_eval_rejects_window_longer_than_context(psannlm, in_trained: Path) -> None:
    refused = psannlm("eval", "corpus.txt", "--window", "17")
    assert refused.code == 2
    assert "16" in refused.err
    assert "--window" in psannlm("eval", "corpus.txt", "--window", "0").err


def test_eval_progress_is_plain_lines_without_a_terminal(
    psannlm, in_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveLine, "_REDRAW_S", 0.0)
    done = psannlm("eval", "corpus.txt", "--device", "cpu", "--batch-size", "2", "--out", str(tmp_path))
    assert done.err.splitlines()[0].startswith("evaluating: 2 of ")
    assert " left" in done.err
    assert all(done.err.splitlines())
    assert "1 document, " in done.out


def test_eval_error_names_the_option(psannlm, in_trained: Path) -> None:
    refused = psannlm("eval", "corpus.txt", "--amp", "bf61", "--device", "gpu")
    assert refused.code == 2
    assert "--amp: bf61 is not one of" in refused.err.replace("'", "")
    assert "--device: " in refused.err
    assert "train." not in refused.err


def test_eval_dtype_changes_loss_little_and_is_recorded(psannlm, in_trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The sea is never late.\nThe tide is.\n")

    def loss(*options: str) -> float:
        done = psannlm("eval", str(tmp_path / "a.txt"), "--device", "cpu", "--json", *options)
        assert done.code == 0
        figures = json.loads(done.out)
        assert figures["dtype"] == (options[1] if options else "float32")
        return float(figures["loss"])

    plain, packed = loss(), loss("--dtype", "int8")
    assert packed != plain
    assert packed == pytest.approx(plain, rel=0.02)
    assert psannlm("eval", str(tmp_path / "a.txt"), "--dtype", "int8", "--amp", "bf16", "--device", "cpu").code == 2


def test_eval_tasks_writes_scores_with_chance_and_error(psannlm, in_trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = "psannlm_agreement,psannlm_modular_addition"
    limited = ("--limit", "4", "--device", "cpu", "--out", str(out), "--json")
    done = psannlm("eval", "--tasks", names, *limited)
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    agreement, addition = printed["tasks"]
    assert (agreement["task"], agreement["metric"], agreement["chance"], agreement["n"]) == (
        "psannlm_agreement",
        "accuracy",
        0.5,
        4,
    )
    assert 0 <= agreement["value"] <= 1
    assert (addition["n"], addition["chance"], addition["stderr"]) == (89, 1 / 89, None)
    written = json.loads((out / "tasks.json").read_text())
    assert written["tasks"] == printed["tasks"]
    assert "python" in json.loads((out / "system.json").read_text())
    assert f"{addition['value']:.4f}" in (out / "table.txt").read_text()


def test_eval_tasks_ranks_a_model_not_above_itself(psannlm, in_trained: Path, tmp_path: Path) -> None:
    same = ("--checkpoint", "runs/tiny", "--baseline", "runs/tiny")
    done = psannlm(
        "eval",
        "--tasks",
        "psannlm_agreement,psannlm_number",
        "--limit",
        "20",
        *same,
        "--out",
        str(tmp_path / "o"),
        "--json",
    )
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert [row["verdict"] for row in figures["comparison"]] == ["undecided"] * 2
    assert [row["difference"] for row in figures["comparison"]] == [0.0] * 2
    assert figures["baseline"]["tasks"] == figures["tasks"]
    table = psannlm(
        "eval",
        "--tasks",
        "psannlm_agreement,psannlm_number",
        "--limit",
        "20",
        *same,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "p"),
    )
    assert "undecided" in table.out


def test_eval_tasks_takes_last_words_from_the_files(psannlm, in_trained: Path, tmp_path: Path) -> None:
    words = "harbor winter morning garden".split()
    names = "Anna Peter Alice George".split()
    text = [f"{name} had never before seen the {word}." for name, word in zip(names, words, strict=True)]
    (tmp_path / "held_out.txt").write_text(" ".join(text))
    out = ("--device", "cpu", "--out", str(tmp_path / "o"), "--json")
    done = psannlm("eval", str(tmp_path / "held_out.txt"), "--tasks", "psannlm_last_word", *out)
    (score,) = json.loads(done.out)["tasks"]
    assert (score["n"], score["chance"]) == (4, 0.25)
    # The context of the tiny model has 16 tokens.
    assert json.loads(done.out)["truncated"] == 16
    assert "16 answers were scored with a shortened context" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name files to evaluate on, or tasks with --tasks"),
        (("corpus.txt", "--limit", "3"), "it needs --tasks"),
        (("--tasks", "psannlm_agrement"), "there is no task 'psannlm_agrement' (did you mean 'psannlm_agreement'?)"),
        (("--tasks", ","), "no task is named"),
        (("--tasks", "psannlm_last_word"), "is cut from held-out text of your corpus; name its files as FILE"),
        (("--tasks", "psannlm_parity", "--num-fewshot", "2"), "psannlm_parity is asked without solved examples"),
        (("--tasks", "psannlm_parity", "--window", "8"), "it does not go with --tasks"),
        (("--tasks", "psannlm_parity", "--tasks-dir", "nowhere"), "no folder at nowhere"),
        (("--tasks", "psannlm_parity", "--baseline", "nowhere"), "at nowhere"),
    ],
)
def test_eval_tasks_wrong_usage_is_refused_before_work(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("psannlm.models.artifact.load_model", lambda path: pytest.fail("worked"))
    refused = psannlm("eval", *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert said in " ".join(refused.err.replace("│", " ").split())


@pytest.mark.slow
def test_train_and_eval_take_a_prepared_url(psannlm, project: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From text at a URL to the loss of the run on the folder at a URL, and on a text at one."""
    from psannlm.tokenizers.resolve import fit_tokenizer

    monkeypatch.setenv("PSANNLM_CACHE_DIR", str(project / "cache"))
    lines = (project / "corpus.txt").read_text().splitlines()
    fit_tokenizer(lines * 20, "tokenizers", 280).save(project / "t.json")
    s3.put_file("corpus.txt", "corpora/corpus.txt")
    arguments = ["--per-line", "--tokenizer", "t.json", "--val-split", "0.4", "--workers", "1"]
    done = psannlm("prep", "s3://corpora/corpus.txt", *arguments, "--out", "s3://corpora/shards")
    assert done.code == 0, done.err
    assert "data.sources=[s3://corpora/shards]" in done.out.replace('"', "")
    assert json.loads(s3.cat_file("corpora/shards/metrics.json"))["record"] == "prep"
    sources = ["--set", "data.sources=[s3://corpora/shards]", "--set", "data.val_split=0"]
    done = psannlm("train", "config.yaml", *sources, "--set", "data.tokenizer=auto")
    assert done.code == 0, done.err
    assert "s3://corpora/shards: copying" in done.err
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    best = min(row["loss"] for row in rows if row["kind"] == "eval")

    def loss_on(*files: str) -> float:
        done = psannlm("eval", *files, "--device", "cpu", "--out", "figures", "--json")
        assert done.code == 0, done.err
        return float(json.loads(done.out)["loss"])

    assert loss_on("s3://corpora/shards") == pytest.approx(best, abs=1e-5)
    assert loss_on("s3://corpora/corpus.txt", "--per-line") == loss_on("corpus.txt", "--per-line")


def test_eval_baseline_reports_difference_over_documents(psannlm, in_trained: Path, tmp_path: Path) -> None:
    """Against itself the difference is zero in every resample; against an untrained model it is that of the losses."""
    from psannlm.models.artifact import load_model, save_model

    arguments = ("eval", "corpus.txt", "--per-line", "--device", "cpu", "--json")
    same = psannlm(*arguments, "--baseline", "runs/tiny", "--out", str(tmp_path / "same"))
    found = json.loads(same.out)["comparison"]
    assert (found["mean"], found["low"], found["high"]) == (0.0, 0.0, 0.0)
    loaded = load_model(Path("runs/tiny") / Path("runs/tiny/best").read_text().strip())
    for parameter in loaded.model.parameters():
        parameter.data *= 0.5
    save_model(tmp_path / "other.safetensors", loaded.model, loaded.tokenizer)
    done = psannlm(*arguments, "--baseline", str(tmp_path / "other.safetensors"), "--out", str(tmp_path / "out"))
    figures = json.loads(done.out)
    found = figures["comparison"]
    assert found["loss"] > figures["loss"]
    assert found["mean"] == pytest.approx(figures["loss"] - found["loss"], abs=1e-5)
    assert found["low"] < found["mean"] < found["high"] < 0
    lines = Path("corpus.txt").read_text().splitlines()
    assert found["n_documents"] == len([line for line in lines if line.strip()])
    assert "bootstrap over" in (tmp_path / "out" / "table.txt").read_text()


def test_eval_activation_bits_are_printed_and_kept(psannlm, in_trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--device", "cpu", "--out", str(out))
    bits = ("--activations-bits", "8,4", "--activations-bits", "8", "--activations-places", "down,head")
    done = psannlm("eval", "corpus.txt", *options, *bits, "--activations-calibration-tokens", "40", "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    found = printed["activations"]
    kinds = list(dict.fromkeys(each["scale"] for each in found["losses"]))
    assert [(each["bits"], each["scale"]) for each in found["losses"]] == [(n, k) for n in (8, 4) for k in kinds]
    assert kinds[0] == "static"
    assert kinds[-1] == "dynamic"
    assert [place["place"] for place in found["places"] if place["is_quantized"]] == ["down", "head"]
    assert 32 < found["calibration_tokens"] <= 48  # three windows of 16 tokens
    assert found["tokens"] + found["calibration_tokens"] == printed["tokens"]
    for each in found["losses"]:
        assert each["difference"] == pytest.approx(each["loss"] - found["loss"], abs=1e-12)
        assert each["bits_per_byte"] / each["loss"] == pytest.approx(found["bits_per_byte"] / found["loss"])
    assert json.loads((out / "metrics.json").read_text())["activations"] == found
    table = (out / "table.txt").read_text()
    assert f"{found['losses'][0]['difference']:+.4f}" in table
    assert f"{found['places'][0]['max_over_rms']:.2f}" in table


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--activations-bits", "1"), "from 2 to 16"),
        (("--activations-bits", "8,x"), "activations of 'x' bits"),
        (("--activations-bits", "8", "--activations-places", "mlp"), "attention_output"),
        (("--activations-places", "down"), "needs --activations-bits"),
        (("--activations-bits", "8", "--dtype", "int8"), "--dtype"),
        (("--activations-bits", "8", "--baseline", "runs/tiny"), "--baseline"),
        (("--activations-bits", "8", "--activations-calibration-tokens", "1000000"), "fewer calibration tokens"),
    ],
)
def test_eval_refuses_activation_options_that_cannot_work(
    psannlm, in_trained: Path, options: tuple[str, ...], named: str
) -> None:
    refused = psannlm("eval", "corpus.txt", "--device", "cpu", *options)
    assert refused.code == 2
    assert named in " ".join(refused.err.split())
