"""Reference model of the decoding benchmark: our own transformer, exported as GGUF, under llama.cpp.

The library itself (llama-cpp-python's binding of ``llama.h``) decodes the rows in one batch, each a sequence of its own
in llama.cpp's cache; the largest logits are chosen here.
"""

from __future__ import annotations

import ctypes
import importlib
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psannlm.benchmarks.decoding.modes import Prompts
from psannlm.benchmarks.harness.exportable_transformer import build_exportable_transformer
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.errors import ConfigError, PsannlmError
from psannlm.export.gguf import Q8_0, write_gguf

# Our dtype -> that of a GGUF file: the nearest that llama.cpp computes with.
_FILE_TYPES: dict[str, Any] = {"float32": "float32", "bfloat16": "bfloat16", "int8": Q8_0}


class LlamaCpp:
    """Our transformer of random weights under llama.cpp, in the dtype of our weights, int8 as Q8_0.

    Attributes:
        model: the exported model, in float32.

    Raises:
        ConfigError: the device is not the CPU.
        PsannlmError: llama.cpp does not load the file.
    """

    name = "llama.cpp"

    def __init__(self, task: ReferenceTask) -> None:
        if task.device.type != "cpu":
            raise ConfigError("--against llama.cpp runs on the CPU; add --device cpu")
        self.model = build_exportable_transformer(task)
        file_type = _FILE_TYPES[task.dtype]
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, self.model, None, file_type)
            vocab_size = self.model.config.vocab_size or 0
            # In a process of its own, for the reason given in reference_ctranslate2.
            self._process = IsolatedProcess(
                _Context,
                str(path),
                task.n_rows,
                task.seq_len,
                vocab_size,
                torch.get_num_threads(),
            )
            weakref.finalize(self, self._process.close)
        library = importlib.import_module("llama_cpp")
        self.description = (
            f"llama.cpp (llama-cpp-python {library.__version__}), our transformer of {self.parameters:,} parameters, "
            f"{file_type}"
        )

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        """Return the greedy continuation of each prompt, ``max_new_tokens`` tokens long."""
        rows: Prompts = self._process.call("generate", prompts, max_new_tokens)
        return rows

    def logits(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the logits (V,) of token ``index`` of the last pass."""
        logits: np.ndarray[Any, np.dtype[np.float32]] = self._process.call("copied_logits", index)
        return logits


class _Context:
    """llama.cpp's context, in the process that decodes."""

    def __init__(self, path: str, n_rows: int, seq_len: int, vocab_size: int, n_threads: int) -> None:
        self._library = library = importlib.import_module("llama_cpp")
        self._quiet = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_settings = library.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        loaded = library.llama_model_load_from_file(path.encode(), model_settings)
        if not loaded:
            raise PsannlmError("llama.cpp does not load the exported model")
        settings = library.llama_context_default_params()
        settings.n_ctx = n_rows * seq_len
        settings.n_batch = settings.n_ctx
        settings.n_seq_max = n_rows
        settings.n_threads = settings.n_threads_batch = n_threads
        self._context = context = library.llama_init_from_model(loaded, settings)
        if not context:
            raise PsannlmError("llama.cpp does not make a context of the exported model")
        self._batch = library.llama_batch_init(settings.n_batch, 0, 1)
        self._vocab_size = vocab_size

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        rows: Prompts = [[] for _ in prompts]
        parts, at = [list(prompt) for prompt in prompts], [0] * len(prompts)
        for _ in range(max_new_tokens):
            chosen = self._decode(parts, at)
            at = [position + len(part) for position, part in zip(at, parts, strict=True)]
            for row, token in zip(rows, chosen, strict=True):
                row.append(token)
            parts = [[token] for token in chosen]
        return rows

    def _decode(self, parts: Sequence[Sequence[int]], first: Sequence[int]) -> list[int]:
        """Add the next tokens of each row to the cache, from position ``first`` on; return the next token of each."""
        batch, n_tokens, last = self._batch, 0, []
        for row, (part, begin) in enumerate(zip(parts, first, strict=True)):
            for offset, token in enumerate(part):
                batch.token[n_tokens] = token
                batch.pos[n_tokens] = begin + offset
                batch.n_seq_id[n_tokens] = 1
                batch.seq_id[n_tokens][0] = row
                batch.logits[n_tokens] = offset == len(part) - 1
                n_tokens += 1
            last.append(n_tokens - 1)
        batch.n_tokens = n_tokens
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise PsannlmError(f"llama.cpp failed to decode {n_tokens:,} tokens (status {status})")
        return [int(self._logits(index).argmax()) for index in last]

    def copied_logits(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self._logits(index).copy()

    def _logits(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the logits (V,) of token ``index`` of the last pass; the next pass overwrites them."""
        pointer = self._library.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
