"""Losses, gradients and generated text on a GPU against those on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from psannlm.config.model import ModelConfig
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.requests import SamplingConfig
from psannlm.models.registry import resolve
from psannlm.models.short_conv import ShortConv
from psannlm.models.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
BASES = ("respsann", "waveresnet", "transformer")
POSITIONS = ("rope", "alibi", "sinusoidal")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_gpu_loss_and_gradients_match_cpu(build_tiny: Callable[..., Transformer], base: str, positions: str) -> None:
    found = {}
    input_ids = torch.randint(0, 17, (3, 20), generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        model = build_tiny(base=base, positional_encoding=positions).to(device)
        loss = model(input_ids.to(device), input_ids.to(device))
        loss.backward()
        found[device] = (loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-5)
    assert found["cuda"][1].keys() == found["cpu"][1].keys()
    for name, gradient in found["cpu"][1].items():
        torch.testing.assert_close(found["cuda"][1][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dilation", [1, 3])
def test_short_conv_float32_on_gpu_keeps_full_precision(dilation: int) -> None:
    """cuDNN's way with a channels-last convolution keeps ten bits of a float32."""
    config = resolve(ModelConfig(base="waveresnet", d_model=64, n_heads=2, n_layers=1, vocab_size=17, max_seq_len=64))
    conv = ShortConv(config, dilation)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    found = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        conv, here = conv.to(device, dtype), x.to(device, dtype).requires_grad_()
        conv.zero_grad()
        y, _ = conv(here)
        y.square().sum().backward()
        assert here.grad is not None
        assert conv.weight.grad is not None
        found[device] = [t.detach().double().cpu() for t in (y, here.grad, conv.weight.grad)]
    for ours, exact in zip(found["cuda"], found["cpu"], strict=True):
        assert (ours - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("base", BASES)
def test_gpu_greedy_text_matches_cpu(build_tiny: Callable[..., Transformer], base: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        decoding = BatchDecoder(
            Engine(build_tiny(base=base).to(device)),
            [[1, 5, 9], [2], [3, 4, 5, 6, 7]],
            max_new_tokens=10,
            sampling=SamplingConfig(temperature=0.0),
            eos_id=None,
        )
        for _ in decoding:
            pass
        found[device] = decoding.generated
    assert found["cuda"] == found["cpu"]
