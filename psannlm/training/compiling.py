"""A run's size enters, whether to compile its model leaves: the rule behind ``train.compile: auto``."""

from __future__ import annotations

from typing import Literal

import torch

from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig, plan_batches
from psannlm.models.accounting import flops_per_token
from psannlm.runtime.device import compiler_fault, require_compiler

# Operations of one rank from which torch.compile repays its start: on two cores it took half a minute, and saved 7 % of
# a step in float32 and 23 to 30 % in bf16 (docs/research/log.md). A GPU computes a thousand times as much in that time.
REPAYING_FLOPS = {"cpu": 1e14, "cuda": 1e17}


def run_flops(config: RunConfig, model: ModelConfig, n_steps: int) -> float:
    """Return the floating-point operations of one rank in ``n_steps``; ``model`` is resolved."""
    of_one_rank = plan_batches(config, 1)
    return float(flops_per_token(model, of_one_rank.seq_len)) * of_one_rank.tokens_per_step * n_steps


def decide_compiling(
    setting: bool | Literal["auto"], device: torch.device, flops: float, *, is_sharded: bool = False
) -> tuple[bool, str | None]:
    """Return whether to compile, and for ``auto`` a line for people: why it does, or what keeps a long run from it.

    The size of the run decides and never a clock: a run that is interrupted and goes on must decide the same again, or
    it would round otherwise from there.

    Args:
        setting: ``train.compile``.
        flops: floating-point operations of the whole run on this rank.
        is_sharded: whether the model is sharded over ranks, which torch.compile is not used with.

    Raises:
        DeviceError: true, and there is nothing to compile with.
    """
    if setting != "auto":
        if setting:
            require_compiler(device)
        return setting, None
    needed = REPAYING_FLOPS.get(device.type, float("inf"))
    if flops < needed:
        return False, None
    if is_sharded:
        return False, "compile: auto leaves a sharded model uncompiled"
    missing = compiler_fault(device)
    if missing is not None:
        return False, f"compile: auto would repay itself in {flops:.2g} operations, but needs {missing}: uncompiled"
    return True, f"compile: auto compiles the model: {flops:.2g} operations repay it (from {needed:.0e})"
