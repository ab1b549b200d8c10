"""A new model in; the same with random weights in which every part shows, out."""

from __future__ import annotations

import torch
from torch import nn


def randomize_parameters(model: nn.Module, seed: int) -> None:
    """Give ``model`` weights that depend on ``seed`` alone, and in which every part shows in its output.

    As they are drawn for training, branches and short convolutions start at zero: any cache and any kernel would do.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise * 0.3)
