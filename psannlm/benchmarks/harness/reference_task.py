"""Size of a reference model: what it is built for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from psannlm.config.model import ModelConfig
from psannlm.generation.quantize import WeightDtype


@dataclass(frozen=True)
class ReferenceTask:
    """What a reference model is for.

    Attributes:
        config: our model's resolved configuration.
        parameters: parameter count of our model, which the reference model approaches as closely as its width allows.
        n_rows: number of rows that are decoded together.
        seq_len: maximum number of tokens of a row.
        dtype: of our packed weights; a reference model that has such weights takes them.
    """

    config: ModelConfig
    parameters: int
    n_rows: int
    seq_len: int
    dtype: WeightDtype
    device: torch.device
