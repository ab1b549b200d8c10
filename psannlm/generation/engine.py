"""A model and a precision in; prefill and decode over a cache that the caller holds, plain or compiled, out.

Letters: B rows, T new tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.quantize import WeightDtype, pack_model, weight_bytes
from psannlm.kernels.compile import compiled
from psannlm.models.attention import PREFILL_QUERIES, cached_attention_context
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache, LayerCache, update_conv_states, whole_blocks
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import compiler_fault, computes_in_bf16, require_compiler

# Tokens to come that a new state has room for at most; it grows when there are more.
_FIRST_ROOM = 256

_numbers = count()
_Tensors = Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
_ConvInputs = list[tuple[Tensor | None, Tensor | None]]
_Step = Callable[[Tensor, Tensor, Tensor, _Tensors], tuple[Tensor, _ConvInputs]]


class Engine:
    """A model packed for inference, with the three passes that text is made of.

    Args:
        model: is left as it is; the engine keeps a packed twin on the same device. Matrices are those of now; norms and
            short convolutions are shared, so that a model that learns on needs a new engine.
        dtype: of the weights: ``float32``, ``bfloat16``, or ``int8`` (weights only, a scale per output).
        compile: put the decoding step through torch.compile: it takes up to a minute at the first step of each batch
            size and capacity of the cache (a fraction of it the next time, from the compiler's own cache on disk), and
            makes the steps after it several times faster. ``auto`` does so where the compiler works.

    Attributes:
        model: the packed twin.
        cache_dtype: of keys, values and convolution states: float32 for float32 weights, else bfloat16.
        weight_bytes: of the matrices that each decoding step reads once.
        compiles: whether steps are compiled: asked for, and there is a compiler.
        notices: what was asked for and is had in another way, in words.

    Raises:
        GenerationError: ``dtype`` is not known.
        DeviceError: ``compile`` is true, and the compiler is missing or broken.
    """

    def __init__(
        self, model: Transformer, *, dtype: WeightDtype = "float32", compile: bool | Literal["auto"] = False
    ) -> None:
        self.device = model.embedding.weight.device
        self.notices: list[str] = []
        if compile is True:
            require_compiler(self.device, "compiled decoding", "decode without compiling")
        missing = compiler_fault(self.device) if compile == "auto" else None
        self.compiles = bool(compile) and missing is None
        if missing is not None:
            self.notices.append(f"decoding is not compiled, which would be faster: it needs {missing}")
        self.dtype = dtype
        self.model = pack_model(model, dtype, is_compiled=self.compiles)
        if dtype != "float32" and not computes_in_bf16(self.device):
            self.notices.append(
                f"this {self.device.type} has no bf16 hardware: {dtype} weights are widened to float32 for each product"
            )
        self.cache_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.weight_bytes = weight_bytes(self.model)
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._numbers: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Run every prompt at once; return the logits (B, V), float32, after each, and the state to decode from.

        Args:
            prompts: ids of each row, at least one.
            max_new_tokens: a hint at how much the state will have to hold; it grows beyond.
        """
        lengths = [len(prompt) for prompt in prompts]
        # Whole blocks of queries, which is more than a decoding pass ever has: a row must meet the same products and
        # the same sums whatever the length of its company.
        padded = -(-max(lengths) // PREFILL_QUERIES) * PREFILL_QUERIES
        capacity = self._capacity(max(lengths), padded, max_new_tokens)
        state = KVCache.allocate(self.model.config, len(prompts), capacity, self.device, self.cache_dtype)
        input_ids = torch.zeros(len(prompts), padded, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt)
        hidden = self.model.hidden_states(input_ids.to(self.device), state, lengths)
        last = torch.tensor([length - 1 for length in lengths], device=self.device)
        at_last = hidden[torch.arange(len(prompts), device=self.device), last]
        # As (B, 1, D): one token per row, as in decoding.
        return self.model.logits(at_last.unsqueeze(1))[:, 0].float(), state

    def _capacity(self, length: int, padded: int, max_new_tokens: int) -> int:
        """Slots of a new state. A compiled step is made for one number of them: a power of two that need not grow."""
        if not self.compiles:
            return whole_blocks(max(length + min(max_new_tokens, _FIRST_ROOM), padded))
        needed = max(length + max_new_tokens + MAX_DECODE_TOKENS, padded, _FIRST_ROOM)
        return 1 << (needed - 1).bit_length()

    @torch.inference_mode()
    def decode(self, tokens: Tensor, state: KVCache) -> Tensor:
        """Return the logits (B, V), float32, after one more token (B,) int64 of each row; ``state`` counts it."""
        logits = self.verify(tokens[:, None], state)[:, 0]
        state.commit()
        return logits

    @torch.inference_mode()
    def verify(self, tokens: Tensor, state: KVCache) -> Tensor:
        """Return the logits (B, T, V), float32, after each of T more tokens (B, T) int64; none is counted yet.

        ``state.commit`` says how many of them each row keeps.

        Raises:
            GenerationError: T is more than ``MAX_DECODE_TOKENS``.
        """
        n_rows, n_tokens = tokens.shape
        if n_tokens > MAX_DECODE_TOKENS:
            raise GenerationError(f"{n_tokens} tokens at once are too many to decode; use {MAX_DECODE_TOKENS} at most")
        state.grow(max(state.lengths) + n_tokens)
        if not self.compiles:
            return self.model.logits(self.model.forward_uncommitted(tokens, state)).float()
        key = (n_rows, n_tokens, state.capacity)
        if key not in self._steps:
            self._steps[key] = self._compiled(n_tokens)
        tensors = [_in_place(s) for s in state.layers]
        logits, conv_inputs = self._steps[key](
            tokens.contiguous(), state.offsets, self._slots(state, n_tokens), tensors
        )
        if logits.is_cuda:
            # A CUDA graph hands out the same memory at every step, and a caller may still read the last one's.
            logits = logits.clone()
        for layer, (attn_conv_inputs, mlp_conv_inputs) in zip(state.layers, conv_inputs, strict=False):
            layer.attn_conv_inputs, layer.mlp_conv_inputs = attn_conv_inputs, mlp_conv_inputs
        state.n_uncommitted = n_tokens
        return logits

    def _slots(self, state: KVCache, n_tokens: int) -> Tensor:
        """Return the numbers of the slots to read; made anew when the longest row enters another block."""
        kv_len = min(whole_blocks(max(state.lengths) + n_tokens), state.capacity)
        if self._numbers is None or len(self._numbers) != kv_len:
            self._numbers = torch.arange(kv_len, device=self.device)
            torch._dynamo.maybe_mark_dynamic(self._numbers, 0)
        return self._numbers

    def _compiled(self, n_tokens: int) -> _Step:
        """Return a compiled pass for one batch size, number of tokens and capacity; how much it reads may change."""
        model = self.model

        def step(tokens: Tensor, offsets: Tensor, slots: Tensor, tensors: _Tensors) -> tuple[Tensor, _ConvInputs]:
            layers = [LayerCache(*parts) for parts in tensors]
            context = cached_attention_context(model.config, offsets, slots, n_tokens, torch.float32)
            logits = model.logits(model.run_blocks(tokens, context, layers)).float()
            if n_tokens > 1:
                return logits, [(layer.attn_conv_inputs, layer.mlp_conv_inputs) for layer in layers]
            # A single token always stays, so that the convolution states can be updated here.
            for layer in layers:
                update_conv_states(layer)
            return logits, []

        if self.device.type == "cpu":
            # One call into C++ per step, and products summed in one rounding.
            options: dict[str, Any] = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
        else:
            # A graph is recorded for every kv_len that is read, which is one in so many tokens and no reason to warn.
            options = {"triton.cudagraphs": True, "triton.cudagraph_dynamic_shape_warn_limit": None}
        # Guards would check in every step what the engine knows. Without them, a function must have code of its own, by
        # which the compiler finds what it has compiled.
        code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
        own = FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)
        return compiled(own, fullgraph=True, options={**options, "guard_filter_fn": _no_guard})


def _in_place(layer: LayerCache) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of a block's state, marked as ones that stay where they are.

    A compiled step writes into them, and the compiler refuses CUDA graphs for a pass that writes into inputs which may
    be others the next time. Should the state be another one after all, a graph is recorded anew.
    """
    tensors = (layer.keys, layer.values, layer.attn_conv_state, layer.mlp_conv_state)
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)
    return tensors


def _no_guard(guards: Sequence[Any]) -> list[bool]:
    return [False for _ in guards]
