"""Parameter counts, FLOPs and memory estimates of a configuration, computed on shapes without allocating the model.

Letters as in ``psannlm.models``; L is the number of layers.
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
from psannlm.models.activations import is_activation_parameter
from psannlm.models.mlp import GATED_KINDS
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer

WIDTH_TOLERANCE = 0.01
_ROUND_WIDTH = 8
# Bytes of the Python objects of a block: modules and tensors.
_MODULE_BYTES = 30_000
# Deeper models are extrapolated from 2 and 3 layers when saved activations are counted.
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
    """Return the feed-forward width whose parameters, ``count(width)``, are nearest to ``target``.

    The number of parameters is linear in the width. A multiple of 8, which suits matrix products everywhere, is chosen
    where it is within a quarter of the tolerance.
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
    """Return (group, number of dimensions, elements) of the parameters, summed over the blocks.

    All blocks have the same shapes, whatever their dilation, so that only one block is built.
    """
    one_layer = config.model_copy(update={"n_layers": 1})
    return tuple(
        (_group(name), parameter.ndim, parameter.numel() * (config.n_layers if name.startswith("blocks.") else 1))
        for name, parameter in build_model(one_layer, device="meta").named_parameters()
    )


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[-1].endswith("_gain"):
        return "gains"
    if is_activation_parameter(name):
        return "sine"
    if any(part.endswith("_norm") for part in parts):
        return "norms"
    return _GROUP_OF[parts[2] if parts[0] == "blocks" else parts[0]]


@dataclass(frozen=True)
class Place:
    """Where a model is held: device type, GPU memory, ranks on this machine, and ranks among which weights are sharded.

    ``for_training`` adds gradients and AdamW's two moments.
    """

    device_type: str = "cpu"
    gpu_bytes: int | None = None
    n_ranks: int = 1
    n_shards: int = 1
    for_training: bool = True


def describe_oversize(config: ModelConfig, place: Place = Place()) -> str | None:
    """Return why the model of a resolved ``config`` does not fit into the memory at ``place``, or None where it fits.

    Weights take 4 bytes per parameter, with gradients and AdamW's two moments 16. Weights for a GPU are initialised in
    this machine's memory too: on every rank, or only on the first one where they are sharded.
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
        shards = f", one shard of {place.n_shards}" if is_sharded else ""
        more = "" if is_sharded else ", or shard it over several GPUs with train.fsdp: full"
        return (
            f"{n_parameters:,} parameters need {own / 1e9:,.1f} GB for the model alone ({what}{shards}), and the GPU "
            f"has {place.gpu_bytes / 1e9:,.1f} GB; {remedy}{more}"
        )
    return None


def refuse_oversize(config: ModelConfig, vocab_size: int, place: Place = Place()) -> None:
    """Raise ConfigError where the model is too large for ``place``; ``vocab_size`` replaces null."""
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": vocab_size})
    try:
        message = describe_oversize(resolve(config), place)
    except (RuntimeError, OverflowError, TypeError):  # torch, on shapes beyond 64 bits
        message = "its matrices have more elements than 64 bits can count; lower model.d_model or model.d_mlp"
    if message is not None:
        raise ConfigError(Problem("model", message))


def matrix_elements(config: ModelConfig, *groups: str) -> int:
    """Return the elements of the two-dimensional parameters of ``groups``: no biases, which are not sharded."""
    return sum(n_elements for group, ndim, n_elements in _parameters(config) if ndim == 2 and group in groups)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of one training token: 6 per matrix parameter, and 12 L D T for attention.

    This is the count of PaLM's model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): forward
    and backward pass, a multiply-add as two, no discount for the causal mask; recomputation, element-wise operations
    and the embedding lookup are not counted.
    """
    matrices = (
        matrix_elements(config, "attention", "feed-forward", "short convolution")
        + (config.vocab_size or 0) * config.d_model
    )
    return 6 * matrices + 12 * config.n_layers * config.d_model * seq_len


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated bytes on one rank at the peak of a training step, short-lived buffers excepted.

    ``average``: the exponential moving average of the weights (``train.ema``).
    ``scratch``: buffers of the backward pass of one feed-forward. ``gathered``: whole matrices and their gradients that
    a sharded model (``models/parallel_estimates.py``) holds temporarily.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int = 0
    gathered: int = 0
    average: int = 0

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
    ema: bool = False,
) -> TrainingMemory:
    """Return the estimated memory of training micro-batches of ``micro_batch_size`` windows of ``seq_len`` tokens.

    Weights, gradients, optimiser state and with ``ema`` the average of the weights are float32: AdamW keeps two numbers
    per parameter, Muon one per element of the hidden matrices. Activations are what autograd saves, counted in a
    forward pass on fake tensors under ``dtype``; with ``grad_checkpoint`` they are the inputs of all blocks and the
    activations of the block being recomputed. A CPU saves less than a GPU (``kernels/recompute.py``), except for norms,
    which torch fuses on a GPU.
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
    # Gradients of gate and up-projection. A CPU also recomputes the hidden features, for the gradient of the
    # down-projection; a GPU saves them among the activations.
    n_wide = (2 if config.mlp in GATED_KINDS else 1) + (device_type == "cpu")
    scratch = n_wide * micro_batch_size * seq_len * (config.d_mlp or 0) * dtype.itemsize
    return TrainingMemory(
        4 * total, 4 * total, 8 * total - 4 * hidden_matrices, activations, scratch, average=4 * total * ema
    )


def _saved_in_passes(
    config: ModelConfig, seq_len: int, dtype: torch.dtype, device_type: str, *, grad_checkpoint: bool
) -> tuple[int, int]:
    """Return the bytes that autograd saves in a forward pass over one window and over two.

    Blocks of the same shape save the same, so that a deep model is extrapolated from two and three layers.
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
    """Saves what torch's fused RMS norm saves on a GPU: the input and one number per row, not the normalised input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.mean(-1, keepdim=True))
        return x.clone() if weight is None else x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("only shapes are computed here, no gradients")


def _keep_as_fused_norms(model: Transformer) -> None:
    """Make every norm of ``model`` save what it saves on a GPU; the results have the right shape but no meaning."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_fused_norm, module.weight)  # type: ignore[method-assign]


def _fused_norm(weight: Tensor | None, x: Tensor) -> Tensor:
    normed: Tensor = _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return normed


def _saved_bytes(model: Transformer, batch_size: int, seq_len: int, dtype: torch.dtype) -> int:
    """Return the bytes of the distinct tensors that autograd saves in one forward pass, without parameters."""
    saved: dict[int, tuple[object, int]] = {}
    parameters = {storage_key(p.untyped_storage()) for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := storage_key(storage)) not in parameters:
            saved[key] = (storage, storage.nbytes())  # kept alive, so that its key is not reused
        return tensor

    input_ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(input_ids, input_ids)
    return sum(n_bytes for _, n_bytes in saved.values())


def cache_bytes(config: ModelConfig, batch_size: int, capacity: int, bytes_per_element: int = 4) -> int:
    """Return the bytes of a KV cache: keys and values of every layer and slot, and the states of short convolutions."""
    head_dim = config.d_model // config.n_heads
    keys_and_values = 2 * config.n_layers * (config.n_kv_heads or config.n_heads) * head_dim * capacity
    conv_states = 0
    if config.short_conv.enabled:
        lengths = (
            (config.short_conv.kernel_size - 1) * config.short_conv.dilation_growth**i for i in range(config.n_layers)
        )
        conv_states = len(set(config.short_conv.places)) * config.d_model * sum(lengths)
    return batch_size * bytes_per_element * (keys_and_values + conv_states)
