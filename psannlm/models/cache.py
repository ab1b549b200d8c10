"""The state of decoding: keys, values, wave tails, and how many tokens each row has seen. The caller holds it.

Letters: B rows, G key/value heads, S capacity in tokens, K head size, R tail length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import GenerationError


@dataclass
class LayerState:
    """One block's part: keys and values (B, G, S, K); tails (B, R, D), None where the block has no wave there."""

    keys: Tensor
    values: Tensor
    attention_tail: Tensor | None
    mlp_tail: Tensor | None


@dataclass
class DecodeState:
    """What a model must remember of the tokens it has seen; given to a forward pass and advanced by it in place.

    ``lengths`` are kept on the host: the engine knows them without asking the device.
    """

    layers: list[LayerState]
    lengths: list[int]
    capacity: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> DecodeState:
        """Return an empty state for ``batch_size`` rows of at most ``capacity`` tokens, for a resolved ``config``."""
        n_groups = config.n_kv_heads or config.n_heads
        head_dim = config.d_model // config.n_heads

        def tail(place: str, dilation: int) -> Tensor | None:
            if not config.wave.enabled or place not in config.wave.places:
                return None
            length = (config.wave.kernel_size - 1) * dilation
            return torch.zeros(batch_size, length, config.d_model, device=device, dtype=dtype)

        layers = []
        for index in range(config.n_layers):
            dilation = config.wave.dilation_growth**index
            keys = torch.zeros(batch_size, n_groups, capacity, head_dim, device=device, dtype=dtype)
            layers.append(LayerState(keys, torch.zeros_like(keys), tail("attention", dilation), tail("mlp", dilation)))
        return cls(layers, [0] * batch_size, capacity)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = (t for layer in self.layers for t in vars(layer).values() if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    def select(self, rows: Sequence[int]) -> DecodeState:
        """Return a state of only these rows, in this order: how finished rows leave a batch."""
        index = list(rows)

        def pick(tail: Tensor | None) -> Tensor | None:
            return None if tail is None else tail[index]

        layers = [
            LayerState(layer.keys[index], layer.values[index], pick(layer.attention_tail), pick(layer.mlp_tail))
            for layer in self.layers
        ]
        return DecodeState(layers, [self.lengths[row] for row in rows], self.capacity)

    def require_room(self, n_new: Sequence[int]) -> None:
        """Raise GenerationError if a row would outgrow the capacity."""
        for row, (length, new) in enumerate(zip(self.lengths, n_new, strict=True)):
            if length + new > self.capacity:
                message = (
                    f"row {row}: {length} + {new} tokens exceed the cache of {self.capacity}; allocate a larger one"
                )
                raise GenerationError(message)
