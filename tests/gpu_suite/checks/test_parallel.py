"""GPU-05 and GPU-06: detection of diverging and failing ranks, and skipping without GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.train import TrainConfig
from psannlm.gpu_suite.checks import parallel as parallel_module
from psannlm.gpu_suite.checks.parallel import check_ddp, check_fsdp, efficiency_measure, parity_measures
from psannlm.gpu_suite.context import FULL, CheckContext
from psannlm.gpu_suite.suite import run_check
from psannlm.models.accounting import flops_per_token

pytestmark = pytest.mark.usefixtures("_no_curve")


@pytest.fixture
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.training.run.draw_curve", lambda folder, title, rows: folder / "loss_curve.png")


@pytest.mark.slow
def test_parallel_check_two_processes_match_one(context: CheckContext) -> None:
    result = check_ddp(context)
    assert result.status == "ok", result.problems()
    assert len(result.series["many"]) == 4


@pytest.mark.slow
def test_parallel_check_detects_diverging_ranks(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another learning rate the first loss is the same, and no later one."""
    original = parallel_module.run_config

    def config(context: CheckContext, name: str, **settings: Any) -> Any:
        if name.endswith("many"):
            settings.update(lr=2e-3, ddp="off", grad_accum_steps=2)
        return original(context, name, **settings)

    monkeypatch.setattr(parallel_module, "run_config", config)
    # In this process, which is quicker to start than two others.
    monkeypatch.setattr(
        parallel_module, "launch", lambda config, *others: parallel_module.train(config, resume="never")
    )
    assert [measure.name for measure in check_ddp(context).missed] == [
        "loss, one process against many",
        "weights at the end",
    ]


@pytest.mark.slow
def test_scaling_uses_equal_larger_steps(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser as often per token in one process as in many, and few rows, each of which waits for the device."""
    configs: dict[str, Any] = {}
    original = parallel_module.train

    def train(config: Any, resume: str) -> Any:
        configs[Path(config.train.checkpoint_dir).name] = config
        return original(config, resume=resume)

    monkeypatch.setattr(parallel_module, "train", train)

    def launch(config: Any, *others: Any) -> None:
        configs[Path(config.train.checkpoint_dir).name] = config
        original(config.model_copy(update={"train": config.train.model_copy(update={"ddp": "off"})}), resume="never")

    monkeypatch.setattr(parallel_module, "launch", launch)
    result = check_ddp(replace(context, sizes=replace(context.sizes, n_steps=8)))
    assert [measure.name for measure in result.measures][-1] == "scaling efficiency"
    one, many = configs["GPU-05_scaling_one"], configs["GPU-05_scaling_many"]
    scaling, training = context.sizes.scaling, context.sizes.training
    assert one.train.grad_accum_steps == many.train.grad_accum_steps == 1
    assert one.train.batch_tokens == many.train.batch_tokens == scaling.n_tokens > training.n_tokens
    assert one.model == many.model
    assert one.model.d_model == scaling.d_model > training.d_model
    assert one.train.log_interval_steps == many.train.log_interval_steps == 2
    assert configs["GPU-05_parity_one"].train.grad_accum_steps == 2
    assert configs["GPU-05_parity_many"].train.batch_tokens == training.n_tokens


def test_scaling_is_skipped_without_memory(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module, "fitting_rows", lambda *arguments: None)
    measures, note = parallel_module._scaling(context, "GPU-05", 2, {})
    assert measures == []
    assert note.startswith("scaling efficiency is left out")


def test_scaling_step_is_larger_at_full_size() -> None:
    assert FULL.scaling.n_tokens == 4 * FULL.training.n_tokens
    small, large = (flops_per_token(s.config("waveresnet"), s.seq_len) for s in (FULL.training, FULL.scaling))
    assert large > 10 * small


def test_parallel_check_reports_failing_rank(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module, "train", lambda config, resume: None)
    monkeypatch.setattr(parallel_module, "to_yaml", lambda config: "train: {lr: fast}")
    result = run_check("GPU-05", check_ddp, context)
    assert result.status == "error"
    assert "ended with exit code 2" in str(result.error)


def test_parallel_check_skips_with_one_gpu(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = check_ddp(replace(context, device=torch.device("cuda")))
    assert (result.status, result.skipped) == ("skipped", "there is one GPU; parallel training needs two")


def test_fsdp_check_skips_only_without_fsdp(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(parallel_module, "_check", lambda context, check, title, settings: asked.append(settings))
    monkeypatch.setattr(TrainConfig, "model_fields", {"lr": None})
    assert check_fsdp(context).status == "skipped"
    monkeypatch.setattr(TrainConfig, "model_fields", {"lr": None, "fsdp": None})
    check_fsdp(context)
    assert asked == [{"fsdp": "full"}]


def test_parity_and_scaling_limits() -> None:
    weights = {"one": {"w": torch.ones(4)}, "many": {"w": torch.ones(4) * 1.01}}
    assert [m.is_met for m in parity_measures([1.0, 2.0], [1.0, 2.0], {**weights, "many": weights["one"]})] == [
        True,
        True,
    ]
    assert [m.is_met for m in parity_measures([1.0, 2.0], [1.0, 2.001], weights)] == [False, False]
    assert not parity_measures([], [], weights)[0].is_met, "no loss is no parity"
    for place in range(3):
        losses = [3.0, 2.0, 1.0]
        losses[place] = float("nan")
        assert not parity_measures([3.0, 2.0, 1.0], losses, weights)[0].is_met, "no number is no parity either"
    assert not efficiency_measure([100.0] * 4, [90.0] * 4, 2, is_dry_run=False).is_met
    assert efficiency_measure([100.0] * 4, [190.0] * 4, 2, is_dry_run=False).is_met
