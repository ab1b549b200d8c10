"""KV cache of decoding: keys, values, convolution states and sequence lengths, passed to a forward pass as an argument.

A forward pass writes into the cache but does not lengthen its rows: the new tokens are uncommitted until
:meth:`KVCache.commit` says how many of them each row keeps. Padding of a ragged prefill and rejected draft tokens are
the same case: they are never committed. Letters as in ``psannlm.models``; R is the length of a convolution state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psannlm.config.model import ConvPlace, ModelConfig
from psannlm.errors import GenerationError

# New tokens per row of a decoding pass, at most. Up to this number convolution, attention and products use kernels for
# few rows, which give a row the same numbers in any batch. A prefill must be longer (`generation.engine` pads it).
MAX_DECODE_TOKENS = 16
# Slots by which a cache grows, and that a compiled step reads at once: its shapes change once in this many tokens.
CACHE_BLOCK_TOKENS = 64
# A step that is not compiled reads whole blocks of this size, the width of a vector: a row's sums do not depend on the
# number of hidden blocks behind its end.
READ_BLOCK_TOKENS = 16


def whole_blocks(n_tokens: int) -> int:
    """Return the number of slots of the fewest blocks that hold ``n_tokens``."""
    return -(-n_tokens // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS


def whole_read_blocks(n_tokens: int) -> int:
    """Return the number of slots that a step that is not compiled reads of the longest row with ``n_tokens``."""
    return -(-n_tokens // READ_BLOCK_TOKENS) * READ_BLOCK_TOKENS


@dataclass
class LayerCache:
    """Cache of one block: keys and values (B, G, S, K), and the state (B, R, D) of each short convolution, or None.

    A convolution state holds the last R inputs. ``*_conv_inputs``, (B, R + T, D), are a state followed by the inputs of
    the last forward pass; they exist between that pass and :meth:`KVCache.commit`, which cuts the next state out of
    them.
    """

    keys: Tensor
    values: Tensor
    attn_conv_state: Tensor | None
    mlp_conv_state: Tensor | None
    attn_conv_inputs: Tensor | None = None
    mlp_conv_inputs: Tensor | None = None


@dataclass
class KVCache:
    """Cache of all blocks for a batch of rows, held by the caller and updated in place.

    Attributes:
        layers: one entry per block.
        lengths: committed tokens of each row, on the host, where they are read without a device sync.
        offsets: the same numbers on the device, (B,) int64.
        n_uncommitted: tokens per row of the last forward pass, not yet committed.
    """

    layers: list[LayerCache]
    lengths: list[int]
    offsets: Tensor
    n_uncommitted: int = 0

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache for ``batch_size`` rows of at most ``capacity`` tokens, for a resolved ``config``."""
        n_kv_heads = config.n_kv_heads or config.n_heads
        head_dim = config.d_model // config.n_heads

        def conv_state(place: ConvPlace, dilation: int) -> Tensor | None:
            if not config.short_conv.enabled or place not in config.short_conv.places:
                return None
            length = (config.short_conv.kernel_size - 1) * dilation
            return torch.zeros(batch_size, length, config.d_model, device=device, dtype=dtype)

        layers = []
        for index in range(config.n_layers):
            dilation = config.short_conv.dilation_growth**index
            keys = torch.zeros(batch_size, n_kv_heads, capacity, head_dim, device=device, dtype=dtype)
            conv_states = conv_state("attention", dilation), conv_state("mlp", dilation)
            layers.append(LayerCache(keys, torch.zeros_like(keys), *conv_states))
        return cls(layers, [0] * batch_size, torch.zeros(batch_size, dtype=torch.long, device=device))

    @property
    def capacity(self) -> int:
        """S, the number of slots of every row."""
        return self.layers[0].keys.shape[2]

    @property
    def n_bytes(self) -> int:
        """Bytes of keys, values and convolution states."""
        tensors = [t for c in self.layers for t in (c.keys, c.values, c.attn_conv_state, c.mlp_conv_state)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of only these rows, in this order; finished rows leave a batch this way."""
        index = torch.tensor(list(rows), device=self.offsets.device)

        def pick(conv_state: Tensor | None) -> Tensor | None:
            return None if conv_state is None else conv_state[index]

        layers = [
            LayerCache(c.keys[index], c.values[index], pick(c.attn_conv_state), pick(c.mlp_conv_state))
            for c in self.layers
        ]
        return KVCache(layers, [self.lengths[row] for row in rows], self.offsets[index])

    def view(self, first: int, end: int) -> KVCache:
        """Return rows ``first`` to ``end - 1`` as a cache that shares their memory until either grows.

        Only the numbers in ``lengths`` are its own: whoever holds both caches keeps them equal.
        """

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:end]

        layers = [
            LayerCache(c.keys[first:end], c.values[first:end], part(c.attn_conv_state), part(c.mlp_conv_state))
            for c in self.layers
        ]
        return KVCache(layers, self.lengths[first:end], self.offsets[first:end])

    @torch.inference_mode()
    def clear(self) -> None:
        """Make all rows empty; keys and values stay in memory, where no pass reads them."""
        self.lengths = [0] * len(self.lengths)
        self.offsets.zero_()
        for layer in self.layers:
            for state in (layer.attn_conv_state, layer.mlp_conv_state):
                if state is not None:
                    state.zero_()

    def copy(self, capacity: int) -> KVCache:
        """Return a cache of the same tokens that shares no tensor, with ``capacity`` slots or more."""
        copied = self.select(range(len(self.lengths)))
        copied.grow(capacity)
        return copied

    def copy_rows_(self, rows: Sequence[int], other: KVCache) -> None:
        """Replace ``rows`` of this cache by the rows of ``other``, in that order."""
        longest = max(other.lengths)
        # Not in inference mode: tensors that it makes can only be written to in that mode.
        self.grow(longest)
        with torch.inference_mode():
            index = torch.tensor(list(rows), device=self.offsets.device)
            for ours, theirs in zip(self.layers, other.layers, strict=True):
                ours.keys[index, :, :longest] = theirs.keys[:, :, :longest]
                ours.values[index, :, :longest] = theirs.values[:, :, :longest]
                for state, new in (
                    (ours.attn_conv_state, theirs.attn_conv_state),
                    (ours.mlp_conv_state, theirs.mlp_conv_state),
                ):
                    if state is not None and new is not None:
                        state[index] = new
            self.offsets[index] = other.offsets
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length

    @torch.inference_mode()
    def copy_row_within_(self, source: int, target: int) -> None:
        """Replace row ``target`` by row ``source``."""
        length = self.lengths[source]
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
            for state in (layer.attn_conv_state, layer.mlp_conv_state):
                if state is not None:
                    state[target] = state[source]
        self.offsets[target] = self.offsets[source]
        self.lengths[target] = length

    def grow(self, n_tokens: int) -> None:
        """Grow the capacity to ``n_tokens`` or more, in whole blocks and by half at least, so that copies stay few."""
        if n_tokens <= self.capacity:
            return
        capacity = whole_blocks(max(n_tokens, self.capacity * 3 // 2))
        for layer in self.layers:
            layer.keys = _with_capacity(layer.keys, capacity)
            layer.values = _with_capacity(layer.values, capacity)

    def check_capacity(self, n_new: int) -> None:
        """Raise GenerationError if ``n_new`` more tokens, padding included, exceed the capacity of a row."""
        for row, length in enumerate(self.lengths):
            if length + n_new > self.capacity:
                message = f"row {row}: {length} + {n_new} tokens exceed the cache of {self.capacity}; grow it first"
                raise GenerationError(message)

    @torch.inference_mode()
    def commit(self, n_new: Sequence[int] | None = None) -> None:
        """Commit the first ``n_new[b]`` uncommitted tokens of row b, or all of them where ``n_new`` is None.

        The other tokens are dropped: their slots are overwritten later, and convolution states end where the row ends.
        """
        counts = None if n_new is None or all(n == self.n_uncommitted for n in n_new) else list(n_new)
        for layer in self.layers:
            update_conv_states(layer, counts)
        if counts is None:
            self.offsets += self.n_uncommitted
            self.lengths = [length + self.n_uncommitted for length in self.lengths]
        else:
            self.offsets += torch.tensor(counts, device=self.offsets.device)
            self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self.n_uncommitted = 0


def update_conv_states(layer: LayerCache, n_new: Sequence[int] | None = None) -> None:
    """Set the convolution states from the inputs of a pass of which row b keeps ``n_new[b]`` tokens; None: all."""
    if layer.attn_conv_state is not None and layer.attn_conv_inputs is not None:
        layer.attn_conv_state.copy_(_last_inputs(layer.attn_conv_state, layer.attn_conv_inputs, n_new))
    if layer.mlp_conv_state is not None and layer.mlp_conv_inputs is not None:
        layer.mlp_conv_state.copy_(_last_inputs(layer.mlp_conv_state, layer.mlp_conv_inputs, n_new))
    layer.attn_conv_inputs = layer.mlp_conv_inputs = None


def _with_capacity(tensor: Tensor, capacity: int) -> Tensor:
    """Return the same (B, G, S, K) with ``capacity`` slots, new ones zero."""
    grown = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown


def _last_inputs(state: Tensor, inputs: Tensor, n_new: Sequence[int] | None) -> Tensor:
    """Return the last R committed inputs of each row of ``inputs`` (B, R + T, D)."""
    length = state.shape[1]
    if n_new is None:
        return inputs[:, inputs.shape[1] - length :]
    # Row b keeps inputs n_new[b] .. n_new[b] + R - 1: those that end at its last committed token.
    first = torch.tensor(list(n_new), device=inputs.device)[:, None]
    index = first + torch.arange(length, device=inputs.device)
    return inputs.gather(1, index.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))
