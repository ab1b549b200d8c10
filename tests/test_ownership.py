"""No command harms a file that psannlm did not make: every writing command against a folder full of foreign files."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from psannlm.commands.app import build_app, main
from psannlm.config.run import load_config
from psannlm.data.corpus.files import find_files
from psannlm.errors import PsannlmError
from psannlm.experiments.plan import load_plan
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import StudyRun, size_study
from psannlm.gpu_suite.measures import at_most
from psannlm.io.records import write_record
from psannlm.prep.pipeline import PrepSettings, prepare_corpus
from psannlm.reports.schemas.gpu import CheckResult
from psannlm.tokenizers.char import CharTokenizer
from psannlm.training.run import train

CONFIG = """\
# my own words
model: {base: transformer, d_model: 16, n_layers: 1, n_heads: 2}
data: {sources: [{path: corpus.txt, per_line: true}], tokenizer: simple, max_length: 16, val_split: 0.2}
train: {max_steps: 2, batch_tokens: 64, amp: fp32, device: cpu, save_interval_steps: 1, keep_checkpoints: 1}
"""
RUN = "one_lr0.001_seed1"
PLAN = """\
base: config.yaml
budget: {tokens: 128}
seeds: [1]
learning_rates: [1e-3]
baseline: one
variants: {one: , two: {model: {mlp: gelu}}}
"""
FILES = (
    "study.json",
    f"{RUN}.yaml",
    f"{RUN}.log",
    ".lock",
    "best",
    "config.yaml",
    "latest",
    "loss_curve.png",
    "manifest.json",
    "metrics.json",
    "metrics.jsonl",
    "model.safetensors",
    "report.html",
    "report.md",
    "status.json",
    "stdout.log",
    "summary.json",
    "system.json",
    "table.txt",
    "tokenizer.json",
    "tokenizer.json.card.json",
    "tokenizer.model",
    "train_00000.safetensors",
    "validation_00000.safetensors",
    "plan.json",
    ".latest.12.tmp",
)
FOLDERS = (".work", "step_1", "step_00000001", "step_00000002", "tensorboard", ".psannlm-0123456789abcdef.tmp")


KINDS = ("file", "symlink", "hard link", "folder", "fifo")


def fill(folder: Path, shift: int) -> None:
    """Put a foreign entry at every name that a command may want to write; five shifts put every kind at every name."""
    folder.mkdir()
    victim = folder / "victim"
    victim.write_text("precious\n", encoding="utf-8")
    for number, name in enumerate(FILES):
        path, kind = folder / name, KINDS[(number + shift) % len(KINDS)]
        if kind == "file":
            path.write_text(f"my own {name}\n", encoding="utf-8")
        elif kind == "symlink":
            path.symlink_to(victim)
        elif kind == "hard link":
            path.hardlink_to(victim)
        elif kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "trainer.json").write_text("mine", encoding="utf-8")
        (folder / name / "piece_00000000").write_text("mine", encoding="utf-8")
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            os.utime(path, (1_000_000_000, 1_000_000_000))


def state_of(folder: Path) -> dict[str, object]:
    """Return what every entry below ``folder`` is and holds, links and FIFOs by themselves."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        mode = status.st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else b""
        found[str(path.relative_to(folder))] = (mode, status.st_ino, status.st_mtime_ns, status.st_nlink, content)
    return found


@dataclass(frozen=True)
class Ended:
    """How a command line ended, and what it said on stderr."""

    code: int
    err: str


def run(*words: str | Path) -> Ended:
    """Run a command line in this process."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(err):
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
    return Ended(int(ended.value.code or 0), err.getvalue())


class Done:
    """A run of a study, trained in this process when it was started."""

    def __init__(self, run: StudyRun, environment: Mapping[str, str]) -> None:
        train(load_config(run.config_path))

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        raise AssertionError("nothing is at work")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the user's with a corpus, a tokenizer, a trained run, and two prepared parts."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("config.yaml").write_text(CONFIG, encoding="utf-8")
        Path("plan.yaml").write_text(PLAN, encoding="utf-8")
        Path("corpus.txt").write_text("a line of text\nanother line of text\nand a third one\n" * 20, encoding="utf-8")
        Path("more.txt").write_text("one line more\nand the last of them\n", encoding="utf-8")
        CharTokenizer.fit(["a line of text"], 300).save("t.json")
        train(load_config("config.yaml", ["train.checkpoint_dir=run"]))
        study = size_study(load_plan(Path("plan.yaml")), Path("study"))
        run_all(study, launcher=Done, sleep=lambda seconds: None)
        for number in (1, 2):
            settings = PrepSettings(per_line=True)
            corpus, part = ["corpus.txt", "more.txt"], Path(f"part{number}")
            prepare_corpus(corpus, Path("t.json"), part, settings, n_workers=1, part=(number, 2))
    return folder


def _nothing_served(subject: Any, specs: Any, settings: Any, **_: Any) -> Any:
    from psannlm.benchmarks.serving.report import ServingReport

    return ServingReport(settings, subject, "cpu", 1, [], {})


@pytest.fixture
def cheap(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in ``made``, with the measured work replaced where it is not the subject."""

    def check(context: Any) -> CheckResult:
        return CheckResult("GPU-03", "throughput", (at_most("error", 0.0, 1.0, "x", "because"),))

    monkeypatch.chdir(made)
    monkeypatch.setattr("gc.collect", lambda *generation: 0)
    monkeypatch.setattr("psannlm.gpu_suite.suite.CHECKS", {"GPU-03": check})
    monkeypatch.setattr("psannlm.benchmarks.training.bench.matrix_peak", lambda *_, **__: lambda count: 1e9)
    monkeypatch.setattr("psannlm.benchmarks.decoding.bench.memory_reader", lambda *_, **__: lambda count: 1e9)
    monkeypatch.setattr("psannlm.benchmarks.serving.bench.bench_serve", _nothing_served)
    monkeypatch.setattr("psannlm.benchmarks.tokenization.bench.KINDS", {"characters": ("simple", None)})
    # The runs of a study end at once and fail: the files that the study itself writes are the subject.
    monkeypatch.setattr("psannlm.experiments.local_launcher.python_command", lambda *words, **options: ["true"])


