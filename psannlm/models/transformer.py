"""Pre-norm decoder-only transformer: token ids to logits or to a loss. Every base is a setting of it.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psannlm.config.model import ConvPlace, ModelConfig
from psannlm.kernels.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from psannlm.kernels.onednn import Linear
from psannlm.kernels.recompute import fused_norm_conv, use_recompute
from psannlm.models.attention import Attention, AttentionContext, attention_context, isolated_attention_context
from psannlm.models.kv_cache import KVCache, LayerCache, whole_blocks
from psannlm.models.mlp import GatedMlp, Mlp, build_mlp
from psannlm.models.positions import sinusoids
from psannlm.models.short_conv import ShortConv

_EMBEDDING_STD = 0.02


class Block(nn.Module):
    """x + α·attention(conv(norm(x))), then x + α·mlp(conv(norm(x))); conv and α only where configured."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dilation = config.short_conv.dilation_growth**index

        def short_conv(place: ConvPlace) -> ShortConv | None:
            is_used = config.short_conv.enabled and place in config.short_conv.places
            return ShortConv(config, dilation) if is_used else None

        # RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467.
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention_conv = short_conv("attention")
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp_conv = short_conv("mlp")
        self.mlp: Mlp | GatedMlp = build_mlp(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_scale: Tensor | None = nn.Parameter(torch.ones(())) if config.residual_scale else None
        self.mlp_scale: Tensor | None = nn.Parameter(torch.ones(())) if config.residual_scale else None

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D), writing into ``cache`` where there is one."""
        if cache is None:
            h = _norm_and_conv(x, self.attention_norm, self.attention_conv, context.document_positions)
        else:
            h = self.attention_norm(x)
            if self.attention_conv is not None:
                h, cache.attn_conv_inputs = self.attention_conv(h, cache.attn_conv_state)
        x = self._added(x, self.attention(h, context, cache), self.attention_scale)
        if cache is None:
            h = _norm_and_conv(x, self.mlp_norm, self.mlp_conv, context.document_positions)
        else:
            h = self.mlp_norm(x)
            if self.mlp_conv is not None:
                h, cache.mlp_conv_inputs = self.mlp_conv(h, cache.mlp_conv_state)
        return self._added(x, self.mlp(h), self.mlp_scale)

    def _added(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.dropout(branch)
        return x + (branch if scale is None else branch * scale)


def _norm_and_conv(x: Tensor, norm: nn.RMSNorm, conv: ShortConv | None, document_positions: Tensor | None) -> Tensor:
    """Return conv(norm(x)) of sequences from their beginning, in one fused pass where that is possible."""
    if use_recompute(x) and x.dtype == torch.float32 and (conv is None or not conv.has_activation):
        assert norm.eps is not None
        taps, dilation = (None, 1) if conv is None else (conv.weight, conv.dilation)
        return fused_norm_conv(x, norm.weight, norm.eps, taps, dilation, document_positions)
    h: Tensor = norm(x)
    return h if conv is None else conv(h, None, document_positions)[0]


def _embedding(n_rows: int, n_features: int) -> nn.Embedding:
    """Return an embedding, on the meta device without drawing it: there, torch would import its compiler for that."""
    if torch.get_default_device().type == "meta":
        empty = torch.empty(n_rows, n_features)
        embedding: nn.Embedding = nn.Embedding.from_pretrained(empty, freeze=False)  # type: ignore[no-untyped-call]
        return embedding
    return nn.Embedding(n_rows, n_features)


class Transformer(nn.Module):
    """A language model built from a *resolved* configuration (see ``models.registry.build_model``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the configuration has no vocab_size: call models.registry.resolve first")
        self.config = config
        self.grad_checkpoint = False
        self.embedding = _embedding(config.vocab_size, config.d_model)
        self.embedding_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head: nn.Module | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights for unit-variance pre-activations; the branches' output matrices start at zero."""
        if self.embedding.weight.is_meta:
            return
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        before_activations = {block.mlp.activation_proj for block in self.blocks if isinstance(block, Block)}
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith(("out_proj", "down_proj")):
                nn.init.zeros_(module.weight)
            elif name == "head":
                nn.init.normal_(module.weight, std=_EMBEDDING_STD)
            else:
                scale = self.config.gate_init_scale if module in before_activations else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix from hidden states to logits."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    def hidden_states(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        n_new: Sequence[int] | None = None,
        document_positions: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised hidden states (B, T, D) before the output matrix.

        Args:
            input_ids: (B, T) int64; with a ``cache``, the tokens that follow its committed ones.
            cache: KV cache, updated in place; pass the same object to the next call.
            n_new: how many of each row's T ids are real (the rest is padding on the right); None: all.
            document_positions: as in :meth:`forward`; without a cache.

        Raises:
            GenerationError: the new tokens exceed the capacity of the cache.
            ValueError: ``document_positions`` come with a cache, or are not (B, T).
        """
        if document_positions is not None:
            if cache is not None:
                raise ValueError("a row of a KV cache is one document; give document_positions without a cache")
            if document_positions.shape != input_ids.shape:
                raise ValueError(
                    f"document_positions has the shape {tuple(document_positions.shape)}; give that of input_ids, "
                    f"{tuple(input_ids.shape)}"
                )
            return self.run_blocks(input_ids, isolated_attention_context(self.config, document_positions), None)
        hidden = self.forward_uncommitted(input_ids, cache)
        if cache is not None:
            cache.commit(n_new)
        return hidden

    def forward_uncommitted(self, input_ids: Tensor, cache: KVCache | None) -> Tensor:
        """Return the same without committing the tokens: ``cache.commit`` then keeps some or all of each row's."""
        context = attention_context(self.config, input_ids.shape[1], input_ids.device, cache)
        hidden = self.run_blocks(input_ids, context, None if cache is None else cache.layers)
        if cache is not None:
            cache.n_uncommitted = input_ids.shape[1]
        return hidden

    def run_blocks(self, input_ids: Tensor, context: AttentionContext, layers: Sequence[LayerCache] | None) -> Tensor:
        """Return the normalised hidden states (B, T, D) of tokens at the positions of ``context``.

        Tensors in, tensors out, so that it can be compiled on its own.
        """
        # The residual stream has the dtype of the norms; an embedding prepared for inference may be bfloat16.
        x = self.embedding(input_ids).to(self.final_norm.weight.dtype)
        if self.config.positional_encoding == "sinusoidal":
            x = x + _EMBEDDING_STD * sinusoids(context.positions, self.config.d_model).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            # Never with a cache: recomputation would write into it a second time.
            if self.grad_checkpoint and self.training and layers is None:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context, None if layers is None else layers[index])
        normed: Tensor = self.final_norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., V) logits of hidden states (..., D)."""
        logits: Tensor = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return logits

    @overload
    def forward(
        self, input_ids: Tensor, labels: Tensor, label_smoothing: float = 0.0, document_positions: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: None = None,
        label_smoothing: float = 0.0,
        document_positions: Tensor | None = None,
        *,
        past_kvs: KVCache | None = None,
        use_cache: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self, input_ids: Tensor, labels: None = None, *, past_kvs: KVCache | None = None, use_cache: Literal[True]
    ) -> tuple[Tensor, KVCache]: ...
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        document_positions: Tensor | None = None,
        *,
        past_kvs: KVCache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Return the loss where there are ``labels``, else the logits of every position.

        Args:
            input_ids: (B, T) int64; with ``past_kvs``, the tokens that follow those it was computed from.
            labels: (B, T) int64; the token after the input at each position, or IGNORE_INDEX.
            label_smoothing: probability mass spread over the vocabulary, for the loss alone.
            document_positions: (B, T) integers, the position of each token in its document: 0 where one begins. No
                token depends on another document. None: each row is one document.
            past_kvs: the KV cache that an earlier call returned: keys, values and conv states of all rows. It is not
                changed, so that several continuations can start from one.
            use_cache: return the KV cache too. Like any call with ``past_kvs``, such a call records no gradients.

        Returns:
            With labels the cross-entropy in nats, () float, *summed* over the labels that are not IGNORE_INDEX: the
            caller divides by their number. Without labels the logits (B, T, V), in the dtype of the weights; with
            ``use_cache`` the pair (logits, past_kvs).

        Raises:
            ValueError: ``input_ids`` is not (B, T), has another number of rows than ``past_kvs``, or labels or
                ``document_positions`` come with a KV cache.
        """
        if labels is None:
            return self._forward_logits(input_ids, past_kvs, use_cache, document_positions)
        if past_kvs is not None or use_cache:
            raise ValueError("a loss is computed without a KV cache; give labels, or use_cache and past_kvs")
        flat = self.hidden_states(input_ids, document_positions=document_positions).flatten(0, 1)
        loss: Tensor
        if self.head is None or isinstance(self.head, nn.Linear):
            loss = linear_cross_entropy(flat, self.output_weight, labels.flatten(), label_smoothing)
        else:
            loss = chunked_cross_entropy(flat, self.head, labels.flatten(), label_smoothing)
        return loss

    def _forward_logits(
        self, input_ids: Tensor, past_kvs: KVCache | None, use_cache: bool, document_positions: Tensor | None
    ) -> Tensor | tuple[Tensor, KVCache]:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}; give (batch, time), time 1 or more")
        if past_kvs is None and not use_cache:
            return self.logits(self.hidden_states(input_ids, document_positions=document_positions))
        if document_positions is not None:
            raise ValueError("a row of a KV cache is one document; give document_positions without use_cache, past_kvs")
        n_rows, n_new = input_ids.shape
        with torch.no_grad():
            if past_kvs is None:
                weight = self.embedding.weight
                cache = KVCache.allocate(self.config, n_rows, whole_blocks(n_new), weight.device, weight.dtype)
            elif len(past_kvs.lengths) != n_rows:
                raise ValueError(f"past_kvs has {len(past_kvs.lengths)} rows, and input_ids has {n_rows}")
            else:
                cache = past_kvs.copy(max(past_kvs.lengths) + n_new)
            logits = self.logits(self.hidden_states(input_ids, cache))
        return (logits, cache) if use_cache else logits
