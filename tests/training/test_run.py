"""Every documented key changes the run; files and messages of a run."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.base import Section
from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig, ShortConvConfig, SineConfig
from psannlm.config.run import RunConfig, load_config, to_yaml
from psannlm.config.train import TrainConfig
from psannlm.errors import (
    ConfigError,
    DeviceError,
    DivergedError,
    Interrupted,
    PictureError,
    StorageError,
    TrainingError,
)
from psannlm.models.artifact import load_model
from psannlm.models.registry import build_model, resolve
from psannlm.runtime.distributed import World
from psannlm.tokenizers.char import CharTokenizer
from psannlm.training import loop
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.checkpoint import list_checkpoints, read_state
from psannlm.training.metrics import read_metrics
from psannlm.training.plan import plan_training
from psannlm.training.run import train
from psannlm.training.run_folder import RunStatus, read_run_status

TinyRun = Callable[..., RunConfig]


@dataclass(frozen=True)
class Seen:
    """A run as it looks from outside."""

    steps: int
    tokens: int
    losses: tuple[float, ...]
    rates: tuple[float, ...]
    norms: tuple[float, ...]
    logged: tuple[int, ...]
    evaluated: tuple[int, ...]
    saved: tuple[str, ...]
    weights: str
    parameters: int
    folder: str
    corpus: str
    tokenizer: str
    backend: str
    held_out: int
    model: str


def look(config: RunConfig) -> Seen:
    result = train(config)
    rows = read_metrics(result.folder)
    trained = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    weights = hashlib.sha256()
    for parameter in result.model.state_dict().values():
        weights.update(parameter.numpy().tobytes())
    last = list_checkpoints(result.folder)[-1]
    state, loaded = read_state(last), load_model(last)
    assert loaded.tokenizer is not None
    return Seen(
        steps=result.steps,
        tokens=result.tokens,
        losses=tuple(row["loss"] for row in trained),
        rates=tuple(row["lr"] for row in trained),
        norms=tuple(row["grad_norm"] for row in trained),
        logged=tuple(row["step"] for row in trained),
        evaluated=tuple(row["step"] for row in evals),
        saved=tuple(path.name for path in list_checkpoints(result.folder)),
        weights=weights.hexdigest(),
        parameters=result.parameters,
        folder=result.folder.name,
        corpus=state.corpus_sha256,
        tokenizer=loaded.tokenizer.fingerprint,
        backend=loaded.tokenizer.backend,
        held_out=evals[-1]["tokens"] if evals else 0,
        model=loaded.model.config.model_dump_json(),
    )


@pytest.fixture
def compare(tiny_run: TinyRun, tmp_path: Path) -> Callable[[dict[str, Any], dict[str, Any]], tuple[Seen, Seen]]:
    """Return a comparer of the run with ``before`` to that with ``before`` and ``after``; each has its own folder."""

    def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        sections = {name: {**a.get(name, {}), **b.get(name, {})} for name in ("model", "data") if name in {**a, **b}}
        return {**a, **b, **sections}

    def both(before: dict[str, Any], after: dict[str, Any]) -> tuple[Seen, Seen]:
        a = {"checkpoint_dir": str(tmp_path / "a" / "run"), **before}
        b = {"checkpoint_dir": str(tmp_path / "b" / "run"), **merged(before, after)}
        return look(tiny_run(**a)), look(tiny_run(**b))

    return both


# key: (settings of both runs, settings of the second, what must differ, what must not)
TRAIN_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "epochs": ({"max_steps": None}, {"epochs": 2}, "steps logged", "folder"),
    "max_steps": ({"schedule": "constant"}, {"max_steps": 3}, "steps logged saved", "folder"),
    "batch_tokens": ({}, {"batch_tokens": 64}, "tokens losses", "steps"),
    "grad_accum_steps": ({}, {"grad_accum_steps": 1}, "tokens losses", "steps"),
    "global_batch_tokens": ({"grad_accum_steps": 1}, {"global_batch_tokens": 256}, "tokens losses", "steps"),
    "lr": ({}, {"lr": 1e-3}, "rates losses weights", "tokens"),
    "min_lr": ({}, {"min_lr": 5e-3}, "rates weights", "tokens"),
    "schedule": ({}, {"schedule": "constant"}, "rates weights", "tokens"),
    "cooldown_share": ({"schedule": "wsd"}, {"cooldown_share": 0.5}, "rates weights", "tokens"),
    "warmup_steps": ({}, {"warmup_steps": 3}, "rates weights", "tokens"),
    "weight_decay": ({}, {"weight_decay": 0.5}, "weights", "tokens rates"),
    "decay_embeddings": ({"weight_decay": 0.5}, {"decay_embeddings": False}, "weights", "tokens rates"),
    "lr_scale": ({}, {"lr_scale": {"embedding": 2.0}}, "weights", "tokens rates"),
    "label_smoothing": ({}, {"label_smoothing": 0.2}, "losses weights", "tokens rates"),
    "grad_clip": ({"grad_clip": None}, {"grad_clip": 1e-3}, "losses weights", "tokens rates"),
    "optimizer": ({}, {"optimizer": "muon"}, "losses weights", "tokens rates"),
    "amp": ({}, {"amp": "bf16"}, "losses weights", "tokens rates"),
    "log_interval_steps": ({}, {"log_interval_steps": 3}, "logged", "weights saved"),
    "eval_interval_steps": ({}, {"eval_interval_steps": 2}, "evaluated", "weights"),
    "save_interval_steps": ({}, {"save_interval_steps": 3}, "saved", "weights logged"),
    "keep_steps": ({"max_steps": 6}, {"keep_steps": (2, 3)}, "saved", "weights logged losses"),
    "keep_checkpoints": (
        {"save_interval_steps": 1, "lr": 1e-3},
        {"keep_checkpoints": 3},
        "saved",
        "weights logged",
    ),
    "seed": ({}, {"seed": 3}, "losses weights", "rates held_out tokenizer"),
    "checkpoint_dir": ({}, {}, "folder", "weights losses saved"),
}
# Keys whose effect is not one on figures have a test of their own below.
OTHER_TRAIN_KEYS = {"compile", "ddp", "device", "grad_checkpoint"}
# These have their tests in test_mishaps.py, test_samples.py and test_tensorboard.py.
OTHER_TRAIN_KEYS |= {"fsdp", "shard_size", "grad_sync"}  # test_parallel.py
OTHER_TRAIN_KEYS |= {"init_from"}  # test_init_from.py
OTHER_TRAIN_KEYS |= {"eval_tasks"}  # test_eval_tasks.py
OTHER_TRAIN_KEYS |= {"ema"}  # test_averaging.py
OTHER_TRAIN_KEYS |= {"on_nonfinite", "sample_prompts", "sample_tokens", "tensorboard"}

DATA_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "sources": ({}, {}, "corpus tokens losses", "steps"),
    "tokenizer": ({}, {"tokenizer": "tokenizers"}, "backend tokenizer losses", "corpus"),
    "tokenizer_model_path": ({}, {}, "tokenizer parameters", "corpus backend"),
    "vocab_size": (
        {"tokenizer": "tokenizers", "vocab_size": 261},
        {"vocab_size": 300},
        "tokenizer parameters",
        "corpus",
    ),
    "max_length": ({}, {"max_length": 8}, "losses model", "corpus parameters held_out"),
    "pack_sequences": ({}, {"pack_sequences": False}, "tokens losses", "corpus held_out parameters"),
    "isolate_documents": ({}, {"isolate_documents": True}, "losses", "corpus held_out parameters tokens"),
    "val_split": ({}, {"val_split": 0.5}, "held_out losses", "corpus"),
    "seed": ({}, {"seed": 4}, "held_out losses", "corpus rates"),
}

SINE = {"base": "respsann"}
MODEL_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "base": ({}, {"base": "transformer"}, "losses parameters", "tokens"),
    "d_model": ({}, {"d_model": 24}, "losses parameters", "tokens"),
    "n_layers": ({}, {"n_layers": 2}, "losses parameters", "tokens"),
    "n_heads": ({}, {"n_heads": 4}, "losses", "tokens parameters"),
    "n_kv_heads": ({}, {"n_kv_heads": 1}, "losses parameters", "tokens"),
    "d_mlp": ({}, {"d_mlp": 32}, "losses parameters", "tokens"),
    "mlp": ({}, {"mlp": "swiglu"}, "losses parameters", "tokens"),
    "vocab_size": ({}, {"vocab_size": 300}, "losses parameters", "tokens"),
    "max_seq_len": ({}, {"max_seq_len": 64}, "model", "losses parameters"),
    "positional_encoding": ({}, {"positional_encoding": "alibi"}, "losses", "tokens parameters"),
    "rope_theta": ({}, {"rope_theta": 10.0}, "losses", "tokens parameters"),
    "residual_scale": ({}, {"residual_scale": True}, "losses parameters", "tokens"),
    "sine_phase": (SINE, {"sine_phase": 0.5}, "losses parameters", "tokens"),
    "sine_quadrature": (SINE, {"sine_quadrature": True}, "losses parameters", "tokens"),
    "activation_norm": ({}, {"activation_norm": True}, "losses", "tokens parameters"),
    "embedding_norm": ({}, {"embedding_norm": True}, "losses parameters", "tokens"),
    "gate_init_scale": ({}, {"gate_init_scale": 0.4}, "losses", "tokens parameters"),
    "qkv_features": ({}, {"qkv_features": "fan"}, "losses parameters", "tokens"),
    "activation_gains": ({}, {"activation_gains": True}, "losses parameters", "tokens"),
    "qk_norm": ({}, {"qk_norm": True}, "losses parameters", "tokens"),
    "norm_eps": ({}, {"norm_eps": 1e-2}, "losses", "tokens parameters"),
    "dropout": ({}, {"dropout": 0.3}, "losses", "tokens parameters"),
    "tie_embeddings": ({}, {"tie_embeddings": True}, "losses parameters", "tokens"),
}
SINE_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "amp_init": (SINE, {"amp_init": 2.0}, "losses", "parameters"),
    "amp_std": (SINE, {"amp_std": 0.2}, "losses", "parameters"),
    "freq_init": (SINE, {"freq_init": 2.0}, "losses", "parameters"),
    "freq_std": (SINE, {"freq_std": 0.2}, "losses", "parameters"),
    "damp_init": (SINE, {"damp_init": 0.5}, "losses", "parameters"),
    "damp_std": (SINE, {"damp_std": 0.005}, "losses", "parameters"),
    "decay_mode": (SINE, {"decay_mode": "relu"}, "losses", "parameters"),
    "trainable": (SINE, {"trainable": False}, "losses parameters", "tokens"),
    "learnable": (SINE, {"learnable": ["frequency"]}, "losses parameters", "tokens"),
    "amp_bounds": (SINE, {"amp_bounds": [0.999, 1.001]}, "losses", "parameters"),
    "freq_bounds": (SINE, {"freq_bounds": [0.999, 1.001]}, "losses", "parameters"),
    "damp_bounds": (SINE, {"damp_bounds": [0.00999, 0.01001]}, "losses", "parameters"),
}
SHORT_CONV_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "enabled": ({}, {"enabled": False}, "losses parameters", "tokens"),
    "kernel_size": ({}, {"kernel_size": 2}, "losses parameters", "tokens"),
    "dilation_growth": ({"n_layers": 2}, {"dilation_growth": 2}, "losses", "parameters"),
    "places": ({}, {"places": ["mlp"]}, "losses parameters", "tokens"),
    "activation": ({}, {"activation": "sine"}, "losses parameters", "tokens"),
}


@pytest.mark.parametrize(
    ("section", "covered"),
    [
        (TrainConfig, {*TRAIN_KEYS, *OTHER_TRAIN_KEYS}),
        (DataConfig, {*DATA_KEYS, "cache_dir"}),  # data/test_remote_prepared.py
        (ModelConfig, {*MODEL_KEYS, "sine_params", "short_conv"}),
        (SineConfig, {*SINE_KEYS}),
        (ShortConvConfig, {*SHORT_CONV_KEYS}),
    ],
)
def test_every_configuration_key_has_a_test(section: type[Section], covered: set[str]) -> None:
    assert covered == set(section.model_fields)


def assert_differ(pair: tuple[Seen, Seen], differing: str, equal: str) -> None:
    a, b = pair
    for name in differing.split():
        assert getattr(a, name) != getattr(b, name), f"{name} did not change"
    for name in equal.split():
        assert getattr(a, name) == getattr(b, name), f"{name} changed"


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("key", TRAIN_KEYS)
def test_train_key_changes_the_run(
    key: str,
    compare: Callable[..., tuple[Seen, Seen]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psannlm.runtime.device.computes_in_bf16", lambda device: True)
    before, after, differing, equal = TRAIN_KEYS[key]
    if key == "checkpoint_dir":
        after = {"checkpoint_dir": str(tmp_path / "b" / "other")}
    assert_differ(compare(before, after), differing, equal)


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("key", DATA_KEYS)
def test_data_key_changes_the_run(
    key: str, compare: Callable[..., tuple[Seen, Seen]], tmp_path: Path, tiny_texts: list[str]
) -> None:
    before, after, differing, equal = DATA_KEYS[key]
    if key == "sources":
        other = tmp_path / "other.txt"
        other.write_text("\n".join(reversed(tiny_texts * 2)), encoding="utf-8")
        after = {"sources": [str(other)]}
    if key == "tokenizer_model_path":
        after = {"tokenizer_model_path": str(CharTokenizer("éü").save(tmp_path / "other.json"))}
    assert_differ(compare({"data": before}, {"data": after}), differing, equal)


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("key", MODEL_KEYS)
def test_model_key_changes_the_run(key: str, compare: Callable[..., tuple[Seen, Seen]]) -> None:
    before, after, differing, equal = MODEL_KEYS[key]
    assert_differ(compare({"model": before}, {"model": after}), differing, equal)


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("key", SINE_KEYS)
def test_sine_key_changes_the_run(key: str, compare: Callable[..., tuple[Seen, Seen]]) -> None:
    before, after, differing, equal = SINE_KEYS[key]
    assert_differ(compare({"model": before}, {"model": {"sine_params": after}}), differing, equal)


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("key", SHORT_CONV_KEYS)
def test_short_conv_key_changes_the_run(key: str, compare: Callable[..., tuple[Seen, Seen]]) -> None:
    before, after, differing, equal = SHORT_CONV_KEYS[key]
    assert_differ(compare({"model": before}, {"model": {"short_conv": after}}), differing, equal)


@pytest.mark.usefixtures("_no_curve")
def test_compile_applies_to_trained_model(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def note(model: torch.nn.Module) -> torch.nn.Module:
        compiled.append(model)
        return model

    # The trial compile has tests of its own.
    monkeypatch.setattr("psannlm.kernels.compiler.trial_failure", lambda kind, **trust: None)
    monkeypatch.setattr("psannlm.training.run.torch.compile", note)
    monkeypatch.setattr("psannlm.kernels.compiler.shutil.which", lambda name: "/usr/bin/g++")
    train(tiny_run(max_steps=1, checkpoint_dir=tiny_run().train.checkpoint_dir + "_plain"))
    assert compiled == []
    result = train(tiny_run(max_steps=1, compile=True, device="cpu"))
    assert compiled == [result.model]


@pytest.mark.usefixtures("_no_curve")
def test_compile_without_compiler_raises_before_writing(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.kernels.compiler.shutil.which", lambda name: None)
    config = tiny_run(compile=True, device="cpu")
    with pytest.raises(DeviceError, match="compile: false"):
        train(config)
    assert not Path(config.train.checkpoint_dir).exists()


@pytest.mark.usefixtures("_no_curve")
def test_grad_checkpoint_recomputes_blocks_with_identical_numbers(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psannlm.models import transformer

    calls: list[object] = []
    original = transformer.checkpoint

    def note(block: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(block)
        return original(block, *args, **kwargs)

    monkeypatch.setattr(transformer, "checkpoint", note)
    model = {"dropout": 0.2, "n_layers": 2}
    plain = look(tiny_run(model=model, max_steps=2, checkpoint_dir=str(tmp_path / "a" / "run")))
    assert calls == []
    frugal = look(tiny_run(model=model, max_steps=2, checkpoint_dir=str(tmp_path / "b" / "run"), grad_checkpoint=True))
    assert len(calls) == 2 * 2 * 2  # blocks, micro-batches, steps
    assert frugal == plain


@pytest.mark.parametrize(
    ("train_key", "environment", "said"),
    [
        ({"ddp": "on"}, {}, "torchrun"),
        ({"ddp": True}, {}, "torchrun"),
        ({"fsdp": "full"}, {}, "psannlm train --nproc N"),
        ({"ddp": "off"}, {"WORLD_SIZE": "2", "RANK": "0"}, "ddp: auto"),
        ({"device": "cuda"}, {}, "no GPU"),
        ({"device": "cuda:1"}, {}, "no GPU"),
    ],
)
def test_run_unavailable_device_raises_before_writing(
    tiny_run: TinyRun,
    monkeypatch: pytest.MonkeyPatch,
    train_key: dict[str, Any],
    environment: dict[str, str],
    said: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tiny_run(**train_key)
    with pytest.raises(DeviceError, match=said):
        train(config)
    assert not Path(config.train.checkpoint_dir).exists()


def test_run_folder_holds_expected_files(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=4, save_interval_steps=2, eval_interval_steps=2)
    result = train(config)
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "best",
        "config.yaml",
        "latest",
        "loss_curve.png",
        "metrics.jsonl",
        "step_00000002",
        "status.json",
        "step_00000004",
        "system.json",
    }
    assert load_config(result.folder / "config.yaml") == config
    assert to_yaml(config) == (result.folder / "config.yaml").read_text(encoding="utf-8")
    assert json.loads((result.folder / "system.json").read_text(encoding="utf-8"))["packages"]["torch"]
    assert result.curve == result.folder / "loss_curve.png"
    assert result.curve.read_bytes().startswith(b"\x89PNG\r\n")
    assert {path.name for path in (result.folder / "step_00000004").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    }
    assert json.dumps(result.as_dict())
    assert not result.model.training
    assert result.parameters == sum(p.numel() for p in result.model.parameters())
    loaded = load_model(result.folder / "step_00000004").model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in result.model.state_dict().items())


@pytest.mark.parametrize("ending", ["interrupted", "not finite", "time budget"])
def test_run_ending_early_draws_loss_curve(tiny_run: TinyRun, ending: str) -> None:
    class End(Callback):
        def on_step(self, event: StepEvent) -> None:
            if event.step == 2 and ending == "interrupted":
                signal.raise_signal(signal.SIGINT)
            if event.step == 2 and ending == "not finite":
                with torch.no_grad():
                    model.final_norm.weight.fill_(float("nan"))

    config = tiny_run(max_steps=5)
    model = build_model(resolve(config.model, vocab_size=260, max_seq_len=16))
    with nullcontext() if ending == "time budget" else pytest.raises((Interrupted, TrainingError)):
        train(config, model=model, callbacks=[End()], time_budget_s=0.0 if ending == "time budget" else None)
    curve = Path(config.train.checkpoint_dir) / "loss_curve.png"
    assert curve.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.usefixtures("_no_curve")
def test_run_folder_expands_tilde(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    CharTokenizer("é").save(tmp_path / "t.json")
    result = train(tiny_run(max_steps=1, checkpoint_dir="~/run", data={"tokenizer_model_path": "~/t.json"}))
    assert result.folder == tmp_path / "run"
    assert load_config(tmp_path / "run" / "config.yaml").train.checkpoint_dir == "~/run"


@pytest.mark.usefixtures("_no_curve")
def test_run_max_steps_spans_several_epochs(tiny_run: TinyRun) -> None:
    """Each window is met once an epoch, so after whole epochs the labels seen are a whole multiple."""
    one = train(tiny_run(max_steps=None, checkpoint_dir=tiny_run().train.checkpoint_dir + "_one"))
    three = train(tiny_run(max_steps=3 * one.steps))
    assert three.tokens == 3 * one.tokens
    assert read_state(list_checkpoints(three.folder)[-1]).position.epoch == 3


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_tokens": 16_384}, "a step takes 2,048 windows, and the training text has"),
        ({"max_steps": None, "warmup_steps": 7}, "train.warmup_steps 7 reaches past the last step, 6"),
        ({"max_steps": None, "warmup_steps": 6}, None),
        (
            {"max_steps": None, "warmup_steps": 5, "schedule": "wsd", "cooldown_share": 0.34},
            "reaches into the cooldown",
        ),
        ({"max_steps": None, "warmup_steps": 4, "schedule": "wsd", "cooldown_share": 0.34}, None),
    ],
)
def test_config_warnings_appear_before_first_step(
    tiny_run: TinyRun, settings: dict[str, Any], said: str | None, logged: pytest.LogCaptureFixture
) -> None:
    plan_training(tiny_run(**settings))
    planned = [line for line in logged.messages if line.startswith("note:")]
    logged.clear()
    train(tiny_run(**settings))
    assert planned == [line for line in logged.messages if line.startswith("note:")]
    assert len(planned) == (said is not None)
    assert said is None or said in planned[0]


@pytest.mark.usefixtures("_no_curve")
def test_run_describes_itself_before_training(
    tiny_run: TinyRun, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    for max_steps, steps in ((1, " 1 step of 256 tokens; "), (2, " 2 steps of 256 tokens; ")):
        logged.clear()
        result = train(tiny_run(max_steps=max_steps, checkpoint_dir=str(tmp_path / f"{max_steps}")))
        assert logged.messages[0] == "reading and tokenizing the corpus"
        (line,) = (line for line in logged.messages if f"{result.parameters:,} parameters" in line)
        assert steps in line
        is_shown = [text.startswith("validation at") for text in logged.messages]
        assert logged.messages.index(line) == is_shown.index(True) - 1


@pytest.mark.usefixtures("_no_curve")
def test_run_trains_given_model_in_place(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=2)
    model = build_model(resolve(config.model, vocab_size=260, max_seq_len=16), seed=99)
    before = model.embedding.weight.detach().clone()
    result = train(config, model=model)
    assert result.model is model
    assert not torch.equal(model.embedding.weight, before)


@pytest.mark.usefixtures("_no_curve")
def test_run_refuses_model_with_too_small_vocabulary(tiny_run: TinyRun) -> None:
    config = tiny_run(max_steps=1)
    model = build_model(resolve(config.model, vocab_size=200, max_seq_len=16))
    with pytest.raises(ConfigError, match="200"):
        train(config, model=model)


@pytest.mark.usefixtures("_no_curve")
def test_run_with_same_seed_is_identical(tiny_run: TinyRun, tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = look(tiny_run(model={"dropout": 0.2}, checkpoint_dir=str(tmp_path / "a" / "run")))
    torch.manual_seed(2)
    b = look(tiny_run(model={"dropout": 0.2}, checkpoint_dir=str(tmp_path / "b" / "run")))
    assert a == b


def test_run_survives_failure_to_draw_curve(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> Path:
        raise PictureError("no Matplotlib here")

    monkeypatch.setattr("psannlm.training.run.draw_curve", fail)
    result = train(tiny_run(max_steps=2))
    assert (result.steps, result.curve) == (2, None)
    assert [text for text in logged.messages if "curve" in text] == ["note: no loss curve: no Matplotlib here"]


def _with_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr("psannlm.io.limits._physical_bytes", lambda: n_bytes)
    monkeypatch.setattr("psannlm.io.limits.cgroup_limit_bytes", lambda: n_bytes)


@pytest.mark.parametrize("asked", ["off", "full"])
def test_run_oversize_model_raises_before_writing(
    asked: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(max_steps=1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"fsdp": asked})})
    monkeypatch.setattr("psannlm.training.run.world_from_env", lambda ddp, fsdp: World(0, 0, 4))
    monkeypatch.setattr("psannlm.training.plan.local_ranks", lambda: 4)
    _with_memory(monkeypatch, 100_000)
    words = "a cgroup limits this process to 0.0 GB; lower model.d_model"
    with pytest.raises(ConfigError, match=rf"for the model alone .*of 4 ranks.*{words}"):
        train(config)
    assert not Path(config.train.checkpoint_dir).exists()


def test_run_model_too_large_for_gpu_raises(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "pick_device", lambda world, name: torch.device("cuda", 0))
    monkeypatch.setattr("psannlm.training.run.pick_precision", lambda amp, device: None)
    monkeypatch.setattr("psannlm.training.plan.gpu_memory_bytes", lambda device: 50_000)
    with pytest.raises(ConfigError, match=r"and the GPU has 0\.0 GB; .*train.fsdp: full"):
        train(tiny_run(max_steps=1))


def test_dry_run_of_million_layers_is_immediate(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(max_steps=1)
    deep = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": 1_000_000})})
    started_s = time.process_time()
    _with_memory(monkeypatch, 10**15)
    plan = plan_training(deep)
    assert plan.n_parameters > 10**9
    _with_memory(monkeypatch, 10**9)
    with pytest.raises(ConfigError, match="for the model alone"):
        plan_training(deep)
    assert time.process_time() - started_s < 8.0


@pytest.mark.slow
def test_run_status_records_how_the_run_ended(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt replaces the record of the one before."""
    config = tiny_run(max_steps=3, data={"val_split": 0.0})
    folder = Path(config.train.checkpoint_dir)
    step = loop.train_step

    def failing(error: BaseException) -> Callable[..., object]:
        def fail(*args: object, **settings: object) -> object:
            assert read_run_status(folder) is None, "a run in progress has no status"
            raise error

        return fail

    for error, status in (
        (DivergedError("step 1: loss nan: not finite"), RunStatus.DIVERGED),
        (StorageError("disk full"), RunStatus.FAILED),
        (Interrupted("stopped after step 1"), RunStatus.STOPPED),
    ):
        monkeypatch.setattr(loop, "train_step", failing(error))
        with pytest.raises(type(error)):
            train(config)
        assert read_run_status(folder) == (status, str(error))
    monkeypatch.setattr(loop, "train_step", step)
    train(config, time_budget_s=0.0)
    assert read_run_status(folder) == (RunStatus.STOPPED, None)
    train(config)
    assert read_run_status(folder) == (RunStatus.FINISHED, None)


def test_foreign_status_file_is_refused_and_kept(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    foreign = '{"status": "failed", "message": "of another program"}'
    (folder / "status.json").write_text(foreign, encoding="utf-8")
    with pytest.raises(StorageError, match=r"status\.json"):
        train(tiny_run(checkpoint_dir=str(folder)))
    assert (folder / "status.json").read_text(encoding="utf-8") == foreign
