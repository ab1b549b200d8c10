"""No command harms a file that psannlm did not make: every writing command against a folder full of foreign files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.benchmarks.study_plan import load_plan
from psannlm.benchmarks.study_runs import size_study
from psannlm.benchmarks.study_work import launch, work
from psannlm.config.data import PathSource
from psannlm.config.run import load_config
from psannlm.data.files import find_files
from psannlm.data.fit import fit_with_card
from psannlm.errors import PsannlmError
from psannlm.prep.merge import merge_parts
from psannlm.prep.run import PrepSettings, prepare_corpus
from psannlm.reports.records import write_record
from psannlm.reports.store import new_folder
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


def fill(folder: Path, kind: str) -> None:
    """Put a foreign entry of one kind at every name that a command may want to write."""
    folder.mkdir()
    victim = folder / "victim"
    victim.write_text("precious\n", encoding="utf-8")
    for name in FILES:
        path = folder / name
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


def state_of(folder: Path) -> dict[str, object]:
    """Return what every entry is and holds, links and FIFOs by themselves."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else b""
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), path.lstat().st_ino, content)
    return found


def train_into(out: Path) -> None:
    train(load_config("config.yaml", [f"train.checkpoint_dir={out}"]))


def train_anew_into(out: Path) -> None:
    train(load_config("config.yaml", [f"train.checkpoint_dir={out}"]), resume="never")


def prepare_into(out: Path) -> None:
    prepare_corpus(["corpus.txt"], Path("t.json"), out, PrepSettings(per_line=True), n_workers=1)


def report_into(out: Path) -> None:
    folder = new_folder("benchmarks", out)
    assert not any(folder.iterdir())


def merge_into(out: Path) -> None:
    parts = [out.parent / "part1", out.parent / "part2"]
    for number, part in enumerate(parts, start=1):
        if not part.exists():
            settings = PrepSettings(per_line=True)
            prepare_corpus(["corpus.txt", "more.txt"], Path("t.json"), part, settings, n_workers=1, part=(number, 2))
    merge_parts(parts, out)


def tokenize_into(out: Path) -> None:
    source = PathSource(path="corpus.txt", per_line=True)
    fit_with_card([source], backend="simple", vocab_size=300, out=out / "tokenizer.json", notice=lambda line: None)


def study_into(out: Path) -> None:
    """Start a study whose runs end at once: the files that the study itself writes are the subject."""
    Path("plan.yaml").write_text(PLAN, encoding="utf-8")
    study = size_study(load_plan(Path("plan.yaml")), out, lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psannlm.benchmarks.study_work.python_command", lambda *words: ["true"])
        work(study, launcher=launch, sleep=lambda seconds: None)


COMMON = (".lock", "metrics.json", "system.json", "table.txt", ".psannlm-0123456789abcdef.tmp")
NAMES: dict[Callable[[Path], None], tuple[str, ...]] = {
    train_into: (
        *COMMON,
        "best",
        "config.yaml",
        "latest",
        "loss_curve.png",
        "metrics.jsonl",
        "step_1",
        "step_00000002",
    ),
    tokenize_into: ("tokenizer.json", "tokenizer.json.card.json"),
    study_into: (".lock", "study.json", "tokenizer.json", f"{RUN}.yaml", f"{RUN}.log"),
    merge_into: (*COMMON, "manifest.json", "tokenizer.json", "train_00000.safetensors", ".work"),
    prepare_into: (*COMMON, "manifest.json", "tokenizer.json", "train_00000.safetensors", ".work"),
}


def refusal_of(work: Callable[[Path], None], out: Path) -> str | None:
    """Return with which words ``work`` refuses ``out``, or None."""
    try:
        work(out)
    except PsannlmError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["file", "symlink", "hard link", "folder", "fifo"])
@pytest.mark.parametrize(
    "work", [train_into, train_anew_into, prepare_into, merge_into, tokenize_into, study_into, report_into]
)
def test_no_work_harms_foreign_entries(
    work: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    Path("corpus.txt").write_text("a line of text\nanother line of text\nand a third one\n" * 20, encoding="utf-8")
    Path("more.txt").write_text("one line more\nand the last of them\n", encoding="utf-8")
    CharTokenizer.fit(["a line of text"], 300).save("t.json")
    fill(tmp_path / "out", kind)
    before = state_of(tmp_path / "out")
    # One name at a time: what refuses at the first would never come to the second.
    for name in NAMES.get(work, ()):
        one = tmp_path / "one"
        one.mkdir()
        os.rename(tmp_path / "out" / name, one / name)
        was = state_of(one)
        refusal = refusal_of(work, one)
        assert refusal is None or str(one) in refusal
        now = state_of(one)
        assert {key: now.get(key) for key in was} == was, name
        os.rename(one / name, tmp_path / "out" / name)
        one.rename(tmp_path / f"done {name}")
    assert state_of(tmp_path / "out") == before
    refusal = refusal_of(work, tmp_path / "out")
    assert refusal is None or str(tmp_path / "out") in refusal
    now = state_of(tmp_path / "out")
    assert {key: now.get(key) for key in before} == before


def test_training_leaves_configuration_in_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project folder as the run folder: the configuration with its comments stays as it was written."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("a line of text\nanother line of text\nand a third one\n" * 20, encoding="utf-8")
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.raises(PsannlmError, match=r"config\.yaml is in the way"):
        train(load_config("config.yaml", ["train.checkpoint_dir=.", "train.lr=0.001"]))
    assert Path("config.yaml").read_text(encoding="utf-8") == CONFIG
    assert {path.name for path in Path().iterdir()} == {"corpus.txt", "config.yaml"}


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
