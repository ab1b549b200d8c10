"""Resume: bit for bit the uninterrupted run, or refused with the reason, and no file is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig
from psannlm.data.prepare import load_corpus
from psannlm.errors import ArtifactError, ConfigError, PsannlmError
from psannlm.evaluation.loss import Evaluation
from psannlm.kernels.compiler import has_compiler
from psannlm.models.tensorfile import read_tensors
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import _dump_with_checksum, find_checkpoint, list_checkpoints, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import TrainResult, train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")


class Halt(Exception):
    """Ends a run as abruptly as a crash would, but within the test."""


class Notes(Callback):
    """Keeps the numbers of the steps, and may crash after one."""

    def __init__(self, crash_after: int | None = None) -> None:
        self.steps: list[int] = []
        self.crash_after = crash_after

    def on_step(self, event: StepEvent) -> None:
        self.steps.append(event.step)
        if event.step == self.crash_after:
            raise Halt


def train_and_crash(config: RunConfig, after: int) -> None:
    with pytest.raises(Halt):
        train(config, callbacks=[Notes(after)])


def moved(config: RunConfig, folder: Path, **settings: Any) -> RunConfig:
    update = {"checkpoint_dir": str(folder), **settings}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        found |= {
            f"{name}:{key}": value for key, value in read_tensors(step_folder(folder, step) / name).tensors.items()
        }
    return found


def figures(folder: Path) -> list[dict[str, Any]]:
    of_the_machine = ("tokens_per_s", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in of_the_machine} for row in read_metrics(folder)]


def assert_same_run(a: Path, b: Path, step: int) -> None:
    one, other = tensors(a, step), tensors(b, step)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert figures(a) == figures(b)
    state, twin = read_state(step_folder(a, step)), read_state(step_folder(b, step))
    unlike = {"checkpoint_dir"}
    assert replace(state, config={}) == replace(twin, config={})
    assert {k: v for k, v in state.config["train"].items() if k not in unlike} == {
        k: v for k, v in twin.config["train"].items() if k not in unlike
    }


@pytest.mark.parametrize(
    ("base", "optimizer", "amp"),
    [
        ("waveresnet", "muon", "fp32"),
        pytest.param("respsann", "adamw", "fp32", marks=pytest.mark.slow),
        pytest.param("transformer", "adamw", "fp32", marks=pytest.mark.slow),
        pytest.param("waveresnet", "adamw", "fp16", marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(tiny_run: TinyRun, tmp_path: Path, base: str, optimizer: str, amp: str) -> None:
    """With dropout, accumulation and shuffling, killed after 5 steps and after 7, over the end of the epoch at 6."""
    groups = {"lr_scale": {"embedding": 4.0, "scalars": 0.5}, "decay_embeddings": False} if optimizer == "muon" else {}
    config = tiny_run(
        model={"base": base, "dropout": 0.2},
        optimizer=optimizer,
        amp=amp,
        **groups,
        max_steps=9,
        warmup_steps=3,
        eval_interval_steps=2,
        save_interval_steps=3,
        keep_checkpoints=9,
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(moved(config, straight))
    train_and_crash(moved(config, broken), after=5)
    train_and_crash(moved(config, broken), after=7)
    result = train(moved(config, broken))
    assert result.steps == 9
    assert read_state(step_folder(broken, 9)).position.epoch == 1
    assert_same_run(straight, broken, 9)
    if optimizer == "muon":
        rows = [row for row in read_metrics(broken) if row["kind"] == "train"]
        assert [row["lr/embedding"] for row in rows] == [4.0 * row["lr"] for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_resume_is_exact_when_compiled(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Compiled anew after the crash, and with an epoch's last batch, which is smaller."""
    config = tiny_run(model={"base": "waveresnet", "dropout": 0.2}, amp="bf16", compile=True, device="cpu", max_steps=7)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(moved(config, straight))
    torch._dynamo.reset()
    train_and_crash(moved(config, broken), after=4)
    torch._dynamo.reset()
    assert train(moved(config, broken)).steps == 7
    assert_same_run(straight, broken, 7)


