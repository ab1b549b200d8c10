"""Blocked CPU attention against its float64 definition: values, gradients, and saved memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.kernels import cpu_attention
from psannlm.kernels.cpu_attention import blocked_attention, use_blocked_attention
from psannlm.models.positions import alibi_bias, alibi_slopes
from psannlm.models.transformer import Transformer

N_HEADS, HEAD_DIM = 3, 80
Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def bias_of(n_tokens: int, positional_encoding: str) -> Tensor | None:
    if positional_encoding == "rope":
        return None
    positions = torch.arange(n_tokens)
    return alibi_bias(alibi_slopes(N_HEADS), positions, positions).unsqueeze(0)


def tensors(n_tokens: int, n_groups: int = N_HEADS) -> list[Tensor]:
    """Queries, keys and values that point somewhere, and a gradient; (2, heads, T, K), laid out as projections are."""
    draw = torch.Generator().manual_seed(n_tokens)
    parts = ((N_HEADS, 1.5), (n_groups, 1.5), (n_groups, 1.0), (N_HEADS, 1.0))
    drawn = [scale * torch.randn(2, n_tokens, n, HEAD_DIM, generator=draw) for n, scale in parts]
    return [x.to(torch.bfloat16).transpose(1, 2) for x in drawn]


def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=bias is None, enable_gqa=True)


def value_and_gradients(way: Way, drawn: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in drawn[:3])
    y = way(q, k, v, bias)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), drawn[3].to(dtype))]


def errors(found: list[Tensor], right: list[Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, right, strict=True)]


# Shorter than a block, whole blocks, a last one that is cut short, and a window whose weights are not kept.
@pytest.mark.parametrize("n_tokens", [2, 7, 128, 129, 300, 640])
@pytest.mark.parametrize("positional_encoding", ["rope", "alibi"])
@pytest.mark.parametrize("n_groups", [1, N_HEADS])
def test_blocked_attention_is_as_exact_as_sdpa(n_tokens: int, positional_encoding: str, n_groups: int) -> None:
    drawn, bias = tensors(n_tokens, n_groups), bias_of(n_tokens, positional_encoding)
    right = value_and_gradients(kernel, drawn, bias, torch.float64)
    ours = errors(value_and_gradients(blocked_attention, drawn, bias, torch.bfloat16), right)
    theirs = errors(value_and_gradients(kernel, drawn, bias, torch.bfloat16), right)
    names = ("value", "of queries", "of keys", "of values")
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert mine <= 1.5 * other + 1e-4, f"{name}: {mine:.2e} against {other:.2e}"


@pytest.mark.parametrize(("n_tokens", "bias"), list(itertools.product([300, 640], ["rope", "alibi"])))
def test_blocked_attention_is_causal(n_tokens: int, bias: str) -> None:
    drawn = tensors(n_tokens)
    changed = [x.clone() for x in drawn]
    cut = n_tokens // 2 + 1
    for x in changed[:3]:
        x[:, :, cut:] += 1.0
    first, second = (blocked_attention(*x[:3], bias_of(n_tokens, bias)) for x in (drawn, changed))
    assert torch.equal(first[:, :, :cut], second[:, :, :cut])
    assert not torch.equal(first[:, :, cut:], second[:, :, cut:])
    # A gradient of early outputs alone reaches no late key.
    q, k, v = (x.detach().clone().requires_grad_() for x in drawn[:3])
    blocked_attention(q, k, v, bias_of(n_tokens, bias))[:, :, :cut].sum().backward()
    for gradient in (k.grad, v.grad):
        assert gradient is not None
        assert not gradient[:, :, cut:].any()
        assert gradient[:, :, :cut].any()


def test_blocked_attention_saved_memory_is_linear() -> None:
    def kept(n_tokens: int) -> int:
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        q, k, v = (x.detach().requires_grad_() for x in tensors(n_tokens)[:3])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            blocked_attention(q, k, v)
        return sum(sizes.values())

    assert kept(1024) <= 2 * kept(512)
    assert kept(512) < 2 * kept(256)  # which keeps its weights
    assert kept(256) < 2.1 * kept(512) / 2


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["rope", "alibi"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_blocked_attention_compiled_float32_is_exact(bias: str) -> None:
    drawn, mask = tensors(300, n_groups=1), bias_of(300, bias)
    right = value_and_gradients(kernel, drawn, mask, torch.float64)
    compiled: Way = torch.compile(blocked_attention, backend="aot_eager")
    assert max(errors(value_and_gradients(compiled, drawn, mask, torch.float32), right)) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["rope", "alibi"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_blocked_attention_compiled_matches_eager(bias: str) -> None:
    drawn = tensors(300)
    right = value_and_gradients(kernel, drawn, bias_of(300, bias), torch.float64)
    plain = errors(value_and_gradients(blocked_attention, drawn, bias_of(300, bias), torch.bfloat16), right)
    compiled: Way = torch.compile(blocked_attention)
    found = errors(value_and_gradients(compiled, drawn, bias_of(300, bias), torch.bfloat16), right)
    assert max(a / b for a, b in zip(found, plain, strict=True)) < 1.5


def test_blocked_attention_only_for_bfloat16_cpu_training() -> None:
    q = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    assert use_blocked_attention(q)
    assert not use_blocked_attention(q.float())
    assert not use_blocked_attention(q.to("meta"))
    with torch.no_grad():
        assert not use_blocked_attention(q)
    with torch.inference_mode():
        assert not use_blocked_attention(q)


@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_heads": 1}, {"positional_encoding": "alibi"}, {"qk_norm": True}], ids=str
)
def test_blocked_attention_trains_a_model(
    settings: dict[str, object], build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(base="waveresnet", **settings).train()
    ids = torch.randint(17, (3, 150), generator=torch.Generator().manual_seed(1))

    def gradients(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(ids[:, :-1], ids[:, 1:]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    calls: list[tuple[int, ...]] = []

    def counted(q: Tensor, *rest: Tensor) -> Tensor:
        calls.append(tuple(q.shape))
        return blocked_attention(q, *rest)

    monkeypatch.setattr("psannlm.models.attention.blocked_attention", counted)
    ours = gradients()
    assert len(calls) == len(model.blocks)
    monkeypatch.setattr("psannlm.models.attention.use_blocked_attention", lambda q: False)
    theirs, right = gradients(), gradients(torch.float32)
    assert len(calls) == len(model.blocks)
    assert max(errors([_as_one(ours)], [_as_one(right)])) <= 1.5 * max(errors([_as_one(theirs)], [_as_one(right)]))


def _as_one(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_blocked_attention_is_independent_of_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tensors(300)
    whole = value_and_gradients(blocked_attention, drawn, None, torch.bfloat16)
    monkeypatch.setattr(cpu_attention, "_BLOCK_QUERIES", 50)
    for mine, other in zip(value_and_gradients(blocked_attention, drawn, None, torch.bfloat16), whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
