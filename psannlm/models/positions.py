"""Position encodings: rotary embedding (RoPE), linear attention biases (ALiBi) and absolute sinusoids.

All take explicit positions, so that cached rows may continue at different ones. Letters as in ``psannlm.models``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROPE_BASE = 10_000.0


def rope_tables(positions: Tensor, head_dim: int, theta: float = ROPE_BASE) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary embedding (Su et al. 2021, arXiv 2104.09864), pairing feature i with i + K/2.

    Args:
        positions: (..., T) integers.
        head_dim: K, even.
        theta: base of the wavelengths: pair i turns by theta ** (-2 i / K) radians per position.

    Returns:
        Two float32 tensors (..., T, K/2).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, T, K) by ``tables`` of (T, K/2) or (B, 1, T, K/2), in float32; keep x's dtype."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def alibi_slopes(n_heads: int, device: torch.device | None = None) -> Tensor:
    """Return the (H,) float32 slopes of attention with linear biases (Press et al. 2021, arXiv 2108.12409).

    For a number of heads that is not a power of two, the slopes of the next lower power are followed by every other
    slope of the next higher one, as in the authors' code.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(n_heads))
    slopes = geometric(lower) + geometric(2 * lower)[0::2][: n_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Return slope * (key position - query position), float32, and minus infinity where the key is after the query.

    Args:
        slopes: (H,).
        query_positions: (T,) or (B, T) integers.
        key_positions: (S,) integers.

    Returns:
        (H, T, S) or (B, H, T, S).
    """
    distance = key_positions - query_positions.unsqueeze(-1)
    bias = slopes[:, None, None] * distance.unsqueeze(-3)
    return bias.masked_fill(distance.unsqueeze(-3) > 0, float("-inf"))


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """Return the absolute encoding of Vaswani et al. 2017 (arXiv 1706.03762), (..., T, D) float32.

    Even features are sines and odd ones cosines of the position at wavelengths from 2π to 10,000 x 2π. For odd D
    the last cosine is omitted.
    """
    exponents = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32) / d_model
    angles = positions.float().unsqueeze(-1) * ROPE_BASE**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :d_model]
