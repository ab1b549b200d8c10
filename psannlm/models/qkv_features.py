"""Features from which queries, keys and values are projected: a FAN layer, and a control of the same parameters.

FAN: Dong et al. 2024, arXiv 2410.02675; before attention: FANformer, arXiv 2502.21309. Letters as in
``psannlm.models``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import QKV_PAIRS_FRACTION, QkvFeaturesKind
from psannlm.kernels.onednn import Linear


class QkvFeatures(nn.Module):
    """D features of (B, T, D) by one matrix of D - P rows, P = D // 4, of which the first P rows z give two each.

    With z of the first P rows and r of the others: ``fan`` is [cos z, sin z, GELU(r)], ``fan_linear`` (the layer of
    FANformer) [cos z, sin z, r], and ``gelu`` [GELU(z), GELU(-z), GELU(r)], which has the same parameters and as many
    non-linear features, none of them periodic.
    """

    def __init__(self, d_model: int, kind: QkvFeaturesKind) -> None:
        super().__init__()
        self.kind = kind
        self.n_pairs = int(d_model * QKV_PAIRS_FRACTION)
        self.proj: nn.Module = Linear(d_model, d_model - self.n_pairs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), in the dtype of the projection; computed in float32."""
        projected: Tensor = self.proj(x)
        wide = projected.float()
        z, r = wide[..., : self.n_pairs], wide[..., self.n_pairs :]
        if self.kind == "gelu":
            parts = (F.gelu(z), F.gelu(-z), F.gelu(r))
        else:
            parts = (torch.cos(z), torch.sin(z), F.gelu(r) if self.kind == "fan" else r)
        return torch.cat(parts, dim=-1).to(projected.dtype)
