"""Reference model of the decoding benchmark: the weights of our own transformer under CTranslate2."""

from __future__ import annotations

import importlib
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from psannlm.benchmarks.decoding.modes import Prompts
from psannlm.benchmarks.harness.exportable_transformer import build_exportable_transformer
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, PsannlmError
from psannlm.export.plain_mapping import plain_tensors
from psannlm.generation.quantize import WeightDtype
from psannlm.models.transformer import Transformer


class CTranslate2:
    """Our transformer of random weights under CTranslate2, in the dtype of our weights.

    int8 is CTranslate2's own: inputs of products are quantized too.

    Attributes:
        model: the exported model, in float32.

    Raises:
        ConfigError: the device is not the CPU, or CTranslate2 does not compute in the dtype on this processor.
    """

    name = "ctranslate2"

    def __init__(self, task: ReferenceTask) -> None:
        if task.device.type != "cpu":
            raise ConfigError("--against ctranslate2 runs on the CPU; add --device cpu")
        library = importlib.import_module("ctranslate2")
        supported = library.get_supported_compute_types("cpu")
        if task.dtype not in supported:
            others = " or ".join(dtype for dtype in get_args(WeightDtype) if dtype in supported)
            raise ConfigError(
                f"--against ctranslate2 does not compute in {task.dtype} on this processor; use --dtype {others}"
            )
        self.model = build_exportable_transformer(task)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            path.mkdir()
            self._write(path, task.dtype)
            # In a process of its own: GNU OpenMP counts the threads of both libraries where they share a process, and
            # when these are more than the processors, none waits actively, which takes a small step of either two to
            # four times as long.
            self._process = IsolatedProcess(_Generator, str(path), task.dtype, torch.get_num_threads())
            weakref.finalize(self, self._process.close)
        self.description = (
            f"CTranslate2 {library.__version__}, our transformer of {self.parameters:,} parameters, {task.dtype}"
        )

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        """Return the greedy continuation of each prompt, ``max_new_tokens`` tokens long."""
        # The prompts are read at once as far as the shortest reaches; the rest of the longer ones is in their results.
        shortest = min(map(len, prompts))
        most = max_new_tokens + max(map(len, prompts)) - shortest
        results = self._process.call("generate", _name_tokens(prompts), most)
        ends = [ids[len(row) - shortest :] for ids, row in zip(results, prompts, strict=True)]
        return [list(ids[:max_new_tokens]) for ids in ends]

    def logits(self, ids: Sequence[int]) -> list[float]:
        """Return the logits (V,) after the last of the tokens."""
        logits: list[float] = self._process.call("logits", _name_tokens([list(ids)]))
        return logits

    def _write(self, path: Path, dtype: str) -> None:
        config = self.model.config
        spec = _build_spec(importlib.import_module("ctranslate2.specs"), config)
        # Copies: CTranslate2 quantizes an array in place.
        weights = {name: tensor.numpy().copy() for name, tensor in _fuse_projections(self.model)}
        for (part, attribute), theirs in _list_weights(spec.decoder, config):
            setattr(part, attribute, weights.pop(theirs))
        if weights:
            raise PsannlmError(f"CTranslate2 has no place for {', '.join(sorted(weights))}")
        spec.config.layer_norm_epsilon = config.norm_eps
        names = _name_tokens([list(range(config.vocab_size or 0))])[0]
        spec.register_vocabulary(names)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = names[0]
        spec.validate()
        spec.optimize(quantization="int8" if dtype == "int8" else None)
        spec.save(str(path))


class _Generator:
    """CTranslate2's generator, in the process that decodes."""

    def __init__(self, path: str, dtype: str, n_threads: int) -> None:
        library = importlib.import_module("ctranslate2")
        self._generator = library.Generator(path, device="cpu", compute_type=dtype, intra_threads=n_threads)

    def generate(self, rows: list[list[str]], n_tokens: int) -> list[list[int]]:
        results = self._generator.generate_batch(
            rows, min_length=n_tokens, max_length=n_tokens, include_prompt_in_result=False, end_token=[]
        )
        return [result.sequences_ids[0] for result in results]

    def logits(self, rows: list[list[str]]) -> list[float]:
        logits: list[float] = np.array(self._generator.forward_batch(rows))[0, -1].tolist()
        return logits


def _name_tokens(rows: Prompts) -> list[list[str]]:
    """Return the names of token ids: CTranslate2 takes texts of tokens."""
    return [[str(token) for token in row] for row in rows]


def _build_spec(specs: Any, config: ModelConfig) -> Any:
    spec = specs.TransformerDecoderModelSpec.from_config(
        config.n_layers,
        config.n_heads,
        activation=specs.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config.rope_theta,
        num_heads_kv=config.n_kv_heads,
        qk_norm=config.qk_norm,
    )
    spec.decoder.scale_embeddings = False
    return spec


def _fuse_projections(model: Transformer) -> list[tuple[str, Tensor]]:
    """Return the tensors under the names of transformers, query, key and value projections as one."""
    tensors = dict(plain_tensors(model.state_dict(), torch.float32))
    for block in range(model.config.n_layers):
        attention = f"model.layers.{block}.self_attn"
        parts = [tensors.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
        tensors[f"{attention}.qkv_proj.weight"] = torch.cat(parts)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return list(tensors.items())


def _list_weights(decoder: Any, config: ModelConfig) -> list[tuple[tuple[Any, str], str]]:
    """Return where CTranslate2 has each tensor, with its name in transformers."""
    places = [
        ((decoder.embeddings, "weight"), "model.embed_tokens.weight"),
        ((decoder.layer_norm, "gamma"), "model.norm.weight"),
        ((decoder.projection, "weight"), "lm_head.weight"),
    ]
    for block in range(config.n_layers):
        layer, name = decoder.layer[block], f"model.layers.{block}"
        places += [
            ((layer.self_attention.layer_norm, "gamma"), f"{name}.input_layernorm.weight"),
            ((layer.self_attention.linear[0], "weight"), f"{name}.self_attn.qkv_proj.weight"),
            ((layer.self_attention.linear[1], "weight"), f"{name}.self_attn.o_proj.weight"),
            ((layer.ffn.layer_norm, "gamma"), f"{name}.post_attention_layernorm.weight"),
            ((layer.ffn.linear_0, "weight"), f"{name}.mlp.gate_proj.weight"),
            ((layer.ffn.linear_0_noact, "weight"), f"{name}.mlp.up_proj.weight"),
            ((layer.ffn.linear_1, "weight"), f"{name}.mlp.down_proj.weight"),
        ]
        if config.qk_norm:
            places += [
                ((layer.self_attention.q_norm, "gamma"), f"{name}.self_attn.q_norm.weight"),
                ((layer.self_attention.k_norm, "gamma"), f"{name}.self_attn.k_norm.weight"),
            ]
    return places