def test_resume_from_older_checkpoint_logs_each_step_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run(max_steps=6, save_interval_steps=2, keep_checkpoints=9, eval_interval_steps=1)
    train(config)
    folder = Path(config.train.checkpoint_dir)
    whole = figures(folder)
    train(config, resume=str(step_folder(folder, 2)))
    assert figures(folder) == whole
    steps = [row["step"] for row in whole if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_of_finished_run_returns_its_result(
    tiny_run: TinyRun, contents: Callable[[Path], dict[str, str]]
) -> None:
    config = tiny_run(max_steps=3)
    first = train(config)
    before = contents(first.folder)
    notes = Notes()
    again = train(config, callbacks=[notes])
    assert notes.steps == []
    skipped = {"model", "seconds"}

    def plain(result: TrainResult) -> dict[str, Any]:
        return {k: v for k, v in vars(result).items() if k not in skipped}

    assert plain(again) == plain(first)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    after = contents(first.folder)
    assert {k for k in after if after[k] != before.get(k)} <= {"system.json"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 5e-3}, "train.lr: 0.01 -> 0.005"),
        ({"grad_accum_steps": 1}, "train.grad_accum_steps: 2 -> 1"),
        ({"seed": 7}, "train.seed: 1337 -> 7"),
        ({"model": {"d_model": 32}}, "model.d_model: 16 -> 32"),
        ({"model": {"sine_params": {"amp_init": 2.0}}}, "model.sine_params.amp_init: 1"),
        ({"data": {"max_length": 12}}, "data.max_length: 16 -> 12"),
    ],
)
def test_resume_with_other_configuration_names_the_key(
    tiny_run: TinyRun, contents: Callable[[Path], dict[str, str]], changes: dict[str, Any], named: str
) -> None:
    folder = train(tiny_run(max_steps=2)).folder
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        train(tiny_run(**{"max_steps": 2, **changes}))
    assert named in str(caught.value)
    assert "--resume never" in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"log_interval_steps": 2},
        {"save_interval_steps": 2},
        {"keep_checkpoints": 5},
        {"device": "auto"},
        {"ddp": "off"},
        {"grad_checkpoint": True},
    ],
)
def test_resume_allows_other_non_semantic_keys(tiny_run: TinyRun, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_run(max_steps=4, save_interval_steps=1, log_interval_steps=1)
    straight = tmp_path / "straight"
    train(moved(config, straight))
    train_and_crash(config, after=3)
    settings = {"max_steps": 4, "save_interval_steps": 1, "log_interval_steps": 1, **changes}
    train(tiny_run(**settings))
    folder = Path(config.train.checkpoint_dir)
    one, other = tensors(straight, 4), tensors(folder, 4)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_from_path_allows_other_learning_rate(tiny_run: TinyRun, logged: pytest.LogCaptureFixture) -> None:
    """What was trained after it stays on disk, and no longer passes for the newest state."""
    config = tiny_run(max_steps=6, save_interval_steps=2, keep_checkpoints=2)
    folder = train(config).folder
    kept = tensors(folder, 6)
    notes = Notes()
    lower = tiny_run(max_steps=6, save_interval_steps=1, keep_checkpoints=1, lr=1e-3)
    train(lower, resume=str(step_folder(folder, 4)), callbacks=[notes])
    assert "changed since the checkpoint: train.lr: 0.01 -> 0.001" in logged.messages
    assert notes.steps == [5, 6]
    (aside,) = folder.parent.glob("run_until_*")
    set_aside = tensors(aside, 6)
    assert all(torch.equal(set_aside[name], kept[name]) for name in kept)
    assert not all(torch.equal(tensors(folder, 6)[name], kept[name]) for name in kept)
    assert find_checkpoint(folder.parent) is not None
    assert find_checkpoint(folder.parent).parent == folder
    notes = Notes()
    assert train(lower, callbacks=[notes]).steps == 6
    assert notes.steps == []


@pytest.mark.slow
def test_resume_wsd_only_before_its_cooldown(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = {"schedule": "wsd", "cooldown_share": 0.5, "save_interval_steps": 1, "keep_checkpoints": 9}
    folder = train(tiny_run(**settings, max_steps=4)).folder
    assert [row["lr"] for row in figures(folder) if row["kind"] == "train"][:2] == [1e-2, 1e-2]
    longer = tiny_run(**settings, max_steps=6)
    for step in (3, 4):
        with pytest.raises(ConfigError, match=r"cooldown of a schedule of 4 steps.* step 2 or before.*max_steps: 4"):
            train(longer, resume=str(step_folder(folder, step)))
    straight = tmp_path / "straight"
    train(moved(longer, straight))
    train(longer, resume=str(step_folder(folder, 2)))
    assert_same_run(straight, folder, 6)


def test_resume_past_last_step_raises_with_remedy(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(max_steps=4)).folder
    with pytest.raises(ConfigError, match=r"after step 4, and this run ends at 3; set train\.max_steps to 4 or more"):
        train(tiny_run(max_steps=3), resume=str(step_folder(folder, 4)))
    assert list_checkpoints(folder) == [step_folder(folder, 4)]


def test_resume_from_path_refuses_other_model_or_corpus(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(max_steps=2)).folder
    with pytest.raises(ConfigError, match=r"model\.n_layers: 1 -> 2"):
        train(tiny_run(max_steps=2, model={"n_layers": 2}), resume=str(step_folder(folder, 2)))


def test_resume_from_run_folder_suggests_checkpoint(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(max_steps=2)).folder
    with pytest.raises(ConfigError, match="step_00000002"):
        train(tiny_run(max_steps=2), resume=str(folder))


@pytest.mark.slow
def test_resume_from_other_run_keeps_both(
    tiny_run: TinyRun, tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    config = tiny_run(max_steps=4, save_interval_steps=2, eval_interval_steps=1, keep_checkpoints=9)
    source, target = tmp_path / "source", tmp_path / "target"
    train(moved(config, source))
    train(moved(config, target))
    sources, targets = contents(source), contents(target)
    result = train(moved(config, target), resume=str(step_folder(source, 2)))
    assert contents(source) == sources
    (aside,) = tmp_path.glob("target_until_*")
    assert contents(aside) == targets
    assert result.checkpoint.parent == target
    assert result.checkpoint.is_dir()
    assert result.best is not None
    assert result.best["step"] > 2
    assert result.checkpoint == step_folder(target, result.best["step"])


def test_resume_never_renames_old_run(tiny_run: TinyRun, contents: Callable[[Path], dict[str, str]]) -> None:
    config = tiny_run(max_steps=2)
    folder = train(config).folder
    first = contents(folder)
    seconds = []
    for _ in range(2):  # two within one second must not meet either
        notes = Notes()
        train(config, resume="never", callbacks=[notes])
        seconds.append(notes.steps)
    assert seconds == [[1, 2], [1, 2]]
    asides = sorted(folder.parent.glob("run_until_*"))
    assert len(asides) == 2
    assert first in [contents(aside) for aside in asides]


@pytest.mark.parametrize("what", ["corpus", "tokenizer"])
def test_resume_with_other_data_raises(tiny_run: TinyRun, tmp_path: Path, tiny_texts: list[str], what: str) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(tiny_texts), encoding="utf-8")
    data = {"sources": [{"path": str(corpus), "per_line": True}]}
    config = tiny_run(max_steps=2, data=data)
    train(config)
    given = None
    if what == "corpus":
        corpus.write_text("\n".join([*tiny_texts[:-1], "Another last line, and a longer one."]), encoding="utf-8")
    else:
        other = {**config.data.model_dump(), "tokenizer": "tokenizers"}
        given = replace(load_corpus(config.data), tokenizer=load_corpus(type(config.data)(**other)).tokenizer)
    with pytest.raises(ConfigError, match=f"other data: {what}"):
        train(config, data=given)


@pytest.mark.parametrize("former", [None, "list-0"])
def test_resume_with_other_data_order_raises(tiny_run: TinyRun, former: str | None) -> None:
    """A position counts windows of an order: in another one, what is behind it is not what was seen."""
    config = tiny_run(max_steps=4, save_interval_steps=2)
    train_and_crash(config, after=3)
    path = step_folder(Path(config.train.checkpoint_dir), 2) / "trainer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if former is None:
        del content["state"]["data_order"]
    else:
        content["state"]["data_order"] = former
    path.write_text(_dump_with_checksum({k: content[k] for k in ("files", "state")}), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"data order that this version no longer supports \(list-. then, feistel-1 now\)"
    ):
        train(config)
    assert train(config, resume="never").steps == 4


def test_resume_of_older_version_keeps_its_corpus(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held out when it began stays held out, by the rule of then; data split by today's rule is refused."""
    config = tiny_run(max_steps=4, save_interval_steps=2, eval_interval_steps=2)
    with monkeypatch.context() as then:
        then.setattr("psannlm.training.resume.PREPARATION", 1)
        whole = train(moved(config, tmp_path / "whole"))
        train_and_crash(config, after=3)
    path = step_folder(Path(config.train.checkpoint_dir), 2) / "trainer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["state"].pop("preparation") == 1
    path.write_text(_dump_with_checksum({k: content[k] for k in ("files", "state")}), encoding="utf-8")
    with pytest.raises(ConfigError, match="older psannlm, which held out other documents"):
        train(config, data=load_corpus(config.data))
    resumed = train(config)
    assert resumed.best == whole.best
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_resume_uses_tokenizer_of_checkpoint(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a tokenizer's library may fit another vocabulary on the same text."""
    config = tiny_run(max_steps=4, save_interval_steps=2)
    train_and_crash(config, after=3)
    monkeypatch.setattr("psannlm.data.prepare.fit_tokenizer", lambda *a, **k: pytest.fail("fitted anew"))
    assert train(config).steps == 4


def test_resume_works_with_own_validation_data(tiny_run: TinyRun) -> None:
    """The Python API trains with val_split 0, an evaluation interval, and texts of its own to validate on."""
    split = tiny_run()
    data = load_corpus(split.data)
    train_config = split.train.model_copy(update={"eval_interval_steps": 2, "save_interval_steps": 2})
    config = split.model_copy(update={"data": split.data.model_copy(update={"val_split": 0.0}), "train": train_config})
    with pytest.raises(Halt):
        train(config, data=data, callbacks=[Notes(3)])
    assert train(config, data=data).steps == 4


def spoil(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_resume_skips_names_and_rewrites_damaged_checkpoint(
    tiny_run: TinyRun, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    config = tiny_run(max_steps=6, save_interval_steps=2, keep_checkpoints=3)
    straight = tmp_path / "straight"
    train(moved(config, straight))
    folder = train(config).folder
    spoil(step_folder(folder, 6))
    spoil(step_folder(folder, 4))
    notes = Notes()
    train(config, callbacks=[notes])
    said = "\n".join(logged.messages)
    assert "skipping a damaged checkpoint" in said
    assert str(step_folder(folder, 6) / "optimizer.safetensors") in said
    assert str(step_folder(folder, 4)) in said
    assert notes.steps == [3, 4, 5, 6]
    assert_same_run(straight, folder, 6)


def test_prune_keeps_valid_checkpoints_before_damaged_ones(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=6, save_interval_steps=2, keep_checkpoints=2)
    folder = train(config).folder
    spoil(step_folder(folder, 6))
    again = tiny_run(max_steps=6, save_interval_steps=1, keep_checkpoints=1)
    train_and_crash(again, after=6)  # after the save of step 5
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000005"]
    assert read_state(step_folder(folder, 5)).step == 5


def test_resume_with_all_checkpoints_damaged_raises(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=2, save_interval_steps=1)
    folder = train(config).folder
    for checkpoint in list_checkpoints(folder):
        spoil(checkpoint)
    with pytest.raises(ArtifactError, match="all 2 checkpoints"):
        train(config)


def test_resume_repairs_pointers_after_kill(tiny_run: TinyRun) -> None:
    """Killed after a checkpoint's rename and before ``latest`` and ``best`` were written."""
    config = tiny_run(max_steps=4, save_interval_steps=2, eval_interval_steps=2, keep_checkpoints=3, lr=1e-3)
    folder = train(config).folder
    assert read_state(step_folder(folder, 4)).best["step"] == 4
    (folder / "latest").write_text("step_00000002\n", encoding="utf-8")
    (folder / "best").write_text("step_00000002\n", encoding="utf-8")
    assert train(config).checkpoint == step_folder(folder, 4)
    assert (folder / "latest").read_text(encoding="utf-8").strip() == "step_00000004"


def test_resume_drops_pruned_best(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best at 2, then at 5, which pushes 2 out; going on from 4 must not name a best that is gone."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 1.5])
    monkeypatch.setattr("psannlm.training.validation.evaluate", lambda *a, **k: Evaluation(next(losses) * 10, 10, 10))
    config = tiny_run(max_steps=6, save_interval_steps=1, eval_interval_steps=1, keep_checkpoints=3)
    folder = train(config).folder
    assert not step_folder(folder, 2).exists()
    result = train(config, resume=str(step_folder(folder, 4)))
    assert result.best is not None
    assert (result.best["step"], result.best["loss"]) == (6, 1.5)
    assert result.checkpoint == step_folder(folder, 6)


def test_resume_fp16_without_scaler_state_raises(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(max_steps=2)).folder
    with pytest.raises(ArtifactError, match="scaler"):
        train(tiny_run(max_steps=4, amp="fp16"), resume=str(step_folder(folder, 2)))


def test_resume_with_incomplete_state_raises(tiny_run: TinyRun) -> None:
    """With a hash that fits, as a hostile or a future writer would have it."""

    config = tiny_run(max_steps=2)
    state_file = step_folder(train(config).folder, 2) / "trainer.json"
    content = json.loads(state_file.read_text(encoding="utf-8"))
    original = {key: content[key] for key in ("files", "state")}
    broken: list[dict[str, Any]] = [
        {**original, "files": {}},
        {**original, "files": []},
        {**original, "state": None},
        {**original, "state": {**original["state"], "position": 3}},
        {**original, "state": {**original["state"], "surplus": 3}},
        {"files": original["files"]},
        {**original, "state": {**original["state"], "config": {"model": {"base": "gpt"}}}},
        {**original, "state": {**original["state"], "config": 7}},
    ]
    for case in broken:
        state_file.write_text(_dump_with_checksum(case), encoding="utf-8")
        with pytest.raises(PsannlmError) as caught:
            train(config, resume=str(state_file.parent))
        assert "\n" not in str(caught.value)


def test_resume_from_missing_path_names_options(tiny_run: TinyRun) -> None:
    for wrong in ("Never", "nowhere/step_00000001", ""):
        with pytest.raises(ConfigError, match="takes auto, never, or the path"):
            train(tiny_run(), resume=wrong)


def test_resume_works_after_moving_run_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run(max_steps=4, save_interval_steps=2)
    train_and_crash(config, after=3)
    shutil.move(config.train.checkpoint_dir, tmp_path / "elsewhere")
    notes = Notes()
    train(moved(config, tmp_path / "elsewhere"), callbacks=[notes])
    assert notes.steps == [3, 4]
