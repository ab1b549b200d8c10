"""The quantizer gives hand-computed values; scales come from where they should; the loss approaches the unquantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.data.memory_store import store_from_ids
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError
from psannlm.evaluation.activation_quantization import QuantizationSettings, evaluate_quantized, token_scales
from psannlm.evaluation.activation_ranges import MagnitudeHistogram, fake_quantize, known_range, largest_integer
from psannlm.evaluation.loss import evaluate
from psannlm.evaluation.matrix_inputs import MatrixInput, matrix_inputs, visit_inputs
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision

FP32 = Precision(torch.device("cpu"), torch.float32, "fp32 as asked")
SEQ_LEN = 8


def windows_of(*seeds: int, n_tokens: int = 27) -> Windows:
    """A document of ``n_tokens`` for each seed: with BOS and EOS 29 ids, and padding at the end."""
    drawn = (torch.Generator().manual_seed(seed) for seed in seeds)
    documents = [torch.randint(4, 17, (n_tokens,), generator=generator).tolist() for generator in drawn]
    store = store_from_ids(documents, 17, bos_id=1, eos_id=2, doc_bytes=[3 * n_tokens] * len(seeds))
    return Windows(store, SEQ_LEN, pad_id=0)


def test_quantizer_gives_values_computed_by_hand() -> None:
    """Three bits are -3 to 3; with the scale 0.5 the halves 0.25, 0.75 and 1.25 go to the even integers 0, 2, 2."""
    x = torch.tensor([0.0, 0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 0.3, -1.1, 1.5, 9.0, -9.0])
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, -1.0, -1.0, 0.5, -1.0, 1.5, 1.5, -1.5])
    assert torch.equal(fake_quantize(x, torch.tensor(0.5), 3), expected)
    assert torch.equal(fake_quantize(x, torch.tensor(0.0), 3), torch.zeros(12))
    assert [largest_integer(bits) for bits in (2, 4, 8, 16)] == [1, 7, 127, 32767]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantizer_is_odd_and_errs_half_a_step(bits: int) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x[3] = 0
    scales = token_scales(x, bits)
    rounded = fake_quantize(x, scales, bits)
    assert torch.equal(fake_quantize(-x, scales, bits), -rounded)
    assert bool(((rounded - x).abs() <= scales / 2 * (1 + 1e-9)).all())
    assert torch.equal(rounded[3], x[3])
    # Both the largest magnitude and as many values as the bits allow are reached.
    assert torch.allclose(rounded.abs().amax(1), x.abs().amax(1))
    assert len(torch.unique((rounded[0] / scales[0]).round())) <= 2**bits - 1


def test_dynamic_scale_is_one_per_token() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    larger = x.clone()
    larger[1, 2] *= 64
    before, after = (fake_quantize(each, token_scales(each, 4), 4) for each in (x, larger))
    assert torch.equal(after[1, 2], 64 * before[1, 2])
    after[1, 2] = before[1, 2]
    assert torch.equal(after, before)


@pytest.mark.parametrize("mlp", ["sine", "swiglu"])
def test_logits_error_falls_with_every_bit_added(mlp: str, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(mlp=mlp)
    ids, _ = windows_of(0, 1).batch(range(4))
    errors = []
    with torch.no_grad():
        plain = model(ids)
        for bits in (2, 3, 4, 6, 8, 12, 16):

            def visit(where: MatrixInput, x: Tensor, bits: int = bits) -> Tensor:
                return fake_quantize(x, token_scales(x, bits), bits)

            with visit_inputs(matrix_inputs(model), visit):
                errors.append(float((model(ids) - plain).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[2]


@pytest.mark.parametrize("mlp", ["sine", "swiglu"])
def test_sixteen_bits_keep_the_loss(mlp: str, build_tiny: Callable[..., Transformer]) -> None:
    found = evaluate_quantized(build_tiny(mlp=mlp), windows_of(0, 1, 2), QuantizationSettings((16, 3)), precision=FP32)
    for each in found.losses:
        assert each.difference == each.loss - found.loss
        if each.bits == 16 and each.scale == "dynamic":
            assert abs(each.difference) < 1e-4
        if each.bits == 3:
            assert abs(each.difference) > 1e-4


def test_unquantized_loss_is_that_of_the_scored_windows(build_tiny: Callable[..., Transformer]) -> None:
    model, text = build_tiny(), windows_of(0, 1, 2)
    found = evaluate_quantized(model, text, QuantizationSettings((8,), calibration_tokens=17), precision=FP32)
    whole = evaluate(model, text, precision=FP32)
    calibrating = [at * len(text) // 3 for at in range(3)]
    ids, labels = text.batch(calibrating)
    assert found.calibration_tokens == int((labels >= 0).sum())
    assert found.tokens + found.calibration_tokens == whole.n_labels
    with torch.no_grad():
        first = float(model(ids, labels))
    assert found.loss == pytest.approx((whole.nats - first) / found.tokens, rel=1e-5)
    assert found.bits_per_byte / found.loss == pytest.approx(whole.bits_per_byte / whole.loss, rel=0.02)


def test_static_scale_does_not_depend_on_scored_text(build_tiny: Callable[..., Transformer]) -> None:
    model, calibration = build_tiny(mlp="swiglu"), windows_of(0)
    settings = QuantizationSettings((4,), calibration_tokens=3 * SEQ_LEN)
    ours, theirs = (
        evaluate_quantized(model, windows_of(*seeds), settings, precision=FP32, calibration=calibration)
        for seeds in ((1, 2), (5, 6, 7, 8))
    )
    assert ours.tokens == evaluate(model, windows_of(1, 2), precision=FP32).n_labels, "all of the text is scored"
    for here, there in zip(ours.places, theirs.places, strict=True):
        assert [each.calibrated_max for each in here.layers] == [each.calibrated_max for each in there.layers]
    assert [place.kurtosis for place in ours.places] != [place.kurtosis for place in theirs.places]


@pytest.mark.parametrize("kind", ["static", "static_least_error", "static_known_range"])
def test_static_losses_follow_from_the_reported_maxima(kind: str, build_tiny: Callable[..., Transformer]) -> None:
    model, text = build_tiny(mlp="sine"), windows_of(0, 1, 2)
    settings = QuantizationSettings((4,), places=("down",), calibration_tokens=1)
    found = evaluate_quantized(model, text, settings, precision=FP32)
    assert [place.place for place in found.places if place.is_quantized] == ["down"]
    (down,) = (place for place in found.places if place.place == "down")

    def visit(where: MatrixInput, x: Tensor) -> Tensor | None:
        if where.place != "down":
            return None
        assert where.layer is not None
        layer = down.layers[where.layer]
        largest = {
            "static": layer.calibrated_max,
            "static_least_error": layer.least_error_max["4"],
            "static_known_range": layer.known_max,
        }[kind]
        assert largest is not None
        return fake_quantize(x, torch.tensor(largest / 7), 4)

    ids, labels = text.batch(range(1, len(text)))
    with torch.no_grad(), visit_inputs(matrix_inputs(model), visit):
        expected = float(model(ids, labels)) / found.tokens
    (loss,) = (each.loss for each in found.losses if each.scale == kind)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert abs(loss - found.loss) > 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tail", ["normal", "heavy", "bounded"])
def test_least_error_range_beats_all_others(bits: int, tail: str) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(bits))
    x = {"normal": x, "heavy": x * (x * 1.5).exp(), "bounded": 2.5 * torch.sin(3 * x)}[tail]
    largest = float(x.abs().max())
    histogram = MagnitudeHistogram(largest)
    for part in x.split(20_000):
        histogram.add(part.view(-1, 8))

    def error(range_: float) -> float:
        return float((fake_quantize(x, torch.tensor(range_ / largest_integer(bits)), bits) - x).square().sum())

    found = histogram.least_error_range(bits)
    others = [error(largest * k / 1000) for k in range(2, 1001)]
    assert error(found) <= 1.01 * min(others)
    # What lies in the tail is worth clipping, the edge of a bounded value is not.
    assert (found < 0.7 * largest) == (tail != "bounded" and bits < 8)


def test_least_error_range_of_zeros_and_outlier() -> None:
    zeros = MagnitudeHistogram(0.0)
    zeros.add(torch.zeros(3, 4))
    assert zeros.least_error_range(4) == 0.0
    outlier = MagnitudeHistogram(100.0)
    outlier.add(torch.cat([torch.linspace(-1, 1, 10**6), torch.tensor([-100.0])]))
    assert 1 < outlier.least_error_range(8) < 100
    assert MagnitudeHistogram(1.0).least_error_range(4) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp": "sine"},
        {"mlp": "sine", "sine_phase": 0.7},
        {"mlp": "sine", "sine_quadrature": True},
        {"mlp": "sine", "activation_gains": True},
        {"mlp": "clampedsine"},
        {"mlp": "tanh"},
        {"mlp": "sigmoid"},
    ],
    ids=str,
)
def test_known_range_holds_and_is_reached(settings: dict[str, Any], build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(sine_params={"decay_mode": "none"}, **settings)
    mlp = model.blocks[0].mlp
    bound = known_range(mlp)
    assert bound is not None
    reached = []
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: reached.append(float(inputs[0].abs().max())))
    with torch.no_grad():
        mlp(100 * torch.randn(1, 5000, 12, generator=torch.Generator().manual_seed(0)))
    assert 0.98 * bound < reached[0] <= bound * (1 + 1e-6)


@pytest.mark.parametrize("mlp", ["sineglu", "swiglu", "gelu", "relu2", "tanhglu", "gelusine", "sinerelu2"])
def test_unbounded_inputs_have_no_known_range(mlp: str, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(mlp=mlp)
    assert known_range(model.blocks[0].mlp) is None
    found = evaluate_quantized(model, windows_of(0, 1), QuantizationSettings((8,)), precision=FP32)
    assert [each.scale for each in found.losses] == ["static", "static_least_error", "dynamic"]


def test_reported_tails_are_those_of_captured_inputs(build_tiny: Callable[..., Transformer]) -> None:
    """Of every scored position, and no padding."""
    model, text = build_tiny(mlp="swiglu"), windows_of(0, 1)
    found = evaluate_quantized(model, text, QuantizationSettings((2,), calibration_tokens=1), precision=FP32)
    captured: list[Tensor] = []
    handle = model.blocks[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    ids, labels = text.batch(range(1, len(text)))
    assert int((labels < 0).sum()) > 1
    with torch.no_grad():
        model(ids, labels)
    handle.remove()
    x = captured[0].double().numpy()[labels.numpy() >= 0]
    (down,) = (place for place in found.places if place.place == "down")
    rms = np.sqrt((x**2).mean())
    assert down.layers[1].kurtosis == pytest.approx(((x - x.mean()) ** 4).mean() / x.var() ** 2, rel=1e-5)
    assert down.layers[1].max_over_rms == pytest.approx(np.abs(x).max() / rms, rel=1e-5)
    assert down.kurtosis == pytest.approx((down.layers[0].kurtosis + down.layers[1].kurtosis) / 2)
    assert down.largest_max_over_rms == max(each.max_over_rms for each in down.layers)


@pytest.mark.parametrize("fails", [False, True])
def test_quantized_evaluation_leaves_the_model(fails: bool, build_tiny: Callable[..., Transformer]) -> None:
    model, text = build_tiny(mlp="sine").train(), windows_of(0, 1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    n_passes = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal n_passes
        n_passes += 1
        if fails and n_passes == 4:
            raise RuntimeError("stop")

    handle = model.final_norm.register_forward_pre_hook(count)
    settings = QuantizationSettings((4,))
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            evaluate_quantized(model, text, settings, precision=FP32)
    else:
        evaluate_quantized(model, text, settings, precision=FP32)
    assert n_passes == (4 if fails else 7)  # calibration twice, unquantized, and four ways
    handle.remove()
    assert model.training
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_quantized_evaluation_refuses_what_it_cannot_do(build_tiny: Callable[..., Transformer]) -> None:
    for wrong in ({"bits": ()}, {"bits": (1,)}, {"bits": (17,)}, {"bits": (8,), "places": ("mlp",)}):
        with pytest.raises(ConfigError, match=r"2 to 16|qkv, attention_output"):
            QuantizationSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 or more"):
        QuantizationSettings((8,), calibration_tokens=0)
    absent = QuantizationSettings((8,), places=("qkv_features",))
    with pytest.raises(ConfigError, match="qkv_features; name qkv, attention_output, gate_up, down, head"):
        evaluate_quantized(build_tiny(), windows_of(0), absent, precision=FP32)
    with pytest.raises(CorpusError, match="take 4 windows of 8 tokens, and the text has 4"):
        evaluate_quantized(
            build_tiny(), windows_of(0), QuantizationSettings((8,), calibration_tokens=27), precision=FP32
        )


def test_products_that_bypass_their_module_are_refused(
    build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(mlp="gelu")
    mlp = model.blocks[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: F.linear(F.gelu(mlp.up_proj(x)), mlp.down_proj.weight))
    with pytest.raises(ValueError, match="1 products without a call of their modules, first down of layer 1"):
        evaluate_quantized(model, windows_of(0, 1), QuantizationSettings((8,)), precision=FP32)
    assert all(not module._forward_pre_hooks for module in model.modules())
