"""A model on one device to the same model trained by every rank."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psannlm.distributed import World


def replicate(model: nn.Module, world: World) -> nn.Module:
    """Return ``model`` wrapped so that its gradients are averaged over the ranks (PyTorch DDP, arXiv 2006.15704)."""
    return model if world.size == 1 else DistributedDataParallel(model)
