"""Models prepared for inference: the same function in fewer bytes, with the original unchanged."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from psannlm.config.model import BaseName, PositionKind
from psannlm.errors import GenerationError
from psannlm.generation import quantize as quantize_module
from psannlm.generation.quantize import (
    InferenceLinear,
    WeightDtype,
    in_fixed_row_blocks,
    prepare_for_inference,
    quantize,
    weight_bytes,
)
from psannlm.models.artifact import load_model, save_model
from psannlm.models.kv_cache import MAX_DECODE_TOKENS
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import computes_in_bf16

Build = Callable[..., Transformer]
BASES, POSITIONS, DTYPES = get_args(BaseName), get_args(PositionKind), get_args(WeightDtype)
CPU = torch.device("cpu")

# Every part that preparation touches: biases, residual scales, short convolutions with a sine, grouped queries.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True, "n_kv_heads": 1},
    {"residual_scale": True, "short_conv": {"enabled": True, "activation": "sine", "dilation_growth": 2}},
    {"mlp": "sine", "residual_scale": True, "tie_embeddings": True, "sine_params": {"decay_mode": "relu"}},
    {"mlp": "geglu", "qk_norm": True, "n_kv_heads": 1},
    {"mlp": "relu2"},
    {"mlp": "gelu", "sine_params": {"amp_bounds": [0.9, 1.1]}},
]


def logits_of(model: Transformer, n_tokens: int) -> Tensor:
    input_ids = torch.randint(0, 17, (3, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    with torch.no_grad():
        return model.logits(model.hidden_states(input_ids)).float()


def rounded(model: Transformer, dtype: WeightDtype) -> Transformer:
    """Return a plain model with the weights of a prepared one: scales folded in, then rounded."""
    prepared = copy.deepcopy(model)

    def to_dtype(weight: Tensor) -> Tensor:
        if dtype == "int8":
            whole, scale = quantize(weight)
            return whole.float() * scale[:, None]
        return weight.to(torch.bfloat16).float() if dtype == "bfloat16" else weight

    with torch.no_grad():
        if prepared.head is None:
            prepared.head = nn.Linear(prepared.embedding.weight.shape[1], 17, bias=False)
            prepared.head.weight.copy_(prepared.embedding.weight)
        for block in prepared.blocks:
            for linear, name in ((block.attention.out_proj, "attention_scale"), (block.mlp.down_proj, "mlp_scale")):
                if getattr(block, name) is not None:
                    linear.weight.mul_(getattr(block, name))
                    setattr(block, name, None)
        for module in prepared.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(to_dtype(module.weight))
        if dtype != "float32":
            prepared.embedding.weight.copy_(prepared.embedding.weight.bfloat16())
    return prepared


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_inference_model_float32_matches_original(
    base: str, position: str, is_compiled: bool, build_tiny: Build
) -> None:
    for variant in VARIANTS:
        model = build_tiny(base=base, positional_encoding=position, **variant)
        prepared = prepare_for_inference(model, "float32", is_compiled=is_compiled)
        for n_tokens in (1, 9, 20):
            torch.testing.assert_close(logits_of(prepared, n_tokens), logits_of(model, n_tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_inference_model_low_precision_equals_rounded_weights(
    base: str, dtype: WeightDtype, is_compiled: bool, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant, has_bf16 in product(VARIANTS, (True, False)):
        monkeypatch.setattr(
            quantize_module, "computes_in_bf16", lambda device, has=has_bf16: has and computes_in_bf16(device)
        )
        model = build_tiny(base=base, d_model=32, d_mlp=48, **variant)
        prepared, wanted = prepare_for_inference(model, dtype, is_compiled=is_compiled), rounded(model, dtype)
        for n_tokens in (1, 9, 20):
            found, reference = logits_of(prepared, n_tokens), logits_of(wanted, n_tokens)
            # Widened to float32, products are those of the rounded matrices; in bf16, activations are rounded as well.
            tolerance = 3e-2 if has_bf16 else 1e-5
            assert (found - reference).norm() <= tolerance * reference.norm(), (variant, has_bf16, n_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("n_inputs", [1, 12, 15, 16, 33, 48, 1100])
@torch.no_grad()
def test_inference_linear_error_is_within_rounding(dtype: WeightDtype, is_compiled: bool, n_inputs: int) -> None:
    generator = torch.Generator().manual_seed(n_inputs)
    weight = torch.randn(37, n_inputs, generator=generator)
    bias = torch.randn(37, generator=generator)
    linear = InferenceLinear(weight, bias, dtype, is_compiled=is_compiled)
    stands_for = weight.double()
    if dtype != "float32":
        whole, scale = quantize(weight)
        stands_for = (whole * scale[:, None] if dtype == "int8" else weight.bfloat16()).double()
    for n_rows, n_tokens in ((1, 1), (5, 1), (1, 16), (3, 16), (1, 17), (2, 40)):
        x = torch.randn(n_rows, n_tokens, n_inputs, generator=generator)
        found = linear(x)
        assert found.shape == (n_rows, n_tokens, 37)
        wanted = x.double() @ stands_for.t()
        # Input, scale and result are rounded by a relative 2^-9 each in bfloat16, and so is the sum with the bias.
        unit = 2.0**-7 if linear.in_bf16 else 2.0**-20
        allowed = unit * (x.double().abs() @ stands_for.abs().t() + bias.abs())
        assert ((found.double() - wanted - bias).abs() <= allowed).all(), (n_rows, n_tokens)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    exponent=st.integers(-30, 37),
    zero_row=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=80)
def test_quantize_error_is_half_a_step(shape: tuple[int, int], exponent: int, zero_row: bool, seed: int) -> None:
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).sub(0.5) * 10.0**exponent
    if zero_row:
        weight[0] = 0.0
    whole, scale = quantize(weight)
    assert (whole.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    error = (weight.double() - scale.double()[:, None] * whole.double()).abs()
    assert (error <= scale.double()[:, None] / 2 * (1 + 1e-4)).all()
    for row in range(shape[0]):
        assert whole[row].abs().max() == (127 if weight[row].any() else 0)


def test_quantize_outlier_affects_only_its_output() -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    calm = quantize(weight)
    weight[2, 7] = 1e4
    whole, scale = quantize(weight)
    others = [0, 1, 3]
    assert torch.equal(whole[others], calm[0][others])
    assert torch.equal(scale[others], calm[1][others])
    assert scale[2] == pytest.approx(1e4 / 127)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_prepare_for_inference_keeps_the_original(
    base: str, dtype: WeightDtype, tied: bool, training: bool, build_tiny: Build
) -> None:
    settings = {"residual_scale": True, "short_conv": {"enabled": True, "activation": "sine"}, "tie_embeddings": tied}
    model, untouched = (build_tiny(base=base, **settings).train(training) for _ in range(2))
    modules = {id(module) for module in model.modules()}
    prepared = prepare_for_inference(model, dtype)
    logits_of(prepared, 9)
    assert model.training is training
    assert not prepared.training
    assert not any(module.training for module in prepared.modules() if isinstance(module, nn.Dropout))
    assert modules.isdisjoint(id(module) for module in prepared.modules())
    assert modules == {id(module) for module in model.modules()}
    before, after = untouched.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in untouched.named_parameters()
    ]
    assert torch.equal(logits_of(model, 9), logits_of(untouched, 9))
    # It still learns, and its sines with it.
    starts = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    input_ids = torch.randint(0, 17, (3, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for each in (model, untouched):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = each(input_ids, input_ids)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, mine), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert not torch.equal(mine, starts[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS[1:4])
def test_preparing_in_place_computes_the_same(variant: dict[str, Any], dtype: WeightDtype, build_tiny: Build) -> None:
    model = build_tiny(**variant)
    expected = logits_of(prepare_for_inference(model, dtype), 5)
    prepared = prepare_for_inference(model, dtype, in_place=True)
    assert prepared is model
    assert torch.equal(logits_of(prepared, 5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preparing_in_place_frees_weights_and_mapped_file(
    dtype: WeightDtype, build_tiny: Build, tmp_path: Path
) -> None:
    save_model(tmp_path / "model.safetensors", build_tiny(tie_embeddings=True, short_conv={"enabled": True}), None)
    model = load_model(tmp_path / "model.safetensors").model
    matrices = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    prepare_for_inference(model, dtype, in_place=True)
    assert matrices
    assert [matrix for matrix in matrices if matrix() is not None] == []
    if sys.platform == "linux":
        assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "elements"),
    [
        # Width 12, 2 layers, feed-forward 16, vocabulary 17: q and out 144 each, k and v as the groups have it.
        ({"base": "transformer"}, 2 * (4 * 144 + 3 * 192) + 17 * 12),
        ({"base": "waveresnet", "n_kv_heads": 1}, 2 * (2 * 144 + 2 * 72 + 3 * 192) + 17 * 12),
        # Biases are not counted, nor is a second embedding; a tied one is read as the output matrix all the same.
        ({"base": "respsann"}, 2 * (4 * 144 + 2 * 192) + 17 * 12),
        ({"base": "respsann", "tie_embeddings": True}, 2 * (4 * 144 + 2 * 192) + 17 * 12),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_weight_bytes_known_values(
    settings: dict[str, Any], elements: int, is_compiled: bool, build_tiny: Build
) -> None:
    model = build_tiny(**settings)
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        assert weight_bytes(prepare_for_inference(model, dtype, is_compiled=is_compiled)) == size * elements  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("int4", "dtype 'int4' is not one of float32, bfloat16, int8 \\(did you mean 'int8'\\?\\)"),
        ("bf16", "dtype 'bf16' is not one of float32, bfloat16, int8"),
        (torch.int8, "dtype torch.int8 is not one of"),
        (None, "dtype None is not one of"),
    ],
)
def test_prepare_for_inference_unknown_dtype_raises(dtype: Any, said: str, build_tiny: Build) -> None:
    with pytest.raises(GenerationError, match=said):
        prepare_for_inference(build_tiny(), dtype)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_inputs", [32, 512, 1408])
@torch.no_grad()
def test_inference_linear_is_batch_invariant_bitwise(dtype: WeightDtype, n_inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = InferenceLinear(torch.randn(64, n_inputs, generator=generator), None, dtype, is_compiled=False)
    rows = torch.randn(12, 1, n_inputs, generator=generator)
    together = linear(rows)
    for n_together in (1, 2, 3, 5, 11):
        for first in range(12 - n_together):
            part = slice(first, first + n_together)
            assert torch.equal(linear(rows[part]), together[part]), n_together
    # Several tokens of one row, as in verification of a draft, get the same products too.
    assert torch.equal(linear(rows.transpose(0, 1)[:, :MAX_DECODE_TOKENS]), together.transpose(0, 1))


@pytest.mark.parametrize("n_tokens", [1, 7, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1, 300])
def test_fixed_row_blocks_have_one_shape_and_keep_rows(n_tokens: int) -> None:
    """With a product whose result reveals its number of rows: a row must get the same result in any batch."""
    x = torch.randn(5, n_tokens, 3, generator=torch.Generator().manual_seed(0))
    together = in_fixed_row_blocks(lambda rows: rows * len(rows), x)
    for rows in ([0], [3], [4, 1], [0, 1, 2, 3, 4]):
        assert torch.equal(in_fixed_row_blocks(lambda part: part * len(part), x[rows]), together[rows])
    factor = together / x
    torch.testing.assert_close(factor, factor[0, 0, 0].expand_as(factor))
