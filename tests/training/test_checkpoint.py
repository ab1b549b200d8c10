"""Checkpoints: atomic save, detection of any damage, and search for the one to use."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.data.loader import Position
from psannlm.errors import ArtifactError, StorageError
from psannlm.io.atomic import temporary_beside
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.runtime.log import receiving_messages
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.char import CharTokenizer
from psannlm.training.checkpoint import (
    BEST,
    LATEST,
    TrainerState,
    find_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    point,
    prune,
    read_optimizer,
    read_pointer,
    read_state,
    save_checkpoint,
    step_folder,
)

Build = Callable[..., Transformer]
FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json")


def state_at(step: int) -> TrainerState:
    return TrainerState(
        step=step,
        position=Position(1, 3),
        tokens=10 * step,
        config={"train": {"lr": 0.1}, "text": "é\n\u2028"},
        corpus_sha256="c" * 64,
        tokenizer_fingerprint="t" * 64,
        best=None,
        metrics={"loss": 0.1 + 0.2},
        scaler={},
    )


@pytest.fixture
def save(build_tiny: Build, tmp_path: Path) -> Callable[..., Path]:
    """Return a saver of tiny checkpoints whose tensors differ from step to step."""

    def saver(step: int, run: Path | None = None, tokenizer: Tokenizer | None = None, n_numbers: int = 6) -> Path:
        model = build_tiny(seed=step, d_model=4, n_layers=1, d_mlp=4, vocab_size=7)
        state = {"embedding.weight/exp_avg": torch.full((n_numbers,), float(step))}
        return save_checkpoint(run or tmp_path / "run", model, tokenizer, state, state_at(step))

    return saver


def test_checkpoint_roundtrip(save: Callable[..., Path], build_tiny: Build) -> None:
    folder = save(5)
    assert read_state(folder) == state_at(5)
    assert read_optimizer(folder)["embedding.weight/exp_avg"].tolist() == [5.0] * 6
    original = build_tiny(seed=5, d_model=4, n_layers=1, d_mlp=4, vocab_size=7).state_dict()
    loaded = load_model(folder).model.state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in original)
    assert read_pointer(folder.parent, LATEST) == folder


def refusal(folder: Path) -> str | None:
    try:
        read_state(folder)
    except ArtifactError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_checkpoint_any_flipped_bit_raises(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(5)
    rng = random.Random(0)
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    missed = []
    for _ in range(1000):
        name = rng.choices(FILES, weights=[sizes[name] for name in FILES])[0]
        path = folder / name
        content = path.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        message = refusal(folder)
        if message is None or str(path) not in message or "\n" in message:
            missed.append((name, at, bit, message))
        path.write_bytes(content)
    assert missed == []
    assert read_state(folder).step == 5


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_flipped_bit_at_file_ends_raises(save: Callable[..., Path], name: str) -> None:
    path = save(5) / name
    content = path.read_bytes()
    for at in [*range(24), *range(len(content) - 4, len(content))]:
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with pytest.raises(ArtifactError):
                read_state(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_truncated_or_extended_file_raises(save: Callable[..., Path], name: str) -> None:
    path = save(5) / name
    content = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content), max(1, len(content) // 60))}
    for length in sorted(lengths - {len(content)}):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=name):
            read_state(path.parent)
    for surplus in (b"\0", b"\n", b" ", content):
        path.write_bytes(content + surplus)
        with pytest.raises(ArtifactError, match=name):
            read_state(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_missing_file_is_named(save: Callable[..., Path], name: str) -> None:
    folder = save(5)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        read_state(folder)


@pytest.mark.parametrize("name", FILES[:2])
def test_checkpoint_mixed_files_raise(save: Callable[..., Path], name: str) -> None:
    """Each file is whole; together they never were a state of the run."""
    older, newer = save(4), save(5)
    shutil.copy(older / name, newer / name)
    with pytest.raises(ArtifactError, match="another checkpoint"):
        read_state(newer)


def test_checkpoint_swapped_files_raise(save: Callable[..., Path]) -> None:
    folder = save(5)
    (folder / "model.safetensors").rename(folder / "x")
    (folder / "optimizer.safetensors").rename(folder / "model.safetensors")
    (folder / "x").rename(folder / "optimizer.safetensors")
    with pytest.raises(ArtifactError, match="another checkpoint"):
        read_state(folder)
    with pytest.raises(ArtifactError, match="not a model file"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "7", '"sha256"', "{}", '{"sha256": 1}', "[" * 100_000, '{"a":' * 100_000, "\ud800"]
)
def test_checkpoint_invalid_state_raises_one_line(save: Callable[..., Path], text: str) -> None:
    path = save(5) / "trainer.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ArtifactError, match=r"trainer\.json") as caught:
        read_state(path.parent)
    assert "\n" not in str(caught.value)


def test_checkpoint_unknown_format_version_is_refused(save: Callable[..., Path]) -> None:
    path = save(5) / "trainer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ArtifactError, match="format version 3, this psannlm reads 1 and 2"):
        read_state(path.parent)


def test_latest_valid_checkpoint_skips_and_reports_damage(
    save: Callable[..., Path], logged: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 10):
        run = save(step).parent
    assert latest_valid_checkpoint(run) == (step_folder(run, 10), state_at(10))
    assert logged.messages == []
    (step_folder(run, 10) / "model.safetensors").unlink()
    (step_folder(run, 4) / "trainer.json").write_text("{}", encoding="utf-8")
    found = latest_valid_checkpoint(run)
    assert found is not None
    assert found[0] == step_folder(run, 2)
    assert len(logged.messages) == 2
    assert "step_00000010" in logged.messages[0]
    assert "step_00000004" in logged.messages[1]
    (step_folder(run, 2) / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="all 3 checkpoints"):
        latest_valid_checkpoint(run)


def test_latest_valid_checkpoint_without_run_is_none(tmp_path: Path) -> None:
    with receiving_messages(pytest.fail):
        assert latest_valid_checkpoint(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path) is None


def test_list_checkpoints_sorts_by_step(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        step_folder(tmp_path, step).mkdir()
    for name in ("step_", "step_7x", "step_-1", "steps_00000001", ".step_00000009.12.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000011").write_text("a file", encoding="utf-8")
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (7, 99_999_999, 100_000_000)]


def test_prune_keeps_the_newest_and_the_best(save: Callable[..., Path]) -> None:
    run = [save(step) for step in range(1, 8)][-1].parent
    prune(run, 2, {3})
    assert [path.name[-1] for path in list_checkpoints(run)] == ["3", "6", "7"]
    prune(run, 5, ())
    assert [path.name[-1] for path in list_checkpoints(run)] == ["3", "6", "7"]


def test_prune_keeps_foreign_folders(save: Callable[..., Path], tmp_path: Path) -> None:
    """A name alone does not make a checkpoint ours, and neither does one of ours with a file of the user's in it."""
    run = [save(step) for step in (10, 11, 12)][-1].parent
    (step_folder(run, 10) / "notes.txt").write_text("mine", encoding="utf-8")
    for name in ("step_1", "step_00000001", "step_00000002", "step_000000003"):
        (run / name).mkdir()
        (run / name / "novel.txt").write_text("mine", encoding="utf-8")
    (run / "step_00000002" / "trainer.json").write_text('{"state": {}, "sha256": "0"}', encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "trainer.json").write_bytes((step_folder(run, 11) / "trainer.json").read_bytes())
    (run / "step_00000004").symlink_to(tmp_path / "elsewhere")
    prune(run, 1, ())
    left = {path.name for path in run.iterdir() if path.name.startswith("step_")}
    foreign = {"step_1", "step_00000001", "step_00000002", "step_000000003", "step_00000004", "step_00000010"}
    assert left == foreign | {"step_00000012"}
    assert (run / "step_00000004" / "trainer.json").exists()


