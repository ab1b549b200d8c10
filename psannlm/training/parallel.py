"""FSDP2 and DDP wrapping, gradient synchronisation and gradient clipping over several ranks."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from psannlm.config.run import RankMesh, RunConfig, plan_mesh
from psannlm.config.train import TrainConfig
from psannlm.io.code_identity import package_sha256
from psannlm.kernels.compile import compiled
from psannlm.kernels.torch_private import foreach_copy_, foreach_mul_
from psannlm.models.attention import AttentionContext
from psannlm.models.kv_cache import LayerCache
from psannlm.models.transformer import Block, Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World, as_sharded, full_tensor, local_ranks, shard_like
from psannlm.training.optim import group_parameters

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# Keys that name folders: ranks on several machines may have them in different places.
_PLACES = ("train.checkpoint_dir", "data.cache_dir")
# (plain forward of a block, x (B, T, D), context) -> (B, T, D)
_BlockForward = Callable[[Callable[..., Tensor], Tensor, AttentionContext], Tensor]


def place_model(
    settings: TrainConfig, source: Transformer, world: World, precision: Precision, *, is_compiled: bool
) -> tuple[Transformer, nn.Module]:
    """Return the model in training mode on the device, and the module to train: the model, compiled or wrapped.

    Args:
        source: the weights; without ``train.fsdp`` this very model is moved to the device.
    """
    if settings.is_sharded:
        mesh = plan_mesh(settings, world.size, local_ranks())
        sharded = shard(
            source, world, precision, mesh, grad_checkpoint=settings.grad_checkpoint, is_compiled=is_compiled
        ).train()
        return sharded, sharded
    model = source.to(precision.device).train()
    model.grad_checkpoint = settings.grad_checkpoint
    module: nn.Module = compiled(model) if is_compiled else model
    return model, replicate(module, world, precision.device)


def replicate(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return ``model`` wrapped so that its gradients are averaged over the ranks (PyTorch DDP, arXiv 2006.15704)."""
    if world.size == 1:
        return model
    # Gradients are views of the communication buckets: otherwise a rank holds each gradient twice. The search for
    # unused parameters, of which there are none, keeps the buckets of the first step: DDP would rearrange them after
    # it, and where an element lies decides in which order three or more ranks are added. A resumed run would end with
    # other bits.
    _swallow_warning(device)
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def _swallow_warning(device: torch.device) -> None:
    """Let DDP give, where nobody sees it, its one warning per process, of an unneeded search for unused parameters.

    DDP's C++ code writes it to stderr past Python's filters, except within an autograd function.
    """

    class Swallowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch.enable_grad():
                DistributedDataParallel(nn.Linear(1, 1, device=device), find_unused_parameters=True)(x)
            return x.clone()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        Swallowing.apply(torch.ones(1, 1, device=device))  # type: ignore[no-untyped-call]


def shard(
    source: Transformer,
    world: World,
    precision: Precision,
    mesh: RankMesh | None = None,
    *,
    grad_checkpoint: bool = False,
    is_compiled: bool = False,
) -> Transformer:
    """Return the model of ``source`` with its matrices sharded over the ranks, on their devices.

    FSDP2 (Zhao et al. 2023, arXiv 2304.11277; sharding after ZeRO stage 3, arXiv 1910.02054): a block's matrices are
    gathered for its forward and again for its backward pass, in the dtype of ``precision``; gradients are averaged in
    float32. Parameters without weight decay (norms, sine parameters, biases, conv taps, residual scales: under 1 % of
    a model) stay replicated and float32 on every rank, so that a sharded run computes what a single process does under
    autocast; :func:`all_reduce_replicated_grads` averages it.

    With several replicas (hybrid, HSDP) each group of consecutive ranks holds one sharded copy of the matrices, and
    gradients are averaged within the groups first, then between them.

    Args:
        source: the weights, on the CPU. The values of rank 0 are used; other ranks may pass tensors on the meta device.
        mesh: groups of ranks that share one copy of the model; None: all ranks share one.
        grad_checkpoint: recompute the activations of each block in the backward pass.
        is_compiled: compile each block for training. Embedding, output matrix and evaluation stay uncompiled.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = precision.device
    ranks = mesh or RankMesh(1, world.size)
    grid = init_device_mesh(device.type, (ranks.n_replicas, ranks.n_shards), mesh_dim_names=("replicas", "shards"))
    group = grid if ranks.n_replicas > 1 else grid["shards"]
    with torch.device("meta"):
        model = Transformer(source.config)
    replicated = set(group_parameters(model).undecayed.values())
    gather_dtype = None if precision.dtype == torch.float32 else precision.dtype
    in_blocks = MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False)
    at_ends = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    wrap = _BlockWrapper(grad_checkpoint, is_compiled)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        wrap(block, index if source.config.short_conv.dilation_growth > 1 else 0)
        fully_shard(block, mesh=group, mp_policy=in_blocks, ignored_params=replicated)
    # Autocast keeps the embedding in float32, and the loss casts the output matrix itself.
    fully_shard(model, mesh=group, mp_policy=at_ends, ignored_params=replicated, reshard_after_forward=False)
    model.to_empty(device=device)
    given = source.state_dict()
    with torch.no_grad():
        # One tensor at a time, so that a device holds at most its shards and one full tensor.
        for name, own in model.state_dict().items():
            value = given[name].to(device) if world.is_main else torch.empty(own.shape, dtype=own.dtype, device=device)
            dist.broadcast(value, src=0)
            own.copy_(shard_like(value, own))
    return model


class _BlockWrapper:
    """Activation checkpointing and compilation of blocks, in this order, inside of what shards a block.

    A block that is gathered by FSDP's hooks runs its forward pass between them; only that pass is wrapped, so that the
    hooks are neither compiled nor repeated by a recomputation.
    """

    def __init__(self, grad_checkpoint: bool, is_compiled: bool) -> None:
        self._grad_checkpoint, self._is_compiled = grad_checkpoint, is_compiled
        self._forward_of: dict[int, _BlockForward] = {}

    def __call__(self, block: Block, kind: int) -> None:
        """Replace the training pass of ``block``; validation and decoding keep the plain one.

        Args:
            kind: equal for blocks that differ in their parameters only.
        """
        if not (self._grad_checkpoint or self._is_compiled):
            return
        plain = block.forward
        if kind not in self._forward_of:
            self._forward_of[kind] = self._training_forward(kind)
        train = self._forward_of[kind]

        def forward(x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
            if cache is None and block.training and torch.is_grad_enabled():
                return train(plain, x, context)
            return plain(x, context, cache)

        block.forward = forward  # type: ignore[method-assign]

    def _training_forward(self, kind: int) -> _BlockForward:
        if not self._is_compiled:
            return _recomputed
        function = _recomputed if self._grad_checkpoint else _unchanged
        # torch keeps compiled code per code object, and of a module under FSDP it checks neither class nor attributes:
        # a block of another dilation would silently run with the dilation of the first.
        own = FunctionType(function.__code__.replace(co_name=f"{function.__name__}_{kind}"), globals())
        return compiled(own)


def _unchanged(forward: Callable[..., Tensor], x: Tensor, context: AttentionContext) -> Tensor:
    return forward(x, context)


def _recomputed(forward: Callable[..., Tensor], x: Tensor, context: AttentionContext) -> Tensor:
    found: Tensor = checkpoint(lambda given: forward(given, context), x, use_reentrant=False)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` came from :func:`shard`."""
    return _as_fsdp(model) is not None


