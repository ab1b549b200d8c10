"""Training benchmark: figures follow from the clock, reference models have our size, every candidate trains."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from psannlm.benchmarks.harness import roofline as peaks
from psannlm.benchmarks.harness.interleaved import Count
from psannlm.benchmarks.harness.reference_gpt import TrainableGpt, gpt_parameters
from psannlm.benchmarks.harness.reference_llama import (
    TrainableLlama,
    llama_flops_per_token,
    llama_parameters,
    llama_width,
)
from psannlm.benchmarks.training import bench
from psannlm.benchmarks.training.bench import bench_train
from psannlm.benchmarks.training.candidates import Candidate, ThroughputSettings, TrainingRun, config_of, size_of
from psannlm.benchmarks.training.peak_memory import peak_step_bytes
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, DeviceError, PsannlmError
from psannlm.models.accounting import count_parameters, flops_per_token
from psannlm.models.registry import resolve

CPU = torch.device("cpu")
MODEL = resolve(ModelConfig(d_model=16, n_layers=2, n_heads=2, d_mlp=32, vocab_size=50), max_seq_len=8)
SETTINGS = ThroughputSettings(MODEL, seq_len=8, batch_tokens=37, amp="fp32", repeats=3, steps=2, also=("gelu",))


class FakeRun:
    """A candidate whose steps take a known time: the first one ``first_s`` more."""

    seconds: ClassVar = {"waveresnet": 2.0, "waveresnet with GELU": 1.6, "waveresnet with checkpointing": 4.0}
    first_s = 30.0
    now = 0.0

    def __init__(self, candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> None:
        self.candidate, self.description = candidate, "fake"
        self.losses: list[float] = []

    def steps(self, n_steps: int, count: Count) -> None:
        for done in range(1, n_steps + 1):
            FakeRun.now += self.seconds[self.candidate.name] + (0 if self.losses else self.first_s)
            self.losses.append(5.0)
            count(done, n_steps)


@pytest.fixture
def peak_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "matrix_peak", lambda *arguments, **named: lambda count: 1e6)


def fake_clock() -> float:
    return FakeRun.now


@pytest.mark.slow
@pytest.mark.usefixtures("peak_of_100")
def test_bench_train_figures_follow_the_clock() -> None:
    settings = replace(SETTINGS, also=("gelu", "grad-checkpoint"))
    memory = {"waveresnet": 700, "waveresnet with GELU": 1000, "waveresnet with checkpointing": 350}
    report = bench_train(
        settings,
        CPU,
        build=FakeRun,  # type: ignore[arg-type]
        measure_memory=lambda candidate, settings, device: memory[candidate.name],
        clock=fake_clock,
    )
    ours, gelu, checkpointed = report.rows
    # 37 tokens are four windows of 8.
    assert report.tokens_per_s(ours).median == 32 / 2.0
    assert (ours.first_step_s, gelu.first_step_s) == (32.0, pytest.approx(31.6))
    assert report.utilisation(ours).median == pytest.approx(flops_per_token(MODEL, 8) * 16.0 / 1e6)
    assert report.speed_of_ours_over(gelu).median == pytest.approx(0.8)
    assert report.speed_of_ours_over(checkpointed).median == pytest.approx(2.0)
    cost = report.sine_cost(is_compiled=False)
    assert cost is not None
    assert cost.median == pytest.approx(0.25)
    assert report.sine_cost(is_compiled=True) is None
    assert report.memory_of_ours_over(gelu) == 0.7
    assert report.memory_of_ours_over(checkpointed) == 2.0
    assert report.problems == []
    plain = json.loads(json.dumps(report.metrics("20260101_000000").as_dict()))
    first = plain["rows"][0]
    assert (first["timestamp"], first["base"], first["batch_tokens"]) == ("20260101_000000", "waveresnet", 32)
    assert (first["tokens_per_s"], first["peak_bytes"]) == (16.0, 700)
    # One first step, two to warm up, three rounds of two.
    assert len(ours.losses) == 1 + 2 + 3 * 2


@pytest.mark.slow
@pytest.mark.usefixtures("peak_of_100")
def test_bench_train_run_lasts_about_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "seconds", {"waveresnet": 0.5, "waveresnet with GELU": 0.25})
    settings = replace(SETTINGS, steps=None)
    report = bench_train(settings, CPU, build=FakeRun, measure_memory=None, clock=fake_clock)  # type: ignore[arg-type]
    assert report.steps_per_run == 4
    assert report.ours.step_s == [0.5] * 3
    assert report.ours.peak_bytes is None
    assert report.memory_of_ours_over(report.rows[1]) is None


@pytest.mark.slow
def test_candidates_train_and_differ_in_one_factor() -> None:
    settings = replace(SETTINGS, also=("gelu", "grad-checkpoint"), steps=1, repeats=1)
    report = bench_train(settings, CPU, measure_memory=None)
    ours, gelu, checkpointed = report.rows
    for row in report.rows:
        assert row.losses[-1] < row.losses[0]
    # Recomputing changes no number; another activation does, though at first every branch is zero.
    assert checkpointed.losses == ours.losses
    assert gelu.losses[0] == ours.losses[0]
    assert gelu.losses[-1] != ours.losses[-1]
    assert ours.parameters - gelu.parameters == count_parameters(MODEL)["sine"]
    for row in report.rows:
        run = TrainingRun(row.candidate, settings, CPU)
        assert sum(p.numel() for p in run._module.parameters()) == row.parameters


@pytest.mark.slow
def test_candidate_transformer_has_our_size_and_trains() -> None:
    """SwiGLU without short convolutions, of the nearest width; SiLU in the sine's place leaves the convolutions."""
    model = resolve(ModelConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=50), max_seq_len=8)
    settings = replace(SETTINGS, model=model, also=("silu", "transformer", "compile"), steps=1, repeats=1)
    names = [candidate.name for candidate in settings.candidates()]
    assert names == [
        *(plain := ["waveresnet", "waveresnet with SiLU", "transformer"]),
        *(f"{n}, compiled" for n in plain),
    ]
    for candidate in settings.candidates()[1:3]:
        parameters, operations = size_of(candidate, settings)
        run = TrainingRun(candidate, settings, CPU)
        assert sum(p.numel() for p in run._module.parameters()) == parameters
        ours = sum(count_parameters(model).values())
        least = ours if candidate.is_baseline else ours - count_parameters(model)["sine"]
        assert abs(parameters / least - 1) < (0.01 if candidate.is_baseline else 1e-9)
        assert operations == flops_per_token(config_of(candidate, settings), 8)
        run.steps(3, lambda done, all_steps: None)
        assert run.losses[-1] < run.losses[0]
    baseline = config_of(settings.candidates()[2], settings)
    assert (baseline.mlp, baseline.short_conv.enabled, baseline.base) == ("swiglu", False, "transformer")
    assert config_of(settings.candidates()[1], settings) == model
    report = bench_train(replace(settings, also=("transformer",)), CPU, measure_memory=None)
    assert [row["mlp"] for row in report.metrics("now").as_dict()["rows"]] == ["sineglu", "swiglu"]
    assert report.sine_cost(is_compiled=False) is None


