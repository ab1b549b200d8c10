"""Samples at each validation: reported, logged, reproducible, and without effect on training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig
from psannlm.generation.generate import draw_samples
from psannlm.models.transformer import Transformer
from psannlm.runtime.log import receiving_messages
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.metrics import read_metrics
from psannlm.training.run import TrainResult, train

TinyRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("_no_curve")


def sampled(config: RunConfig) -> tuple[TrainResult, list[tuple[int, str, str]]]:
    lines: list[str] = []
    with receiving_messages(lines.append):
        result, rows = sampled_rows(config)
    assert [line for line in lines if line.startswith("sample ")] == [
        f"sample at step {step}: {' '.join(f'{prompt}{text}'.split())}" for step, prompt, text in rows
    ]
    return result, rows


@pytest.mark.slow
def test_samples_are_logged_once_per_validation_despite_resume(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Drawn in the middle of training, with dropout on, they change nothing of it."""
    model = {"dropout": 0.3}
    settings = {"model": model, "eval_interval_steps": 2, "save_interval_steps": 1, "max_steps": 5}
    keys = {"sample_prompts": ["The ", "", "A much longer prompt than the context of sixteen"], "sample_tokens": 20}
    straight, told = sampled(tiny_run(**settings, **keys, checkpoint_dir=str(tmp_path / "straight")))
    assert [(step, prompt) for step, prompt, _ in told] == [
        (step, prompt) for step in (2, 4, 5) for prompt in keys["sample_prompts"]
    ]
    assert all(text for _, _, text in told)
    without = train(tiny_run(**settings, checkpoint_dir=str(tmp_path / "without")))
    for a, b in zip(straight.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)

    class Crash(Callback):
        def on_step(self, event: StepEvent) -> None:
            if event.step == 5:
                raise KeyboardInterrupt

    config = tiny_run(**settings, **keys)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Crash()], sampler=draw_samples)
    resumed, again = sampled_rows(config)
    assert again == told
    assert resumed.steps == 5


def sampled_rows(config: RunConfig) -> tuple[TrainResult, list[tuple[int, str, str]]]:
    result = train(config, sampler=draw_samples)
    rows = [row for row in read_metrics(result.folder) if row["kind"] == "sample"]
    return result, [(row["step"], row["prompt"], row["text"]) for row in rows]


@pytest.mark.parametrize(
    ("change", "differs"),
    [({}, False), ({"sample_prompts": ["A "]}, True), ({"sample_tokens": 3}, True), ({"sample_prompts": []}, True)],
)
def test_samples_depend_on_their_keys_only(
    tiny_run: TinyRun, tmp_path: Path, change: dict[str, Any], differs: bool
) -> None:
    torch.manual_seed(1)
    _, one = sampled(tiny_run(max_steps=2))
    torch.manual_seed(2)
    _, other = sampled(tiny_run(max_steps=2, checkpoint_dir=str(tmp_path / "other"), **change))
    assert (one != other) == differs
    assert [prompt for _, prompt, _ in other] == change.get("sample_prompts", ["The "])


def test_sampler_receives_keys_and_seed(tiny_run: TinyRun) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], n_tokens: int, seed: int) -> list[str]:
        asked.append((model.training, tuple(prompts), n_tokens, seed))
        return ["x" for _ in prompts]

    train(tiny_run(max_steps=2, seed=7, sample_prompts=["a", "b"], sample_tokens=5), sampler=note)
    assert [row[1:] for row in asked] == [(("a", "b"), 5, 7)]


def test_samples_need_a_validation(tiny_run: TinyRun) -> None:
    assert sampled(tiny_run(max_steps=2, data={"val_split": 0.0}))[1] == []


@pytest.mark.parametrize("max_length", [1, 3, 4])
def test_samples_are_skipped_in_too_short_context(tiny_run: TinyRun, max_length: int) -> None:
    _, told = sampled(tiny_run(max_steps=1, data={"max_length": max_length}))
    assert [(step, prompt) for step, prompt, _ in told] == [(1, "The ")]
    assert bool(told[0][2]) == (max_length == 4)
