"""Transformer of every base, position encoding and convolution: causality, initialisation, loss and past_kvs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.config.constants import IGNORE_INDEX
from psannlm.config.model import BaseName, MlpKind, ModelConfig, PositionKind
from psannlm.models.kv_cache import KVCache
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
BASES, POSITIONS = get_args(BaseName), get_args(PositionKind)


def every_conv() -> Iterator[dict[str, Any]]:
    yield {"enabled": False}
    places = (("attention",), ("mlp",), ("attention", "mlp"))
    for kernel_size, growth, where, activation in product((1, 2, 3, 4, 6), (1, 2), places, ("none", "sine")):
        yield {
            "enabled": True,
            "kernel_size": kernel_size,
            "dilation_growth": growth,
            "places": where,
            "activation": activation,
        }


def tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 17, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Transformer, input_ids: Tensor) -> Tensor:
    return model.logits(model.hidden_states(input_ids))


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_transformer_is_causal(base: str, position: str, build_tiny: Build) -> None:
    n_tokens = 9
    original = tokens(1, n_tokens).repeat(n_tokens, 1)
    changed = original.clone()
    changed[range(n_tokens), range(n_tokens)] += 1  # row t differs at token t alone
    changed %= 17
    for conv in every_conv():
        model = build_tiny(base=base, positional_encoding=position, short_conv=conv)
        before, after = logits_of(model, original), logits_of(model, changed)
        for t in range(n_tokens):
            assert torch.equal(before[t, :t], after[t, :t]), (conv, t)
            # The change does show where it may: at the token and to its right.
            assert (before[t, t:] != after[t, t:]).any(-1).all(), (conv, t)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_transformer_depends_on_token_order(base: str, position: str, build_tiny: Build) -> None:
    # One layer and no convolution: two layers would distinguish the orders by the causal mask, without positions.
    model = build_tiny(base=base, positional_encoding=position, short_conv={"enabled": False}, n_layers=1)
    one, other = logits_of(model, torch.tensor([[3, 5, 7, 2], [5, 3, 7, 2]]))[:, -1]
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("kind", get_args(MlpKind))
@pytest.mark.parametrize("conv_activation", ["none", "sine"])
@torch.no_grad()
def test_init_zero_branches_unit_variance_preactivations(kind: str, conv_activation: str) -> None:
    conv = {"enabled": True, "activation": conv_activation}
    config = ModelConfig(mlp=kind, d_model=256, n_layers=2, n_heads=4, vocab_size=500, short_conv=conv)
    model = build_model(resolve(config), seed=0)
    input_ids = torch.randint(0, 500, (4, 50))
    inside: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("up_proj", "gate_proj", "q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(lambda _, __, out, name=name: inside.__setitem__(name, out))
    hidden = model.hidden_states(input_ids)
    assert len(inside) >= 8
    for name, out in inside.items():
        assert out.var().item() == pytest.approx(1.0, abs=0.1), name
    # Each branch ends in zeros, so the blocks pass the embedding on as it is.
    torch.testing.assert_close(hidden, model.final_norm(model.embedding(input_ids)), rtol=0, atol=0)
    # A new model predicts about uniformly: -ln(1/500) = 6.21.
    assert model(input_ids, input_ids).item() / 200 == pytest.approx(6.21, abs=0.2)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformer_loss_is_summed_cross_entropy(base: str, tied: bool, build_tiny: Build) -> None:
    model = build_tiny(base=base, tie_embeddings=tied)
    input_ids, labels = tokens(3, 8), tokens(3, 8, seed=1)
    labels[0, 3:6] = IGNORE_INDEX
    wanted = F.cross_entropy(logits_of(model, input_ids).flatten(0, 1), labels.flatten(), reduction="sum")
    assert model(input_ids, labels).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert model(input_ids, labels, 0.1).item() != pytest.approx(wanted.item(), rel=1e-3)
    assert model.output_weight.shape == (17, 12)
    assert (model.output_weight is model.embedding.weight) == tied


def test_transformer_every_parameter_gets_gradient(build_tiny: Build) -> None:
    for base in BASES:
        model = build_tiny(base=base, short_conv={"enabled": True, "activation": "sine"}, residual_scale=True)
        model(tokens(3, 8), tokens(3, 8, seed=1)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_residual_scale_scales_the_branches(build_tiny: Build) -> None:
    model = build_tiny(base="respsann")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.zero_()
        input_ids = tokens(2, 5)
        assert torch.equal(model.hidden_states(input_ids), model.final_norm(model.embedding(input_ids)))


def test_dropout_only_in_training(build_tiny: Build) -> None:
    model, plain = build_tiny(dropout=0.5), build_tiny()
    input_ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model.hidden_states(input_ids), plain.hidden_states(input_ids))
        model.train()
        assert not torch.equal(model.hidden_states(input_ids), model.hidden_states(input_ids))


def loss_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(tokens(3, 8), tokens(3, 8, seed=1))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_bit(base: str, dropout: float, build_tiny: Build) -> None:
    model = build_tiny(base=base, dropout=dropout).train()
    calls: list[str] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    loss, gradients = loss_and_gradients(model)
    assert len(calls) == 1
    model.grad_checkpoint = True
    loss_again, gradients_again = loss_and_gradients(model)
    assert len(calls) == 3  # once more for the loss, and again for the gradients
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@torch.no_grad()
def test_kv_cache_works_with_gradient_checkpointing(build_tiny: Build) -> None:
    model = build_tiny().train()
    model.grad_checkpoint = True
    input_ids = tokens(1, 6)
    state = KVCache.allocate(model.config, 1, 6, torch.device("cpu"), torch.float32)
    parts = [model.hidden_states(chunk, state) for chunk in input_ids.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(input_ids), rtol=1e-4, atol=1e-4)


def test_transformer_unresolved_config_raises() -> None:
    with pytest.raises(ValueError, match="resolve"):
        Transformer(ModelConfig())


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler for torch.compile"
)
@pytest.mark.filterwarnings("ignore")
def test_transformer_compiled_matches_eager(build_tiny: Build) -> None:
    model = build_tiny(n_layers=1).train()
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model)
    loss_compiled, gradients_compiled = loss_and_gradients(compiled)
    torch.testing.assert_close(loss_compiled, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_compiled[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("conv", [{}, {"enabled": True, "kernel_size": 3, "dilation_growth": 2}])
def test_past_kvs_logits_match_full_forward(base: str, position: str, conv: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(base=base, positional_encoding=position, short_conv=conv, max_seq_len=80)
    input_ids = tokens(2, 70)
    full = model(input_ids)
    assert full.shape == (2, 70, 17)
    torch.testing.assert_close(full, logits_of(model, input_ids), rtol=0, atol=0)
    # A prefill of whole blocks, one of odd length, single tokens, and past the end of a block of the cache.
    for sizes in ((32, 1, 1, 36), (3, 20, 1, 46), (61, *[1] * 9)):
        past, parts, start = None, [], 0
        for size in sizes:
            logits, past = model(input_ids[:, start : start + size], past_kvs=past, use_cache=True)
            parts.append(logits)
            start += size
        torch.testing.assert_close(torch.cat(parts, dim=1), full.detach(), rtol=1e-4, atol=1e-4)


def test_past_kvs_can_be_continued_twice(build_tiny: Build) -> None:
    model, prompt = build_tiny(), tokens(2, 6)
    _, past = model(prompt, use_cache=True)
    ends = [tokens(2, 3, seed=seed) for seed in (1, 2)]
    for end in (*ends, ends[0]):
        wanted = model(torch.cat((prompt, end), dim=1))[:, 6:].detach()
        torch.testing.assert_close(model(end, past_kvs=past), wanted, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        _, past = model(prompt, use_cache=True)
    assert model(ends[0], past_kvs=past).shape == (2, 3, 17)


def test_past_kvs_logits_have_no_gradient(build_tiny: Build) -> None:
    model, input_ids = build_tiny().train(), tokens(2, 8)
    loss = F.cross_entropy(model(input_ids).flatten(0, 1), tokens(2, 8, seed=1).flatten(), reduction="sum")
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model(input_ids, tokens(2, 8, seed=1)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert not model(input_ids, use_cache=True)[0].requires_grad


def test_transformer_invalid_input_raises(build_tiny: Build) -> None:
    model, input_ids = build_tiny(), tokens(2, 8)
    _, past = model(input_ids, use_cache=True)
    for call, said in (
        (lambda: model(input_ids[0]), r"\(8,\); give \(batch, time\)"),
        (lambda: model(input_ids[:, :0]), "time 1 or more"),
        (lambda: model(input_ids[:1], past_kvs=past), "2 rows, and input_ids has 1"),
        (lambda: model(input_ids, input_ids, use_cache=True), "without a KV cache"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
