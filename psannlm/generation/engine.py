"""Inference engine: prefill, decode and verify passes over a KV cache that the caller holds, compiled or not.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from psannlm.errors import DeviceError, GenerationError
from psannlm.generation.quantize import WeightDtype, prepare_for_inference, weight_bytes
from psannlm.generation.step_cache import compiled_step
from psannlm.kernels.compile import compiled
from psannlm.kernels.compiler import compiler_fault, require_compiler
from psannlm.kernels.cpu_decoding import decodes_in_cpp, decoding_library_failure, decoding_options
from psannlm.kernels.torch_private import mark_dynamic, mark_static_address
from psannlm.models.attention import PREFILL_QUERIES, cached_attention_context
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache, LayerCache, update_conv_states, whole_blocks
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import computes_in_bf16

# New tokens that a new cache has slots for, at most; it grows when a row gets longer.
_FIRST_NEW_TOKENS = 256

_numbers = count()
_Tensors = Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
_ConvInputs = list[tuple[Tensor | None, Tensor | None]]
_StepArgs = tuple[Tensor, Tensor, Tensor, _Tensors]
_Step = Callable[[Transformer, Tensor, Tensor, Tensor, _Tensors], tuple[Tensor, _ConvInputs]]


def whole_query_blocks(n_tokens: int) -> int:
    """Return the number of tokens of the fewest blocks of ``PREFILL_QUERIES`` that hold ``n_tokens``."""
    return -(-n_tokens // PREFILL_QUERIES) * PREFILL_QUERIES


class Engine:
    """A model prepared for inference, with its passes: prefill, one token per row, several tokens per row.

    Args:
        model: not changed unless ``in_place``; the engine keeps a prepared copy on the same device. Matrices are
            copied; norms and short convolutions are shared, so that a model that is trained further needs a new engine.
        dtype: of the weights: ``float32``, ``bfloat16``, or ``int8`` (weights only, one scale per output).
        compile: compile the decoding step with torch.compile. The first step of each batch size and cache capacity
            takes up to a minute (less from the compiler's cache on disk), later steps are several times faster.
            ``auto`` compiles where the compiler works.
        in_place: prepare ``model`` itself, of which nothing else can then be computed: memory holds its weights once.

    Attributes:
        model: the prepared copy, or ``model``.
        cache_dtype: of keys, values and convolution states: float32 for float32 weights, else bfloat16.
        weight_bytes: bytes of the matrices, each of which a decoding step reads once.
        compiles: whether steps are compiled.
        notices: messages about settings that have no or another effect on this machine.

    Raises:
        GenerationError: unknown ``dtype``.
        DeviceError: ``compile`` is true, and the compiler is missing or broken.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        dtype: WeightDtype = "float32",
        compile: bool | Literal["auto"] = False,
        in_place: bool = False,
    ) -> None:
        self.device = model.embedding.weight.device
        self.notices: list[str] = []
        if compile is True:
            require_compiler(self.device, "compiled decoding", "decode without compiling")
        missing = compiler_fault(self.device) if compile == "auto" else None
        if compile and missing is None and decodes_in_cpp(self.device):
            missing = decoding_library_failure()
            if missing is not None and compile is True:
                raise DeviceError(f"compiled decoding needs {missing}; repair it, or decode without compiling")
        self.compiles = bool(compile) and missing is None
        if missing is not None:
            self.notices.append(f"decoding is not compiled, which would be faster: it needs {missing}")
        self.dtype = dtype
        self.model = prepare_for_inference(model, dtype, is_compiled=self.compiles, in_place=in_place)
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
        """Run all prompts in one pass; return the next logits (B, V), float32, and the cache to decode from.

        Args:
            prompts: ids of each row, at least one.
            max_new_tokens: expected number of new tokens, for the first capacity of the cache; it can grow.
        """
        longest = max(map(len, prompts))
        capacity = self._capacity(longest, whole_query_blocks(longest), max_new_tokens)
        cache = self.new_cache(len(prompts), capacity)
        hidden = self.extend(prompts, cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.next_logits(hidden[torch.arange(len(prompts), device=self.device), last]), cache

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """Return an empty cache with ``capacity`` slots or more for each row."""
        return KVCache.allocate(self.model.config, n_rows, whole_blocks(capacity), self.device, self.cache_dtype)

    @torch.inference_mode()
    def extend(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Run the next part of each prompt, commit it to ``cache``, and return its hidden states (B, T, D).

        T is the longest part's length in whole blocks of ``PREFILL_QUERIES``; the states behind a shorter part mean
        nothing. A prompt in several parts gives the same numbers as in one, if each but the last is whole blocks.
        """
        lengths = [len(prompt) for prompt in prompts]
        # Padded to whole blocks of queries, more than any decoding pass has: a row gets the same products and sums
        # whatever the lengths of the other rows.
        input_ids = torch.zeros(len(prompts), whole_query_blocks(max(lengths)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt)
        return self.model.hidden_states(input_ids.to(self.device), cache, lengths)

    @torch.inference_mode()
    def next_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, V), float32, of hidden states (B, D), computed as in a decoding pass."""
        # As (B, 1, D): one token per row, as in decoding.
        return self.model.logits(hidden.unsqueeze(1))[:, 0].float()

    def _capacity(self, length: int, padded: int, max_new_tokens: int) -> int:
        """Return the slots of a new cache. A compiled step is for one number of slots: a power of two that suffices."""
        if not self.compiles:
            return whole_blocks(max(length + min(max_new_tokens, _FIRST_NEW_TOKENS), padded))
        needed = max(length + max_new_tokens + MAX_DECODE_TOKENS, padded, _FIRST_NEW_TOKENS)
        return 1 << (needed - 1).bit_length()

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, V), float32, after one more token (B,) int64 of each row, and commit the token."""
        logits = self.forward_tokens(tokens[:, None], cache)[:, 0]
        cache.commit()
        return logits

    @torch.inference_mode()
    def forward_tokens(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, T, V), float32, after each of T more tokens (B, T) int64, and commit none of them.

        ``cache.commit`` then keeps some or all of each row's.

        Raises:
            GenerationError: T is more than ``MAX_DECODE_TOKENS``.
        """
        n_rows, n_tokens = tokens.shape
        if n_tokens > MAX_DECODE_TOKENS:
            raise GenerationError(f"{n_tokens} tokens at once are too many to decode; use {MAX_DECODE_TOKENS} at most")
        cache.grow(max(cache.lengths) + n_tokens)
        if not self.compiles:
            return self.model.logits(self.model.forward_uncommitted(tokens, cache)).float()
        key = (n_rows, n_tokens, cache.capacity)
        tensors = [_static_tensors(s) for s in cache.layers]
        args = (tokens.contiguous(), cache.offsets, self._slots(cache, n_tokens), tensors)
        if key not in self._steps:
            self._steps[key] = self._compiled(n_tokens, args)
        logits, conv_inputs = self._steps[key](self.model, *args)
        if logits.is_cuda:
            # A CUDA graph returns the same memory at every step, and the caller may still read the last result.
            logits = logits.clone()
        for layer, (attn_conv_inputs, mlp_conv_inputs) in zip(cache.layers, conv_inputs, strict=False):
            layer.attn_conv_inputs, layer.mlp_conv_inputs = attn_conv_inputs, mlp_conv_inputs
        cache.n_uncommitted = n_tokens
        return logits

    def _slots(self, cache: KVCache, n_tokens: int) -> Tensor:
        """Return the numbers of the slots to read; they change when the longest row enters another block."""
        # On a CPU attention itself reads no more of a row than it has.
        is_fixed = decodes_in_cpp(self.device)
        kv_len = cache.capacity if is_fixed else min(whole_blocks(max(cache.lengths) + n_tokens), cache.capacity)
        if self._numbers is None or len(self._numbers) != kv_len:
            self._numbers = torch.arange(kv_len, device=self.device)
            if not is_fixed:
                mark_dynamic(self._numbers, 0)
        return self._numbers

    def _compiled(self, n_tokens: int, args: _StepArgs) -> _Step:
        """Return a compiled pass for one batch size, number of tokens and capacity; the slots read may vary."""

        def step(
            model: Transformer, tokens: Tensor, offsets: Tensor, slots: Tensor, tensors: _Tensors
        ) -> tuple[Tensor, _ConvInputs]:
            layers = [LayerCache(*parts) for parts in tensors]
            context = cached_attention_context(model.config, offsets, slots, n_tokens, torch.float32)
            logits = model.logits(model.run_blocks(tokens, context, layers)).float()
            if n_tokens > 1:
                return logits, [(layer.attn_conv_inputs, layer.mlp_conv_inputs) for layer in layers]
            # A single token is always committed, so that the convolution states can be updated here.
            for layer in layers:
                update_conv_states(layer)
            return logits, []

        # Guards would check at every step what the engine ensures. Without guards each compiled function needs a code
        # object of its own, the key under which the compiler finds its result.
        code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
        own = FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)
        if self.device.type == "cpu":
            # One call into C++ per step, and fused multiply-adds.
            options: dict[str, Any] = {**decoding_options(), "cpp.enable_floating_point_contract_flag": "fast"}
            return compiled_step(own, self.model, args, {**options, "guard_filter_fn": _no_guard})
        # A graph is recorded for every kv_len, once in CACHE_BLOCK_TOKENS tokens; no reason to warn.
        options = {"triton.cudagraphs": True, "triton.cudagraph_dynamic_shape_warn_limit": None}
        return compiled(own, fullgraph=True, options={**options, "guard_filter_fn": _no_guard})


def _static_tensors(layer: LayerCache) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the tensors of a block's cache, marked as having a static address.

    A compiled step writes into them, and the compiler refuses CUDA graphs for a pass that writes into inputs whose
    address may change. If the address does change, the graph is recorded again.
    """
    tensors = (layer.keys, layer.values, layer.attn_conv_state, layer.mlp_conv_state)
    for tensor in tensors:
        if tensor is not None:
            mark_static_address(tensor)
    return tensors


def _no_guard(guards: Sequence[Any]) -> list[bool]:
    return [False for _ in guards]
