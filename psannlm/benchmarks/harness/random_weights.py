"""Random weights under which no part of a model is silent."""

from __future__ import annotations

import torch
from torch import nn


def randomize_parameters(model: nn.Module, seed: int) -> None:
    """Set all parameters to random values that depend on ``seed`` alone, none of them zero.

    With the initialization for training, residual branches and short convolutions start at zero, and errors of a cache
    or a kernel in them would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise * 0.3)
