"""FSDP2 and DDP wrapping, gradient synchronisation and gradient clipping over several ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from psannlm.kernels.torch_private import foreach_copy_, foreach_mul_
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World, as_sharded, full_tensor, shard_like
from psannlm.training.optim import group_parameters

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def replicate(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return ``model`` wrapped so that its gradients are averaged over the ranks (PyTorch DDP, arXiv 2006.15704)."""
    if world.size == 1:
        return model
    # Gradients are views of the communication buckets: otherwise a rank holds each gradient twice.
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def shard(source: Transformer, world: World, precision: Precision) -> Transformer:
    """Return the model of ``source`` with its matrices sharded over the ranks, on their devices.

    FSDP2 (Zhao et al. 2023, arXiv 2304.11277; sharding after ZeRO stage 3, arXiv 1910.02054): a block's matrices are
    gathered for its forward and again for its backward pass, in the dtype of ``precision``; gradients are averaged in
    float32. Parameters without weight decay (norms, sine parameters, biases, conv taps, residual scales: under 1 % of
    a model) stay replicated and float32 on every rank, so that a sharded run computes what a single process does under
    autocast; :func:`all_reduce_replicated_grads` averages it.

    Args:
        source: the weights, on the CPU. The values of rank 0 are used; other ranks may pass tensors on the meta device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = precision.device
    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("ranks",))
    with torch.device("meta"):
        model = Transformer(source.config)
    replicated = set(group_parameters(model).undecayed.values())
    gather_dtype = None if precision.dtype == torch.float32 else precision.dtype
    in_blocks = MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False)
    at_ends = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks, ignored_params=replicated)
    # Autocast keeps the embedding in float32, and the loss casts the output matrix itself.
    fully_shard(model, mesh=mesh, mp_policy=at_ends, ignored_params=replicated, reshard_after_forward=False)
    model.to_empty(device=device)
    given = source.state_dict()
    with torch.no_grad():
        # One tensor at a time, so that a device holds at most its shards and one full tensor.
        for name, own in model.state_dict().items():
            value = given[name].to(device) if world.is_main else torch.empty(own.shape, dtype=own.dtype, device=device)
            dist.broadcast(value, src=0)
            own.copy_(shard_like(value, own))
    return model


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


def gradient_sync(model: nn.Module, is_due: bool) -> AbstractContextManager[object]:
    """Return a context whose backward pass exchanges gradients between ranks only if ``is_due``.

    If not, a sharded model keeps unsharded gradients between the micro-batches of a step: 4 bytes per parameter.
    """
    sharded = _as_fsdp(model)
    if sharded is not None:
        sharded.set_requires_gradient_sync(is_due)
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
    # Shards add up over the ranks; replicated gradients count once.
    square = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(copies).to(square.device).square()).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    foreach_mul_(parts, scale)
    foreach_mul_(copies, scale)
    return norm
