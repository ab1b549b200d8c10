"""A resolved configuration to parameters, floating-point operations and bytes, without building it in memory.

Letters: D width, L layers, T window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, Problem
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.kernels.recompute import recompute_disabled
from psannlm.kernels.torch_private import FakeTensorMode, storage_key
from psannlm.models.mlp import GATED_KINDS
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer

WIDTH_TOLERANCE = 0.01
_ROUND_WIDTH = 8
# Python's own objects for the modules and tensors of a block.
_MODULE_BYTES = 30_000
# More layers are not built to find what they save.
_MOST_LAYERS_BUILT = 64

_GROUP_OF = {
    "embedding": "embedding",
    "head": "output matrix",
    "attention": "attention",
    "mlp": "feed-forward",
    "attention_conv": "short convolution",
    "mlp_conv": "short convolution",
    "attention_scale": "residual scales",
    "mlp_scale": "residual scales",
}


def match_mlp_width(count: Callable[[int], int], target: int) -> int:
    """Return the feed-forward width whose parameters, ``count(width)``, come nearest to ``target``.

    Parameters grow in a line with the width. A multiple of 8, which matrices of all machines like, is taken where it
    comes within a quarter of the tolerance.
    """
    at_least = count(_ROUND_WIDTH)
    slope = (count(2 * _ROUND_WIDTH) - at_least) / _ROUND_WIDTH
    exact = _ROUND_WIDTH + (target - at_least) / slope if slope else float(_ROUND_WIDTH)
    width = max(1, round(exact))
    rounded = max(_ROUND_WIDTH, _ROUND_WIDTH * round(exact / _ROUND_WIDTH))
    return rounded if abs(count(rounded) / target - 1) <= WIDTH_TOLERANCE / 4 else width


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of learnable parameters by group, of a resolved ``config``; their sum is the model's size."""
    counts: dict[str, int] = {}
    for group, _, n_elements in _parameters(config):
        counts[group] = counts.get(group, 0) + n_elements
    return counts


@lru_cache(maxsize=1)
def _parameters(config: ModelConfig) -> tuple[tuple[str, int, int], ...]:
    """Group, dimensions and elements of the parameters, those of equal blocks in one sum.

    All blocks have the same shapes (a dilation has none), so that one is built, whatever the number of layers.
    """
    one_layer = config.model_copy(update={"n_layers": 1})
    return tuple(
        (_group(name), parameter.ndim, parameter.numel() * (config.n_layers if name.startswith("blocks.") else 1))
        for name, parameter in build_model(one_layer, device="meta").named_parameters()
    )


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[-1].startswith("raw_"):
        return "sine"
    if any(part.endswith("_norm") for part in parts):
        return "norms"
    return _GROUP_OF[parts[2] if parts[0] == "blocks" else parts[0]]


@dataclass(frozen=True)
class Place:
    """Where a model is to be: kind of device, memory of the GPU, ranks on this machine, and ranks that share weights.

    ``for_training`` counts gradients and AdamW's two moments too.
    """

    device_type: str = "cpu"
    gpu_bytes: int | None = None
    n_ranks: int = 1
    n_shards: int = 1
    for_training: bool = True


