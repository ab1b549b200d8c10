"""File names that are not UTF-8: every command reads and writes them, and what was written leads back to the file."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psannlm.benchmarks.tokenization import bench
from psannlm.commands.app import build_app, main
from psannlm.config.run import config_from_mapping, load_config
from psannlm.data.corpus.documents import parquet_texts
from psannlm.data.manifest import read_manifest
from psannlm.errors import ConfigError
from psannlm.io.figures import render_figure
from psannlm.models.artifact import load_model, save_model

NAME = os.fsdecode(b"caf\351")
ESCAPED = "caf\\udce9"  # in JSON and YAML
SHOWN = "caf\\xe9"  # on terminals, pages and pictures


@pytest.fixture
def folder(project: Path) -> Path:
    """The folder ``caf\\351`` in the working folder, where every file has such a name."""
    here = Path(NAME)
    try:
        here.mkdir()
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    (project / "corpus.txt").rename(here / f"{NAME}.txt")
    (here / f"{NAME}.jsonl").write_text('{"text": "another document, of one line"}\n', encoding="utf-8")
    with gzip.open(here / f"{NAME}.txt.gz", "wt", encoding="utf-8") as packed:
        packed.write("a third document that was packed\n")
    config = (project / "config.yaml").read_text(encoding="utf-8").replace("max_steps: 4", "max_steps: 2")
    config = config.replace("corpus.txt", f'"{ESCAPED}/{ESCAPED}.txt"').replace("runs/tiny", f'"runs/{ESCAPED}"')
    (here / f"{NAME}.yaml").write_text(config, encoding="ascii")
    (here / f"{NAME}.prompts").write_text("The \n", encoding="utf-8")
    return here


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for inner in value.values() for text in strings_in(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in strings_in(inner))
    elif isinstance(value, str):
        yield value


@pytest.mark.slow
def test_commands_take_and_write_undecodable_names(psannlm, folder: Path) -> None:
    def done(*words: str | Path) -> dict[str, object]:
        ended = psannlm(*map(str, words), "--json")
        assert (ended.code, "unexpected" in ended.err, "no picture" in ended.err) == (0, False, False), ended.err
        answer: dict[str, object] = json.loads(ended.out)
        return answer

    tokenizer, text = folder / f"{NAME}.json", folder / f"{NAME}.txt"
    assert done("tokenize", folder, "--backend", "simple", "--out", tokenizer)["file"] == str(tokenizer)
    assert psannlm("tokenize", "--model", str(tokenizer), "--file", f"{text}.gz", "--ids").code == 0
    parts = [folder / f"{NAME}.part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        words = ("--tokenizer", tokenizer, "--per-line", "--workers", "1", "--part", f"{number}/2", "--out", part)
        done("prep", text, folder / f"{NAME}.jsonl", *words)
        assert [source.path for source in read_manifest(part).sources] == [str(text), str(folder / f"{NAME}.jsonl")]
    merged = folder / f"{NAME}.merged"
    assert done("prep", *parts, "--merge", "--out", merged)["folder"] == str(merged)
    config, run, other = folder / f"{NAME}.yaml", Path("runs") / NAME, Path("runs") / f"{NAME}2"
    assert done("train", config)["folder"] == str(run)
    # The same command reads back what the first one wrote of the names.
    assert done("train", config)["steps"] == 2
    sources = ("--set", f"data.sources=[{merged}]", "--set", "data.val_split=0", "--set", "data.tokenizer=auto")
    done("train", config, *sources, "--set", "train.eval_interval_steps=null", "--out", other)
    prompts = ("--prompts-file", folder / f"{NAME}.prompts", "--max-new-tokens", "2", "--device", "cpu")
    assert done("generate", "--checkpoint", run, *prompts)["checkpoint"] == str(run / "step_00000002")
    assert done("eval", text, "--checkpoint", run, "--device", "cpu", "--out", f"{NAME}.eval")["files"] == [str(text)]
    if importlib.util.find_spec("transformers") is not None:
        exported, imported = f"{NAME}.exported", f"{NAME}.safetensors"
        assert done("export", run, "--out", exported, "--no-verify")["folder"] == exported
        assert done("import", exported, "--out", imported)["file"] == imported
    done("report", "--reports", ".", "--out", f"{NAME}.report")
    done("report", "--compare", run, other, "--out", f"{NAME}.versus")
    for page in (f"{NAME}.report", f"{NAME}.versus"):
        assert SHOWN in (Path(page) / "report.html").read_text(encoding="utf-8")
    # What the files say leads to the files, for psannlm and for every other reader of JSON.
    recorded = [path for path in Path().rglob("*.json") if path.name in ("metrics.json", "plan.json", "manifest.json")]
    texts = [text for path in recorded for text in strings_in(json.loads(path.read_bytes()))]
    named = [text for text in texts if text.startswith(f"{NAME}/")]
    assert len(named) > 10
    assert [name for name in named if not os.path.lexists(name)] == []


@pytest.mark.slow
def test_study_and_tokenizer_benchmark_take_undecodable_names(
    psannlm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "KINDS", {"characters": bench.KINDS["characters"]})
    plan = folder / f"{NAME}.plan.yaml"
    plan.write_text(
        f'base: "{ESCAPED}.yaml"\nbudget: {{tokens: 128}}\nseeds: [1]\nlearning_rates: [1e-3]\n'
        "baseline: one\nvariants: {one: , two: {model: {mlp: gelu}}}\n",
        encoding="ascii",
    )
    assert psannlm("compare", str(plan), "--study", f"runs/{NAME}", "--out", f"{NAME}.study").code == 0
    words = ("--corpus", str(folder / f"{NAME}.txt"), "--held-out", str(folder / f"{NAME}.jsonl"))
    options = ("--vocab-size", "300", "--repeats", "1", "--out", f"{NAME}.tokenizers")
    ended = psannlm("bench-tokenizers", *words, *options)
    assert (ended.code, "no picture" in ended.err) == (0, False), ended.err


def test_undecodable_names_print_on_strict_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the locale has UTF-8, standard output refuses what UTF-8 cannot hold."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as ended:
        main(["tokenize", str(folder), "--backend", "simple", "--out", str(folder / f"{NAME}.json")])
    sys.stdout.flush()
    assert not ended.value.code
    assert f"{SHOWN}.json" in written.getvalue().decode("utf-8")


def test_parquet_and_model_files_open_by_undecodable_names(folder: Path, build_tiny) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = Path("plain.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), table)
    table.rename(folder / f"{NAME}.parquet")
    assert list(parquet_texts(str(folder / f"{NAME}.parquet"), "text")) == [(1, "one", 0), (2, "two", 0)]
    model = build_tiny()
    save_model(folder / f"{NAME}.safetensors", model, None)
    loaded = load_model(folder / f"{NAME}.safetensors").model.state_dict()
    assert all(bool((loaded[name] == tensor).all()) for name, tensor in model.state_dict().items())


def test_overrides_and_python_take_undecodable_names(folder: Path) -> None:
    text = folder / f"{NAME}.txt"
    by_option = load_config(folder / f"{NAME}.yaml", [f"data.sources=[{text}]", f"train.checkpoint_dir=runs/{NAME}"])
    settings = {"data": {"sources": [text], "val_split": 0.2}, "train": {"checkpoint_dir": Path("runs") / NAME}}
    for config in (by_option, config_from_mapping(settings)):
        assert [getattr(source, "path", None) for source in config.data.sources] == [str(text)]
        assert config.train.checkpoint_dir == f"runs/{NAME}"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="which no path can hold"):
        config_from_mapping({"train": {"checkpoint_dir": name}})


def test_pictures_show_undecodable_names_escaped() -> None:
    def draw(name: str) -> Callable[[], object]:
        def figure() -> object:
            from matplotlib.figure import Figure

            drawn = Figure(figsize=(3, 2))
            axes = drawn.subplots()
            axes.plot([1, 2], [3, 4], label=name)
            axes.legend()
            axes.set_title(name)
            axes.set_xticks([1, 2], [name, "b"])
            return drawn

        return figure

    assert render_figure(draw(NAME)) == render_figure(draw(SHOWN))  # type: ignore[arg-type]


def test_init_undecodable_names_lead_to_the_text(psannlm, folder: Path) -> None:
    text = folder / f"{NAME}.long.txt"
    text.write_text("The tide comes in twice a day and goes out again.\n" * 60, encoding="utf-8")
    ended = psannlm("init", str(folder / "new"), "--data", str(text), "--size", "tiny")
    assert ended.code == 0, ended.err
    (source,) = load_config(folder / "new" / "config.yaml").data.sources
    assert source.path == str(text)


def test_undecodable_names_cover_every_command() -> None:
    """A new command must get its test of names, or its place among those that take no files of the user's."""
    tried = {"init", "tokenize", "prep", "train", "generate", "eval", "report", "compare", "bench-tokenizers"}
    tried |= {"export", "import"}
    tried |= {"serve", "bench-serve"}  # tests/commands/test_serve.py; bench-serve starts serve on the file
    takes_none = {"bench-train", "bench-kv", "gpu-validate", "schema"}
    assert {str(command.name) for command in build_app().registered_commands} == tried | takes_none
