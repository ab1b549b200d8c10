"""The state of decoding: keys, values, wave tails, and how many tokens each row has seen. The caller holds it.

Letters: B rows, G key/value heads, S capacity in tokens, K head size, R tail length, T new tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import GenerationError

# Slots that a state grows by and attention reads at once: what depends on the span changes once in so many tokens.
BLOCK = 64


def whole_blocks(n_tokens: int) -> int:
    """Return the slots of the fewest blocks that hold ``n_tokens``."""
    return -(-n_tokens // BLOCK) * BLOCK


@dataclass
class LayerState:
    """One block's part: keys and values (B, G, S, K), and per wave its tail (B, R, D), None where there is no wave.

    A *history* is a tail followed by the inputs of the last forward pass, (B, R + T, D); it is there from that pass
    until :meth:`DecodeState.advance` cuts the next tail out of it.
    """

    keys: Tensor
    values: Tensor
    attention_tail: Tensor | None
    mlp_tail: Tensor | None
    attention_history: Tensor | None = None
    mlp_history: Tensor | None = None


@dataclass
class DecodeState:
    """What a model must remember of the tokens it has seen; given to a forward pass and advanced by it in place.

    ``lengths`` are kept on the host, where the engine knows them without asking the device; ``offsets``, (B,) int64,
    are the same numbers on the device. ``n_offered`` are the tokens of a forward pass that :meth:`advance` has not
    counted yet.
    """

    layers: list[LayerState]
    lengths: list[int]
    offsets: Tensor
    n_offered: int = 0

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> DecodeState:
        """Return an empty state for ``batch_size`` rows of at most ``capacity`` tokens, for a resolved ``config``."""
        n_groups = config.n_kv_heads or config.n_heads
        head_dim = config.d_model // config.n_heads

        def tail(place: str, dilation: int) -> Tensor | None:
            if not config.short_conv.enabled or place not in config.short_conv.places:
                return None
            length = (config.short_conv.kernel_size - 1) * dilation
            return torch.zeros(batch_size, length, config.d_model, device=device, dtype=dtype)

        layers = []
        for index in range(config.n_layers):
            dilation = config.short_conv.dilation_growth**index
            keys = torch.zeros(batch_size, n_groups, capacity, head_dim, device=device, dtype=dtype)
            layers.append(LayerState(keys, torch.zeros_like(keys), tail("attention", dilation), tail("mlp", dilation)))
        return cls(layers, [0] * batch_size, torch.zeros(batch_size, dtype=torch.long, device=device))

    @property
    def capacity(self) -> int:
        """S, the slots of every row."""
        return self.layers[0].keys.shape[2]

    @property
    def n_bytes(self) -> int:
        """Bytes of keys, values and tails."""
        tensors = (t for s in self.layers for t in (s.keys, s.values, s.attention_tail, s.mlp_tail) if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    def select(self, rows: Sequence[int]) -> DecodeState:
        """Return a state of only these rows, in this order: how finished rows leave a batch."""
        index = torch.tensor(list(rows), device=self.offsets.device)

        def pick(tail: Tensor | None) -> Tensor | None:
            return None if tail is None else tail[index]

        layers = [
            LayerState(s.keys[index], s.values[index], pick(s.attention_tail), pick(s.mlp_tail)) for s in self.layers
        ]
        return DecodeState(layers, [self.lengths[row] for row in rows], self.offsets[index])

    def copy(self, capacity: int) -> DecodeState:
        """Return a state that has seen the same tokens and shares no tensor, with room for ``capacity`` or more."""
        twin = self.select(range(len(self.lengths)))
        twin.grow(capacity)
        return twin

    def put(self, rows: Sequence[int], other: DecodeState) -> None:
        """Let ``rows`` remember what the rows of ``other`` remember, in that order, and nothing else."""
        index = torch.tensor(list(rows), device=self.offsets.device)
        self.grow(max(other.lengths))
        span = max(other.lengths)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[index, :, :span] = theirs.keys[:, :, :span]
            mine.values[index, :, :span] = theirs.values[:, :, :span]
            for tail, new in ((mine.attention_tail, theirs.attention_tail), (mine.mlp_tail, theirs.mlp_tail)):
                if tail is not None and new is not None:
                    tail[index] = new
        self.offsets[index] = other.offsets
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length

    def grow(self, n_tokens: int) -> None:
        """Make room for rows of ``n_tokens``, in whole blocks; half as much again at least, so that copies stay few."""
        if n_tokens <= self.capacity:
            return
        capacity = whole_blocks(max(n_tokens, self.capacity * 3 // 2))
        for layer in self.layers:
            layer.keys = _longer(layer.keys, capacity)
            layer.values = _longer(layer.values, capacity)

    def require_room(self, n_new: int) -> None:
        """Raise GenerationError if a row would outgrow the capacity by ``n_new`` more tokens, padding included."""
        for row, length in enumerate(self.lengths):
            if length + n_new > self.capacity:
                message = f"row {row}: {length} + {n_new} tokens exceed the cache of {self.capacity}; grow it first"
                raise GenerationError(message)

    @torch.inference_mode()
    def advance(self, n_new: Sequence[int] | None = None) -> None:
        """Count the tokens of the last forward pass as seen: the first ``n_new[b]`` of row b, or None for all of them.

        What a row was offered beyond them is forgotten: its slots are written anew, and tails end where the row does.
        """
        counts = None if n_new is None or all(n == self.n_offered for n in n_new) else list(n_new)
        for layer in self.layers:
            move_tails(layer, counts)
        if counts is None:
            self.offsets += self.n_offered
            self.lengths = [length + self.n_offered for length in self.lengths]
        else:
            self.offsets += torch.tensor(counts, device=self.offsets.device)
            self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self.n_offered = 0


def move_tails(layer: LayerState, n_new: Sequence[int] | None = None) -> None:
    """Cut the next tails out of the histories of a pass, of which ``n_new[b]`` tokens of row b stay; None: all."""
    if layer.attention_tail is not None and layer.attention_history is not None:
        layer.attention_tail.copy_(_cut(layer.attention_tail, layer.attention_history, n_new))
    if layer.mlp_tail is not None and layer.mlp_history is not None:
        layer.mlp_tail.copy_(_cut(layer.mlp_tail, layer.mlp_history, n_new))
    layer.attention_history = layer.mlp_history = None


def _longer(tensor: Tensor, capacity: int) -> Tensor:
    """The same (B, G, S, K) with more slots."""
    longer = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
    longer[:, :, : tensor.shape[2]] = tensor
    return longer


def _cut(tail: Tensor, history: Tensor, n_new: Sequence[int] | None) -> Tensor:
    """The last R real inputs of each row of ``history`` (B, R + T, D)."""
    length = tail.shape[1]
    if n_new is None:
        return history[:, history.shape[1] - length :]
    first = torch.tensor(list(n_new), device=history.device)[:, None]
    index = first + torch.arange(length, device=history.device)
    return history.gather(1, index.unsqueeze(-1).expand(-1, -1, history.shape[-1]))
