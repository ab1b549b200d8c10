"""Fused passes with recomputation against the plain formulas: values, every gradient, and saved memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.kernels import recompute
from psannlm.models.transformer import Transformer

SETTINGS: list[dict[str, Any]] = [
    {"base": "waveresnet"},
    {"base": "waveresnet", "short_conv": {"dilation_growth": 3, "kernel_size": 5}, "tie_embeddings": True},
    {"base": "waveresnet", "short_conv": {"activation": "sine"}, "sine_params": {"decay_mode": "relu"}},
    {"base": "respsann", "sine_params": {"decay_mode": "none", "learnable": ["frequency"]}},
    {"base": "respsann", "positional_encoding": "alibi"},
    {"base": "transformer"},
    {"base": "transformer", "mlp": "gelu", "n_kv_heads": 1},
]


def loss_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:], 0.1)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recompute_losses_and_gradients_match_plain_formulas(
    settings: dict[str, Any], build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(**settings).train()
    leanly = loss_and_gradients(model)
    for module in ("mlp", "transformer"):
        monkeypatch.setattr(f"psannlm.models.{module}.use_recompute", lambda x: False)
    plainly = loss_and_gradients(model)
    torch.testing.assert_close(leanly[0], plainly[0], rtol=1e-6, atol=1e-5)
    assert leanly[1].keys() == plainly[1].keys()
    for name, gradient in plainly[1].items():
        torch.testing.assert_close(leanly[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_recompute_saves_less_for_backward(
    base: str, build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(base=base).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.ones(4, 8, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(ids, ids)
        return sum(sizes.values())

    leanly = kept()
    for module in ("mlp", "transformer"):
        monkeypatch.setattr(f"psannlm.models.{module}.use_recompute", lambda x: False)
    assert leanly < 0.9 * kept()


def test_recompute_is_off_for_compile_inference_double() -> None:
    x = torch.ones(2, 3)
    assert recompute.use_recompute(x)
    assert not recompute.use_recompute(x.double())
    with torch.no_grad():
        assert not recompute.use_recompute(x)