def describe_oversize(config: ModelConfig, place: Place = Place()) -> str | None:
    """Return why the model of a resolved ``config`` does not fit into the memory at ``place``, by arithmetic, or None.

    Weights take 4 bytes per parameter, with gradients and AdamW's two moments 16. They are made in this machine's
    memory for a GPU too: on every rank, or where they are sharded on the first one alone.
    """
    n_parameters = sum(count_parameters(config).values())
    each = 16 if place.for_training else 4
    modules = _MODULE_BYTES * config.n_layers
    is_sharded = place.n_shards > 1
    own = -(-each * n_parameters // place.n_shards)  # of one rank, where it trains
    made = 4 * n_parameters * (1 if is_sharded else place.n_ranks)
    here = max(made, own * place.n_ranks) if place.device_type == "cpu" else made
    what = "weights, gradients and optimizer state" if place.for_training else "weights"
    memory, remedy = machine_memory_bytes(), "lower model.d_model, model.n_layers, model.d_mlp or model.vocab_size"
    if memory is not None and here + modules * place.n_ranks > memory:
        kind = what if place.device_type == "cpu" else "weights"
        ranks = f" of {place.n_ranks} ranks" if place.n_ranks > 1 else ""
        return (
            f"{n_parameters:,} parameters need {(here + modules * place.n_ranks) / 1e9:,.1f} GB for the model alone "
            f"({kind}{ranks}), and {describe_memory()}; {remedy}"
        )
    if place.device_type != "cpu" and place.gpu_bytes is not None and own > place.gpu_bytes:
        shards = f", a part of {place.n_shards}" if is_sharded else ""
        more = "" if is_sharded else ", or shard it over several GPUs with train.fsdp: full"
        return (
            f"{n_parameters:,} parameters need {own / 1e9:,.1f} GB for the model alone ({what}{shards}), and the GPU "
            f"has {place.gpu_bytes / 1e9:,.1f} GB; {remedy}{more}"
        )
    return None


def refuse_oversize(config: ModelConfig, vocab_size: int, place: Place = Place()) -> None:
    """Raise ConfigError where :func:`describe_oversize` finds the model too large; ``vocab_size`` fills in for null."""
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": vocab_size})
    try:
        message = describe_oversize(resolve(config), place)
    except (RuntimeError, OverflowError, TypeError):  # torch, on shapes beyond 64 bits
        message = "its matrices have more elements than 64 bits can count; lower model.d_model or model.d_mlp"
    if message is not None:
        raise ConfigError(Problem("model", message))


def matrix_elements(config: ModelConfig, *groups: str) -> int:
    """Return the elements of the two-dimensional parameters of groups: a bias is neither multiplied nor sharded."""
    return sum(n_elements for group, ndim, n_elements in _parameters(config) if ndim == 2 and group in groups)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the operations of one training token: 6 per matrix parameter and 12 L D T for attention.

    That is the count of PaLM's model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): forward
    and backward, a multiplication and an addition as two, no discount for the causal mask, nothing for recomputation,
    element-wise work or the lookup of embeddings.
    """
    matrices = (
        matrix_elements(config, "attention", "feed-forward", "short convolution")
        + (config.vocab_size or 0) * config.d_model
    )
    return 6 * matrices + 12 * config.n_layers * config.d_model * seq_len


@dataclass(frozen=True)
class TrainingMemory:
    """An estimate of the bytes that one rank holds at the peak of a training step, transients aside.

    ``scratch``: what the backward pass of one feed-forward holds beside what was kept for it. ``gathered``: whole
    matrices, and their gradients, that a sharded model (``models/scaling.py``) has for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: Literal["adamw", "muon"] = "adamw",
    grad_checkpoint: bool = False,
    device_type: str = "cpu",
) -> TrainingMemory:
    """Return the memory of training ``micro_batch_size`` windows of ``seq_len`` tokens at a time under ``dtype``.

    A CPU keeps less than a GPU does (``models/lean.py``), but for the norms, of which torch has a fused kernel there.

    Weights, gradients and optimiser state are float32: AdamW keeps two numbers per parameter, Muon one per hidden
    matrix. Activations are what autograd would save, found by running the forward pass on shapes alone; with
    ``grad_checkpoint`` they are the inputs of all blocks and, while one is run again, what that one saves.
    """
    total = sum(count_parameters(config).values())
    hidden_matrices = matrix_elements(config, "attention", "feed-forward") if optimizer == "muon" else 0
    with FakeTensorMode(), nullcontext() if device_type == "cpu" else recompute_disabled():
        one, two = _saved_in_passes(config, seq_len, dtype, device_type, grad_checkpoint=False)
        if grad_checkpoint:
            kept_one, kept_two = _saved_in_passes(config, seq_len, dtype, device_type, grad_checkpoint=True)
            n_layers = config.n_layers
            one, two = kept_one + (one - kept_one) // n_layers, kept_two + (two - kept_two) // n_layers
    activations = one + (two - one) * (micro_batch_size - 1)
    # The gradients of gate and up-projection. A CPU makes the hidden features anew for the gradient of the matrix after
    # them; on a GPU they are among the activations.
    n_wide = (2 if config.mlp in GATED_KINDS else 1) + (device_type == "cpu")
    scratch = n_wide * micro_batch_size * seq_len * (config.d_mlp or 0) * dtype.itemsize
    return TrainingMemory(4 * total, 4 * total, 8 * total - 4 * hidden_matrices, activations, scratch)


def _saved_in_passes(
    config: ModelConfig, seq_len: int, dtype: torch.dtype, device_type: str, *, grad_checkpoint: bool
) -> tuple[int, int]:
    """Return the bytes that autograd saves in a pass over one window and over two.

    Blocks of one shape save the same: of a deep model two and three are built, and the rest follows.
    """
    depths = [config.n_layers]
    if config.n_layers > _MOST_LAYERS_BUILT and (
        not config.short_conv.enabled or config.short_conv.dilation_growth == 1
    ):
        depths = [2, 3]
    saved = []
    for depth in depths:
        model = Transformer(config.model_copy(update={"n_layers": depth}))
        if device_type != "cpu":
            _keep_as_fused_norms(model)
        model.grad_checkpoint = grad_checkpoint
        saved.append([_saved_bytes(model, n, seq_len, dtype) for n in (1, 2)])
    if len(depths) == 1:
        return saved[0][0], saved[0][1]
    one, two = (shallow + (deep - shallow) * (config.n_layers - 2) for shallow, deep in zip(*saved, strict=True))
    return one, two


class _FusedNorm(torch.autograd.Function):
    """Keeps of an RMS norm what torch's kernel on a GPU keeps: the input and a number per row, not the normed input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.mean(-1, keepdim=True))
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("shapes alone are asked for, and no gradient")


def _keep_as_fused_norms(model: Transformer) -> None:
    """Let every norm of ``model`` keep what it does on a GPU; what it returns has the right shape and nothing more."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_fused_norm, module.weight)  # type: ignore[method-assign]


def _fused_norm(weight: Tensor, x: Tensor) -> Tensor:
    normed: Tensor = _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return normed


def _saved_bytes(model: Transformer, batch_size: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct tensors that autograd saves in one forward pass, parameters not counted."""
    saved: dict[int, tuple[object, int]] = {}
    parameters = {storage_key(p.untyped_storage()) for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := storage_key(storage)) not in parameters:
            saved[key] = (storage, storage.nbytes())  # held, so that its address is not used again
        return tensor

    input_ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(input_ids, input_ids)
    return sum(n_bytes for _, n_bytes in saved.values())


def cache_bytes(config: ModelConfig, batch_size: int, capacity: int, bytes_per_element: int = 4) -> int:
    """Return the bytes of a decoding state: keys and values of every layer and slot, and the tails of the waves."""
    head_dim = config.d_model // config.n_heads
    keys_and_values = 2 * config.n_layers * (config.n_kv_heads or config.n_heads) * head_dim * capacity
    tails = 0
    if config.short_conv.enabled:
        lengths = (
            (config.short_conv.kernel_size - 1) * config.short_conv.dilation_growth**i for i in range(config.n_layers)
        )
        tails = len(set(config.short_conv.places)) * config.d_model * sum(lengths)
    return batch_size * bytes_per_element * (keys_and_values + tails)