def test_remove_checkpoint_interrupted_leaves_no_partial_checkpoint(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        run = save(step).parent

    def die(path: Path, **kwargs: Any) -> None:
        next(path.rglob("model.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("psannlm.io.atomic.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prune(run, 2, ())
    assert [read_state(folder).step for folder in list_checkpoints(run)] == [2, 3]
    save(4)
    assert list(run.glob(".*")) == []


@pytest.mark.parametrize(
    "text", ["", "..", ".", "/", "/tmp", "step_00000009", "step_00000002/..", "../run/step_00000002", "\0", "é"]
)
def test_read_pointer_returns_own_checkpoint_or_none(save: Callable[..., Path], text: str) -> None:
    run = save(2).parent
    (run / BEST).write_text(text, encoding="utf-8")
    assert read_pointer(run, BEST) is None
    (run / BEST).write_bytes(b"\xff\xfe")
    assert read_pointer(run, BEST) is None
    point(run, BEST, 2)
    assert read_pointer(run, BEST) == step_folder(run, 2)


def test_find_checkpoint_takes_best_of_last_saved_run(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    for run, step in ((a, 1), (a, 9), (b, 2), (b, 3)):
        save(step, run)
    os.utime(a / LATEST, ns=(10**18, 10**18))
    os.utime(b / LATEST, ns=(2 * 10**18, 2 * 10**18))
    assert find_checkpoint(tmp_path / "runs") == step_folder(b, 3)
    point(b, BEST, 2)
    assert find_checkpoint(tmp_path / "runs") == step_folder(b, 2)
    assert find_checkpoint(a) == step_folder(a, 9)
    os.utime(a / LATEST, ns=(3 * 10**18, 3 * 10**18))
    assert find_checkpoint(tmp_path / "runs") == step_folder(a, 9)
    shutil.rmtree(step_folder(a, 9))  # what ``latest`` names is gone; something of the run is still there
    assert find_checkpoint(tmp_path / "runs") == step_folder(a, 1)


@pytest.mark.parametrize(
    ("limit", "n_numbers", "tokenizer"),
    [
        (1_000, 6, None),  # within the model file
        (20_000, 50_000, None),  # within the optimiser's
        (100_000, 6, CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 20_000))))),  # within the model's header
    ],
)
def test_save_on_full_disk_keeps_older_checkpoints_only(
    save: Callable[..., Path],
    contents: Callable[[Path], dict[str, str]],
    largest_file: Callable[[int], AbstractContextManager[None]],
    limit: int,
    n_numbers: int,
    tokenizer: Tokenizer | None,
) -> None:
    run = save(2).parent
    point(run, BEST, 2)
    before = contents(run)
    with largest_file(limit), pytest.raises(StorageError) as caught:
        save(4, tokenizer=tokenizer, n_numbers=n_numbers)
    message = str(caught.value)
    assert "\n" not in message
    assert str(step_folder(run, 4)) in message
    assert "not enough disk space" in message
    assert "MB free" in message
    assert contents(run) == before
    assert {path.name for path in run.iterdir()} == {"step_00000002", LATEST, BEST}
    assert read_pointer(run, LATEST) == step_folder(run, 2)
    assert save(4) == step_folder(run, 4)