@pytest.mark.slow
def test_throughput_report_lists_non_finite_losses() -> None:
    report = bench_train(replace(SETTINGS, steps=1, repeats=1), CPU, measure_memory=None)
    report.rows[1].losses[-1] = float("nan")
    assert report.problems == ["waveresnet with GELU: a loss is not finite"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 7}, "batch_tokens 7 is too small; use 8"),
        ({"repeats": 0}, "repeats 0 is too small"),
        ({"also": ("gleu",)}, "did you mean 'gelu'"),
        ({"against": ("transformer",)}, "did you mean 'transformers'"),
        ({"against": ("pytorch", "pytorch")}, "names a library twice"),
        ({"model": resolve(MODEL.model_copy(update={"base": "transformer", "mlp": "swiglu"}))}, "transformer has swig"),
    ],
)
def test_throughput_settings_refuse_unusable_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changes)


def test_matrix_peak_is_the_fastest_pass() -> None:
    now = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])
    assert peaks.peak_rate([lambda: torch.zeros(1)], 100, CPU, lambda: next(now)) == 50.0


@pytest.mark.slow
def test_peak_memory_covers_weights_gradients_and_state() -> None:
    model = resolve(ModelConfig(base="transformer", d_model=256, n_layers=2, n_heads=4, vocab_size=8192))
    settings = ThroughputSettings(model, seq_len=8, batch_tokens=8, amp="fp32")
    needed = 16 * size_of(settings.candidates()[0], settings)[0]
    peak = peak_step_bytes(settings.candidates()[0], settings, CPU)
    assert peak is not None
    assert 0.9 * needed < peak < 2 * needed


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed"
)


