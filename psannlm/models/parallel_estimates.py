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


def sharded_elements(config: ModelConfig) -> tuple[int, int, int]:
    """Return the parameters in sharded matrices of blocks, in embedding and output matrix, and outside matrices."""
    hidden = matrix_elements(config, "attention", "feed-forward")
    ends = matrix_elements(config, "embedding", "output matrix")
    return hidden, ends, sum(count_parameters(config).values()) - hidden - ends


def sharded_memory(
    whole: TrainingMemory,
    config: ModelConfig,
    n_devices: int,
    *,
    dtype: torch.dtype,
    grad_accum_steps: int = 1,
    grad_sync: GradSync = "step",
    grad_checkpoint: bool = False,
) -> TrainingMemory:
    """Return the memory of one of ``n_devices`` under ``fsdp: full``, given that of a replica, ``whole``.

    Of the matrices each device holds a 1 / ``n_devices`` shard of weights, gradients and optimiser state; the other
    parameters are replicated. ``gathered`` are embedding and output matrix in float32 with their gradients, twice while
    those are sent; and in ``dtype`` the matrices of the current block and the next one, and the gradients of one block,
    which are sent in float32. Gradients that wait for the end of an accumulated step are not sharded.
    """
    hidden, ends, rest = sharded_elements(config)
    own = -(-(hidden + ends) // n_devices) + rest
    block = hidden // config.n_layers
    optimizer = 8 * rest + -(-(whole.optimizer - 8 * rest) // n_devices)
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


def bytes_sent(
    config: ModelConfig, n_devices: int, *, fsdp: bool, dtype: torch.dtype, micro_batches: int = 1, each: bool = False
) -> float:
    """Return the bytes that each device sends in one step, by ring collectives.

    With n devices a ring sends (n - 1) / n of the data for a gather or a reduction. Replicas reduce and gather float32
    gradients, once (``each``: per micro-batch). Shards gather the matrices of blocks for the forward and again for the
    backward pass of each micro-batch, embedding and output matrix once, and reduce float32 gradients.
    """
    hidden, ends, rest = sharded_elements(config)
    fraction = (n_devices - 1) / n_devices
    reductions = micro_batches if each else 1
    if not fsdp:
        return 2 * fraction * 4 * (hidden + ends + rest) * reductions
    gathers = micro_batches * (2 * dtype.itemsize * hidden + 4 * ends)
    return fraction * (gathers + reductions * 4 * (hidden + ends) + 2 * 4 * rest)


def tokens_per_s(
    config: ModelConfig,
    device: Device,
    n_devices: int,
    *,
    seq_len: int,
    tokens_per_device: int,
    fsdp: bool,
    grad_checkpoint: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Return the tokens per second of all devices, where communication overlaps with computation completely.

    A step takes the longer of the two. Recomputing blocks for ``grad_checkpoint`` adds a third of the FLOPs.
    """
    work = flops_per_token(config, seq_len) * tokens_per_device * (4 / 3 if grad_checkpoint else 1)
    compute_s = work / (device.peak_flops_per_s * device.utilisation)
    rate = device.node_bytes_per_s if n_devices <= device.per_node else device.network_bytes_per_s
    send_s = bytes_sent(config, n_devices, fsdp=fsdp, dtype=dtype) / rate
    return n_devices * tokens_per_device / max(compute_s, send_s)