def test_save_on_full_disk_at_state_leaves_nothing(
    save: Callable[..., Path], contents: Callable[[Path], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save(2).parent
    before = contents(run)

    def refuse(path: Path, content: str) -> None:
        raise StorageError(f"no room to write {path}")

    with monkeypatch.context() as patch:
        patch.setattr("psannlm.training.checkpoint.write_text", refuse)
        with pytest.raises(StorageError):
            save(4)
    assert contents(run) == before
    assert list(run.glob(".*")) == []


def test_save_ignores_and_removes_leftovers_of_kill(save: Callable[..., Path]) -> None:
    run = save(2).parent
    with temporary_beside(step_folder(run, 4)) as temporary, pytest.MonkeyPatch.context() as patch:
        shutil.copytree(step_folder(run, 2), temporary)
        patch.setattr("psannlm.io.atomic.shutil.rmtree", lambda path, **kwargs: None)
    (run / ".gitignore").write_text("*", encoding="utf-8")
    with receiving_messages(pytest.fail):
        found = latest_valid_checkpoint(run)
    assert found is not None
    assert found[0] == step_folder(run, 2)
    save(6)
    assert {path.name for path in run.glob(".*")} == {".gitignore"}


def test_save_of_same_step_replaces_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(3)
    (folder / "model.safetensors").write_bytes(b"damaged")
    save(3)
    assert read_state(folder).step == 3
    assert list(folder.parent.glob(".*")) == []


def swell(path: Path, n_bytes: int) -> None:
    """Let the header of ``path`` name one more tensor of ``n_bytes``, and make the file sparse up to its end."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    end = max((entry["data_offsets"][1] for name, entry in fields.items() if name != "__metadata__"), default=0)
    fields["extra"] = {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [end, end + n_bytes]}
    header = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    os.truncate(path, 8 + len(header) + end + n_bytes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.safetensors", r"does not fit its model: 100\.0 GB of optimizer state for [\d,]+ parameters"),
        (
            "model.safetensors",
            "does not fit its own configuration: 'extra' is not a tensor of the model, or has another shape",
        ),
    ],
)
def test_checkpoint_oversize_sparse_file_is_not_hashed(save: Callable[..., Path], name: str, said: str) -> None:
    folder = save(3)
    swell(folder / name, 100 * 10**9)
    started_s = time.process_time()
    with pytest.raises(ArtifactError, match=said):
        read_state(folder)
    (folder.parent / LATEST).unlink()
    if name == "model.safetensors":
        with pytest.raises(ArtifactError, match=said):
            find_checkpoint(folder.parent)
        with pytest.raises(ArtifactError, match=said):
            load_model(folder)
    assert time.process_time() - started_s < 5.0
