"""Isolated documents: a document in a window equals the document alone, in values and gradients, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from psannlm.config.constants import IGNORE_INDEX
from psannlm.config.model import BaseName, PositionKind
from psannlm.kernels.compile import compiled
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
N_FIRST, N_SECOND = 5, 9
DILATED = {"short_conv": {"enabled": True, "dilation_growth": 3, "kernel_size": 3, "activation": "sine"}}
SETTINGS: list[dict[str, Any]] = [
    *({"base": base, "positional_encoding": kind} for base in get_args(BaseName) for kind in get_args(PositionKind)),
    {"base": "waveresnet", "n_kv_heads": 1},
    {"base": "transformer", **DILATED},
]


def window() -> tuple[Tensor, Tensor]:
    """Return ids (2, 14) of two documents a row, of which the first has ids below 8, and their positions."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 8, (2, N_FIRST), generator=generator)
    second = torch.randint(8, 17, (2, N_SECOND), generator=generator)
    positions = torch.cat((torch.arange(N_FIRST), torch.arange(N_SECOND)))
    return torch.cat((first, second), 1), positions.expand(2, -1)


def gradients(model: torch.nn.Module, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_training", [True, False])
def test_isolated_document_equals_the_document_alone(
    settings: dict[str, Any], dtype: torch.dtype, is_training: bool, build_tiny: Build
) -> None:
    model = build_tiny(**settings).to(dtype).train(is_training)
    ids, positions = window()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    with torch.set_grad_enabled(is_training):
        together = model(ids, None, 0.0, positions)
        for part in (slice(0, N_FIRST), slice(N_FIRST, None)):
            torch.testing.assert_close(together[:, part], model(ids[:, part]), rtol=tolerance, atol=tolerance)
        # The second document does depend on the first where they are not isolated.
        assert (model(ids)[:, N_FIRST:] - together[:, N_FIRST:]).abs().max() > 0.01


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_isolated_gradient_crosses_no_border(settings: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(**settings, tie_embeddings=False).train()
    ids, positions = window()
    for other in (slice(0, N_FIRST), slice(N_FIRST, None)):
        labels = ids.clone()
        labels[:, other] = IGNORE_INDEX
        _, found = gradients(model, ids, labels, 0.0, positions)
        assert found["embedding.weight"][ids[:, other].unique()].abs().max() == 0.0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_isolated_gradients_are_the_sum_over_documents(settings: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(**settings).train()
    ids, positions = window()
    _, together = gradients(model, ids, ids, 0.0, positions)
    _, first = gradients(model, ids[:, :N_FIRST], ids[:, :N_FIRST])
    _, second = gradients(model, ids[:, N_FIRST:], ids[:, N_FIRST:])
    for name, found in together.items():
        torch.testing.assert_close(found, first[name] + second[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_isolated_single_document_is_bit_equal_in_training(settings: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(**settings).train()
    ids, _ = window()
    isolated = gradients(model, ids, ids, 0.0, torch.arange(ids.shape[1]).expand(2, -1))
    plain = gradients(model, ids, ids)
    has_own_convolution = "short_conv" in settings  # summed by torch in another order than by taps
    for found, expected in zip([isolated[0], *isolated[1].values()], [plain[0], *plain[1].values()], strict=True):
        if has_own_convolution:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", get_args(PositionKind))
def test_isolated_document_in_bfloat16_training_blocks(kind: str, build_tiny: Build) -> None:
    # More than one block of queries, with the border inside the second.
    model = build_tiny(positional_encoding=kind, max_seq_len=256).train()
    ids = torch.randint(0, 17, (1, 200), generator=torch.Generator().manual_seed(3))
    positions = torch.cat((torch.arange(150), torch.arange(50)))[None]
    with torch.autocast("cpu", torch.bfloat16):
        together = model(ids, None, 0.0, positions)[:, 150:].float()
        torch.testing.assert_close(together, model(ids[:, 150:]).float(), rtol=0.05, atol=0.05)


def test_isolated_gradients_survive_activation_checkpointing(build_tiny: Build) -> None:
    model = build_tiny().train()
    ids, positions = window()
    plain = gradients(model, ids, ids, 0.0, positions)
    model.grad_checkpoint = True
    torch.testing.assert_close(gradients(model, ids, ids, 0.0, positions), plain, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_isolated_compiled_training_matches_uncompiled(build_tiny: Build) -> None:
    model = build_tiny().train()
    ids, positions = window()
    plain = gradients(model, ids, ids, 0.0, positions)
    torch.testing.assert_close(gradients(compiled(model), ids, ids, 0.0, positions), plain, rtol=1e-4, atol=2e-5)


def test_document_positions_with_a_cache_are_refused(build_tiny: Build) -> None:
    ids, positions = window()
    with pytest.raises(ValueError, match="document_positions without"):
        build_tiny()(ids, None, 0.0, positions, use_cache=True)