@needs_transformers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trainable_reference_model_has_our_size_and_learns() -> None:
    model = resolve(ModelConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=500), max_seq_len=16)
    settings = ThroughputSettings(model, seq_len=16, batch_tokens=64, amp="fp32", against=("transformers",))
    reference_model = settings.candidates()[1]
    run = TrainingRun(reference_model, settings, CPU)
    for _ in range(4):
        run.step()
    assert run.losses[-1] < run.losses[0]
    parameters, flops = size_of(reference_model, settings)
    assert sum(p.numel() for p in run._module.parameters()) == parameters
    assert flops == llama_flops_per_token(model, llama_width(model, size_of(settings.candidates()[0], settings)[0]), 16)
    assert str(parameters)[:3] in run.description.replace(",", "")


@needs_transformers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trainable_reference_model_sums_loss_over_labels() -> None:
    llama = TrainableLlama(MODEL, llama_parameters(MODEL, 32), 8, 0, False)
    ids = torch.arange(16).view(2, 8)
    logits = llama.llama(input_ids=ids).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), (ids + 1).flatten(), reduction="sum")
    torch.testing.assert_close(llama(ids, ids + 1), wanted)
    with pytest.raises(PsannlmError, match="no label smoothing"):
        llama(ids, ids, 0.1)


def test_gpt_computes_what_torch_encoder_layers_compute() -> None:
    config = resolve(ModelConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=50, tie_embeddings=True), max_seq_len=12)
    gpt = TrainableGpt(config, gpt_parameters(config, 48, 12), 12, 0, grad_checkpoint=False)
    assert gpt.width == 48
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    x = gpt.embedding(ids) + gpt.positions(torch.arange(12))
    for block in gpt.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            32, 2, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False
        )
        layer.self_attn.in_proj_weight = block.qkv.weight
        layer.self_attn.out_proj.weight = block.out.weight
        layer.linear1.weight, layer.linear2.weight = block.up.weight, block.down.weight
        x = layer(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(12), is_causal=True)
    logits = torch.nn.functional.layer_norm(x, (32,)) @ gpt.embedding.weight.T
    labels = ids.roll(-1, 1)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(gpt(ids, labels), wanted)


def test_gpt_trains_with_our_parameter_count() -> None:
    model = resolve(ModelConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=500), max_seq_len=16)
    settings = ThroughputSettings(model, seq_len=16, batch_tokens=64, amp="fp32", against=("pytorch",))
    ours, gpt = settings.candidates()
    run = TrainingRun(gpt, settings, CPU)
    for _ in range(4):
        run.step()
    assert run.losses[-1] < run.losses[0]
    parameters, flops = size_of(gpt, settings)
    assert sum(p.numel() for p in run._module.parameters()) == parameters
    assert abs(parameters / size_of(ours, settings)[0] - 1) < 0.02
    recomputing = TrainingRun(replace(gpt, grad_checkpoint=True), settings, CPU)
    recomputing.step()
    assert recomputing.losses == run.losses[:1]
    # Forward and backward: three times the multiply-adds of the matrix products, each as two.
    with FlopCounterMode(display=False) as counter:
        run.step()
    per_token = counter.get_total_flops() / settings.tokens_per_step
    assert per_token == pytest.approx(flops, rel=0.1)


@pytest.mark.parametrize("changes", [{"is_compiled": True}, {"also": ("compile",)}])
def test_bench_train_missing_compiler_fails_early(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: object) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr("psannlm.kernels.compiler.missing_to_compile", lambda device: "a C++ compiler (install g++)")
    with pytest.raises(DeviceError, match=r"--compile or --also compile needs a C\+\+ compiler.*or leave it out"):
        bench_train(replace(SETTINGS, **changes), CPU, build=measure, measure_memory=measure)  # type: ignore[arg-type]