KV = "--batch-size 2 --prompt-length 4 --max-new-tokens 5 --repeats 1 --no-context-growth"
TINY_MODEL = ("--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--vocab-size", "50", "--device", "cpu")
# Command, words before the folder, words after it. Those of the first table write into the folder itself.
WRITES_INTO: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("config.yaml", "--out"), ()),
    "train anew": (("config.yaml", "--resume", "never", "--out"), ()),
    "prep": (("corpus.txt", "--tokenizer", "t.json", "--per-line", "--workers", "1", "--out"), ()),
    "prep merge": (("part1", "part2", "--merge", "--out"), ()),
    "tokenize": (("corpus.txt", "--backend", "simple", "--per-line", "--out"), ("tokenizer.json",)),
    "init": (("--data", "corpus.txt"), ()),
    "compare study": (("plan.yaml", "--out", "results", "--study"), ()),
}
WRITES_BELOW: dict[str, tuple[str, ...]] = {
    "eval": ("corpus.txt", "--checkpoint", "run", "--device", "cpu", "--out"),
    "report": ("--runs", "run", "--out"),
    "report compare": ("--compare", "run", "run", "--out"),
    "compare": ("plan.yaml", "--no-train", "--study", "study", "--out"),
    "bench-train": (*TINY_MODEL, *"--seq-len 8 --batch-tokens 32 --steps 1 --amp fp32 --no-memory --out".split()),
    "bench-kv": (*TINY_MODEL, *KV.split(), "--out"),
    "bench-serve": (*TINY_MODEL, "--vocab-size", "300", "--out"),
    "bench-tokenizers": ("--corpus", "corpus.txt", "--per-line", "--vocab-size", "300", "--repeats", "1", "--out"),
    "gpu-validate": ("--device", "cpu", "--only", "GPU-03", "--out"),
}
# Those that write a whole folder or file at once, and refuse one that holds anything of somebody else's.
REFUSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "export": (("run", "--no-verify", "--out"), ()),
    "export force": (("run", "--no-verify", "--force", "--out"), ()),
    "import": (("exported", "--out"), ("model.safetensors",)),
}


