"""Reference model of the training benchmark: a GPT in plain PyTorch at the parameter count of our model.

What a practitioner writes by hand: LayerNorm before attention and feed-forward, learned positions, one matrix for
queries, keys and values, ``scaled_dot_product_attention``, GELU, no biases (Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psannlm.config.model import ModelConfig

# Widths that are not a multiple of it would slow the reference model's matrix products down.
_WIDTH_STEP = 16
_INITIAL_STD = 0.02


def gpt_parameters(config: ModelConfig, width: int, seq_len: int) -> int:
    """Return the parameter count of a GPT of our sizes with feed-forwards of ``width`` and ``seq_len`` positions."""
    d_model, vocab = config.d_model, config.vocab_size or 0
    block = 4 * d_model * d_model + 2 * d_model * width + 2 * d_model
    tables = (1 if config.tie_embeddings else 2) * vocab * d_model + seq_len * d_model
    return tables + config.n_layers * block + d_model


def gpt_width(config: ModelConfig, parameters: int, seq_len: int) -> int:
    """Return the feed-forward width, a multiple of 16, at which a GPT of our sizes is nearest to ``parameters``."""
    for_width = parameters - gpt_parameters(config, 0, seq_len)
    return max(1, round(for_width / (2 * config.d_model * config.n_layers) / _WIDTH_STEP)) * _WIDTH_STEP


def gpt_flops_per_token(config: ModelConfig, width: int, seq_len: int) -> int:
    """Return the operations per training token of that GPT, counted as in ``accounting.flops_per_token``."""
    d_model = config.d_model
    matrices = config.n_layers * (4 * d_model * d_model + 2 * d_model * width) + (config.vocab_size or 0) * d_model
    return 6 * matrices + 12 * config.n_layers * d_model * seq_len


class _Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, width: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n_rows, n_tokens, d_model = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(n_rows, n_tokens, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n_rows, n_tokens, d_model))
        branch: Tensor = self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + branch


class TrainableGpt(nn.Module):
    """The GPT for training. Its parameters have our names where optimizers group by name.

    Args:
        config: our model's resolved configuration; grouped keys and values have no counterpart here.
        parameters: parameter count of our model, which the width approaches as closely as it allows.
        seq_len: number of positions.
        seed: of the weights.
        grad_checkpoint: recompute the activations of each block in the backward pass.
    """

    def __init__(self, config: ModelConfig, parameters: int, seq_len: int, seed: int, grad_checkpoint: bool) -> None:
        super().__init__()
        self.width = gpt_width(config, parameters, seq_len)
        self._recomputes = grad_checkpoint
        d_model, vocab = config.d_model, config.vocab_size or 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab, d_model)
            self.positions = nn.Embedding(seq_len, d_model)
            self.blocks = nn.ModuleList(_Block(d_model, config.n_heads, self.width) for _ in range(config.n_layers))
            self.norm = nn.LayerNorm(d_model, bias=False)
            self.head = nn.Linear(d_model, vocab, bias=False)
            self._initialize(config.n_layers)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.parameter_count = sum(parameter.numel() for parameter in self.parameters())
        self.description = (
            f"plain PyTorch {torch.__version__.partition('+')[0]} GPT, sdpa, {self.parameter_count:,} parameters "
            f"(feed-forward width {self.width:,})"
        )

    def _initialize(self, n_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                is_branch_end = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=_INITIAL_STD / math.sqrt(2 * n_layers if is_branch_end else 1))

    def forward(self, input_ids: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed cross-entropy in nats of ``labels`` (B, T), aligned with ``input_ids`` (B, T)."""
        x: Any = self.embedding(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self._recomputes else block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
