"""Estimates of sharded training: memory per device, bytes sent per step and tokens per second, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from psannlm.config.model import ModelConfig
from psannlm.models.accounting import TrainingMemory, count_parameters, flops_per_token, matrix_elements

GradSync = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Device:
    """Specification of a device: memory in bytes, peak bfloat16 FLOP/s, and bytes per second sent.

    ``utilisation`` is the fraction of the peak that a training step reaches; links within a node of ``per_node``
    devices are faster than between nodes.
    """

    name: str
    memory_bytes: float
    peak_flops_per_s: float
    utilisation: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    per_node: int = 8

    def rate(self, n_devices: int) -> float:
        """Return the bytes per second that a device sends in a collective of ``n_devices`` neighbours."""
        return self.node_bytes_per_s if n_devices <= self.per_node else self.network_bytes_per_s


def sharded_elements(config: ModelConfig) -> tuple[int, int, int]:
    """Return the parameters in sharded matrices of blocks, in embedding and output matrix, and outside matrices."""
    hidden = matrix_elements(config, "attention", "feed-forward")
    ends = matrix_elements(config, "embedding", "output matrix")
    return hidden, ends, sum(count_parameters(config).values()) - hidden - ends


def sharded_memory(
    whole: TrainingMemory,
    config: ModelConfig,
    n_shards: int,
    *,
    dtype: torch.dtype,
    grad_accum_steps: int = 1,
    grad_sync: GradSync = "step",
    grad_checkpoint: bool = False,
) -> TrainingMemory:
    """Return the memory of one of ``n_shards`` devices that share one copy of a model; ``whole`` is that of a replica.

    With ``fsdp: full`` these are all devices, with ``hybrid`` those of one group. Of the matrices each device holds a
    1 / ``n_shards`` shard of weights, gradients and optimiser state; the other parameters are replicated. ``gathered``
    are embedding and output matrix in float32 with their gradients, twice while those are sent; and in ``dtype`` the
    matrices of the current block and the next one, and the gradients of one block, which are sent in float32. Gradients
    that wait for the end of an accumulated step are not sharded.
    """
    hidden, ends, rest = sharded_elements(config)
    own = -(-(hidden + ends) // n_shards) + rest
    block = hidden // config.n_layers
    optimizer = 8 * rest + -(-(whole.optimizer - 8 * rest) // n_shards)
    waits_whole = grad_accum_steps > 1 and grad_sync == "step"
    activations = whole.activations
    if dtype != torch.float32 and not grad_checkpoint:
        activations -= dtype.itemsize * hidden  # autocast's copies of the matrices, which are gathered in dtype here
    return replace(
        whole,
        weights=4 * own,
        average=4 * own if whole.average else 0,
        gradients=4 * own + (4 * (hidden + ends) if waits_whole else 0),
        optimizer=optimizer,
        activations=activations,
        gathered=12 * ends + block * (3 * dtype.itemsize + 4),
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in one step: within the group that shares a copy of the model, and beyond it."""

    within: float
    beyond: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.within + self.beyond


def bytes_sent(
    config: ModelConfig,
    n_devices: int,
    n_shards: int = 1,
    *,
    dtype: torch.dtype,
    micro_batches: int = 1,
    each: bool = False,
) -> Traffic:
    """Return the bytes that each device sends in one step, by ring collectives.

    With n devices a ring sends (n - 1) / n of the data for a gather or a reduction. Replicas reduce and gather float32
    gradients, once (``each``: per micro-batch). Shards gather the matrices of blocks for the forward and again for the
    backward pass of each micro-batch, embedding and output matrix once, and reduce float32 gradients. Between groups of
    shards each device reduces and gathers the gradients of its shard, once per step even with ``each``. The other
    parameters are reduced over all devices, once.

    Args:
        n_shards: devices that share one copy of the model: 1 with ``fsdp: off``, ``n_devices`` with ``full``.
    """
    hidden, ends, rest = sharded_elements(config)
    reductions = micro_batches if each else 1
    over_all = 2 * (n_devices - 1) / n_devices
    if n_shards == 1:
        return Traffic(0, over_all * 4 * (hidden + ends + rest) * reductions)
    gathers = micro_batches * (2 * dtype.itemsize * hidden + 4 * ends)
    within = (n_shards - 1) / n_shards * (gathers + reductions * 4 * (hidden + ends))
    n_replicas = n_devices // n_shards
    if n_replicas == 1:
        return Traffic(within + over_all * 4 * rest, 0)
    between = 2 * (n_replicas - 1) / n_replicas * 4 * (hidden + ends) / n_shards
    return Traffic(within, between + over_all * 4 * rest)


def tokens_per_s(
    config: ModelConfig,
    device: Device,
    n_devices: int,
    n_shards: int = 1,
    *,
    seq_len: int,
    tokens_per_device: int,
    grad_checkpoint: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Return the tokens per second of all devices, where communication overlaps with computation completely.

    A step takes the longer of the two. Recomputing blocks for ``grad_checkpoint`` adds a third of the FLOPs. Groups of
    ``n_shards`` devices are neighbours, so that they use the links within a node where they fit into one.
    """
    work = flops_per_token(config, seq_len) * tokens_per_device * (4 / 3 if grad_checkpoint else 1)
    compute_s = work / (device.peak_flops_per_s * device.utilisation)
    sent = bytes_sent(config, n_devices, n_shards, dtype=dtype)
    send_s = sent.within / device.rate(n_shards) + sent.beyond / device.rate(n_devices)
    return n_devices * tokens_per_device / max(compute_s, send_s)