def _as_fsdp(model: nn.Module) -> FSDPModule | None:
    """Return ``model`` if it is sharded; the module of its class is only loaded by :func:`shard`."""
    module = sys.modules.get("torch.distributed.fsdp")
    return model if module is not None and isinstance(model, module.FSDPModule) else None


def reshard(model: nn.Module) -> None:
    """Release the full weights that a sharded ``model`` has gathered for a forward pass; the next one gathers again."""
    if _as_fsdp(model) is not None:
        for module in model.modules():
            if (sharded := _as_fsdp(module)) is not None:
                sharded.reshard()


@torch.no_grad()
def gather_into(target: Transformer | None, model: Transformer) -> None:
    """Copy the full weights of a sharded ``model`` into ``target``. Every rank must call it, even without a target."""
    into = {} if target is None else target.state_dict()
    for name, value in model.state_dict().items():
        full = full_tensor(value)
        if name in into:
            into[name].copy_(full)


def gradient_sync(model: nn.Module, is_due: bool, *, is_last: bool) -> AbstractContextManager[object]:
    """Return a context whose backward pass exchanges gradients between ranks only if ``is_due``.

    If not, a sharded model keeps unsharded gradients between the micro-batches of a step: 4 bytes per parameter.

    Args:
        is_last: this is the last micro-batch of the step; before it, replicas exchange nothing.
    """
    sharded = _as_fsdp(model)
    if sharded is not None:
        sharded.set_requires_gradient_sync(is_due)
        sharded.set_requires_all_reduce(is_last)
        return nullcontext()
    no_sync: Callable[[], AbstractContextManager[object]] | None = getattr(model, "no_sync", None)
    return nullcontext() if is_due or no_sync is None else no_sync()


def all_reduce_replicated_grads(model: nn.Module, world: World) -> None:
    """Average the gradients of the replicated parameters of a sharded ``model`` over the ranks, once per step."""
    if not is_sharded(model):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None and as_sharded(p) is None]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat.div_(world.size)
        parts = torch.split(flat, [grad.numel() for grad in grads])
        foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients to a global norm of at most ``max_norm`` (None: no scaling); return the norm before.

    Every rank gets the norm of the full gradients as a scalar on the device, without waiting for the device. A
    non-finite norm makes every gradient NaN.
    """
    limit = math.inf if max_norm is None else max_norm
    if not is_sharded(model):
        return nn.utils.clip_grad_norm_(model.parameters(), limit)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [sharded.to_local() for grad in grads if (sharded := as_sharded(grad)) is not None]
    copies = [grad for grad in grads if as_sharded(grad) is None]
    # Shards add up over the ranks of a replica; replicated gradients count once. All ranks are summed, replicas too,
    # so that every rank scales by the same bits.
    square = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(square)
    square.div_(_n_replicas(grads))
    norm = (square + nn.utils.get_total_norm(copies).to(square.device).square()).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    foreach_mul_(parts, scale)
    foreach_mul_(copies, scale)
    return norm


def _n_replicas(tensors: Sequence[Tensor]) -> int:
    """Return how many ranks hold the same shard of the sharded ones among ``tensors``."""
    meshes = [sharded.device_mesh for tensor in tensors if (sharded := as_sharded(tensor)) is not None]
    return meshes[0].size(0) if meshes and meshes[0].ndim == 2 else 1


def rank_identity(config: RunConfig) -> dict[str, Any]:
    """Return what must be equal on all ranks of a run, by name: code, library, and configuration but for places."""
    found: dict[str, Any] = {
        "the source of psannlm (SHA-256)": package_sha256()[:12],
        "the version of torch": torch.__version__,
    }
    sections: list[tuple[str, Any]] = [("", config.model_dump(mode="json"))]
    for prefix, value in sections:
        if isinstance(value, dict):
            sections += [(f"{prefix}.{key}" if prefix else key, inner) for key, inner in value.items()]
        elif prefix not in _PLACES:
            found[prefix] = value
    return found