def test_ownership_covers_every_command_with_out() -> None:
    """A new command that writes must get a line in one of the three tables."""
    group: Any = typer.main.get_command(build_app())
    writing = {
        name
        for name, command in group.commands.items()
        # The folder is an option, or of init the argument.
        if any({"--out", "--study", "folder"} & {*option.opts} for option in command.params)
    }
    tried = {name if name in group.commands else name.split(" ")[0] for name in (*WRITES_INTO, *WRITES_BELOW, *REFUSES)}
    assert tried == writing
    assert {*group.commands} - writing == {"generate", "schema", "serve"}


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("shift", range(len(KINDS)))
@pytest.mark.parametrize("name", WRITES_INTO)
def test_commands_harm_no_foreign_entry_in_out(name: str, shift: int, tmp_path: Path) -> None:
    """What is in the way is refused by name, one after the other, until nothing is; the rest is there to the end."""
    out, aside = tmp_path / "out", tmp_path / "aside"
    fill(out, shift)
    aside.mkdir()
    before, moved = state_of(out), set()
    head, tail = WRITES_INTO[name]
    for _ in before:
        ended = run(name.split(" ")[0], *head, out.joinpath(*tail))
        assert not {"unexpected", "Traceback"} & {*ended.err.replace(":", " ").split()}, ended.err
        now = {**state_of(out), **state_of(aside)}
        there = {key: now.get(key) for key in before}
        assert there == before
        if ended.code == 0 or "no run of the study is finished" in ended.err:
            break
        in_way = [path for path in out.iterdir() if re.search(re.escape(str(path)) + r"(?![\w.])", ended.err)]
        assert in_way, ended.err
        for path in in_way:
            # Once: a command must not leave behind what it then refuses itself.
            assert path.name not in moved, ended.err
            moved.add(path.name)
            os.rename(path, aside / path.name)
    else:
        pytest.fail(f"never done: {ended.err}")
    assert moved < {*FILES, *FOLDERS}


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("shift", range(len(KINDS)))
@pytest.mark.parametrize("name", REFUSES)
def test_export_and_import_refuse_foreign_entries(name: str, shift: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if not Path("exported").exists():
        assert run("export", "run", "--no-verify", "--out", "exported").code == 0
    out = tmp_path / "out"
    fill(out, shift)
    before = state_of(out)
    head, tail = REFUSES[name]
    ended = run(name.split(" ")[0], *head, out.joinpath(*tail))
    assert ended.code in (1, 2)
    assert str(out.joinpath(*tail)) in ended.err
    assert not {"unexpected", "Traceback"} & {*ended.err.replace(":", " ").split()}, ended.err
    assert state_of(out) == before
    assert run(name.split(" ")[0], *head, tmp_path.joinpath("new", *tail)).code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", WRITES_BELOW)
def test_commands_write_into_new_folder_below_out(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, 0)
    before = state_of(out)
    ended = run(name.split(" ")[0], *WRITES_BELOW[name], out)
    assert ended.code == 0, ended.err
    now = state_of(out)
    assert {key: now.get(key) for key in before} == before
    [new] = {key.split("/")[0] for key in now} - {key.split("/")[0] for key in before}
    assert re.fullmatch(r"\d{8}_\d{6}", new)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", [*WRITES_INTO, *WRITES_BELOW])
def test_commands_leave_file_in_place_of_out(name: str, tmp_path: Path) -> None:
    """A file, a link that leads nowhere or a FIFO in the place of the folder: refused in one line, and as it was."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("precious\n", encoding="utf-8")
    (here / "link").symlink_to(here / "nowhere")
    os.mkfifo(here / "fifo")
    before = state_of(here)
    head, tail = WRITES_INTO.get(name) or (WRITES_BELOW[name], ())
    # Those that write below it make their folder in one place, so that one entry shows that they use it.
    for entry in ("file", "link", "fifo") if name in WRITES_INTO else ("link",):
        ended = run(name.split(" ")[0], *head, (here / entry).joinpath(*tail))
        assert ended.code in (1, 2), entry
        assert str(here / entry) in ended.err
        assert not {"unexpected", "Traceback"} & {*ended.err.replace(":", " ").split()}, ended.err
        assert state_of(here) == before


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "a", "--checkpoint"),
        ("generate", "--prompt", "a", "--runs"),
        ("eval", "corpus.txt", "--checkpoint"),
        ("report", "--out", "page1", "--runs"),
        ("report", "--out", "page2", "--reports"),
        ("tokenize", "--backend", "simple", "--out", "t2.json"),
        ("prep", "--tokenizer", "t.json", "--workers", "1", "--out", "prepared"),
        ("prep", "--merge", "--out", "merged"),
    ],
)
def test_commands_only_read_what_they_are_given(words: tuple[str, ...], tmp_path: Path) -> None:
    for shift in range(len(KINDS)):
        folder = tmp_path / str(shift)
        fill(folder, shift)
        before = state_of(folder)
        ended = run(*words, folder)
        assert not {"unexpected", "Traceback"} & {*ended.err.replace(":", " ").split()}, ended.err
        assert state_of(folder) == before


def test_training_leaves_configuration_in_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project folder as the run folder: the configuration with its comments stays as it was written."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("a line of text\nanother line of text\nand a third one\n" * 20, encoding="utf-8")
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.raises(PsannlmError, match=r"config\.yaml is in the way"):
        train(load_config("config.yaml", ["train.checkpoint_dir=.", "train.lr=0.001"]))
    assert Path("config.yaml").read_text(encoding="utf-8") == CONFIG
    assert {path.name for path in Path().iterdir()} == {"corpus.txt", "config.yaml"}


@pytest.mark.slow
def test_runs_inside_corpus_folder_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log and the tables of runs are not text of the corpus; a file of the user's own with such a name is."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("a line of text\nanother line of text\nand a third one\n" * 20, encoding="utf-8")
    Path("table.txt").write_text("my own table\n", encoding="utf-8")
    Path("c.yaml").write_text(CONFIG.replace("{path: corpus.txt, per_line: true}", "."), encoding="utf-8")
    whole = train(load_config("c.yaml", ["train.checkpoint_dir=runs/a"]))
    write_record(whole.folder, "train", whole.as_dict(), "a table\n")
    again = train(load_config("c.yaml", ["train.checkpoint_dir=runs/a"]))
    assert again.steps == whole.steps
    dropped: list[tuple[str, str]] = []
    files, problems = find_files(".", lambda reason, name: dropped.append((reason, name)))
    assert (files, problems) == (["./corpus.txt", "./table.txt"], [])
    assert {name for reason, name in dropped if reason == "output of psannlm"} == {
        "./runs/a/metrics.jsonl",
        "./runs/a/table.txt",
    }
    assert find_files("**/*.txt", lambda reason, name: None) == (["corpus.txt", "table.txt"], [])
