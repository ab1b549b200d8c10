"""Reference models of the decoding benchmark: which there are, how they are built, and how a run of one is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import util
from typing import Protocol

from psannlm.benchmarks.decoding.modes import DecodeRun, Prompts
from psannlm.benchmarks.harness.interleaved import Clock
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.errors import ConfigError, PsannlmError, install_extra, nearest

# Name of a reference model -> packages that it needs, each with what to do where it is missing.
_PACKAGES = {
    "transformers": {"transformers": install_extra("hf")},
    "llama.cpp": {"gguf": install_extra("gguf"), "llama_cpp": "pip install llama-cpp-python, which compiles llama.cpp"},
    "ctranslate2": {"ctranslate2": "pip install ctranslate2"},
}
REFERENCE_MODELS = tuple(_PACKAGES)


class ReferenceModel(Protocol):
    """Decoder-only model of another library, with random weights."""

    name: str
    description: str
    parameters: int

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        """Return the greedy continuation of each prompt, ``max_new_tokens`` tokens long."""
        ...


def require_reference_model(name: str) -> None:
    """Raise ConfigError if the reference model is unknown or one of its packages is not installed."""
    if name not in _PACKAGES:
        raise ConfigError(
            f"--against {name!r:.40} is not one of {', '.join(REFERENCE_MODELS)}{nearest(name, REFERENCE_MODELS)}"
        )
    for package, remedy in _PACKAGES[name].items():
        if util.find_spec(package) is None:
            raise ConfigError(f"--against {name} needs the package {package}, which is not installed; {remedy}")


def build_reference_model(name: str, task: ReferenceTask) -> ReferenceModel:
    """Build the reference model ``name`` at the size of our model.

    Raises:
        ConfigError: the reference model is unknown, does not run on the device, or its package is not installed.
    """
    require_reference_model(name)
    if name == "llama.cpp":
        from psannlm.benchmarks.harness.reference_llama_cpp import LlamaCpp

        return LlamaCpp(task)
    if name == "ctranslate2":
        from psannlm.benchmarks.harness.reference_ctranslate2 import CTranslate2

        return CTranslate2(task)
    from psannlm.benchmarks.harness.reference_llama import Llama

    return Llama(task.config, task.parameters, task.seq_len, task.device)


@dataclass(frozen=True)
class ReferenceRuns:
    """Runs of a reference model; ``first_s`` are the seconds of its first run, compilation included."""

    name: str
    description: str
    parameters: int
    first_s: float
    runs: list[DecodeRun]


def decode_with(
    reference_model: ReferenceModel, prompts: Prompts, max_new_tokens: int, clock: Clock = time.perf_counter
) -> DecodeRun:
    """Decode the prompts with ``reference_model``; its prefill time is that of generating one token.

    Raises:
        PsannlmError: it generated fewer tokens than requested, or one token took longer than all of them.
    """
    began = clock()
    reference_model.generate(prompts, 1)
    between = clock()
    ids = reference_model.generate(prompts, max_new_tokens)
    ended = clock()
    if any(len(row) != max_new_tokens for row in ids) or len(ids) != len(prompts):
        raise PsannlmError(
            f"{reference_model.name} generated {[len(row) for row in ids]} tokens per row instead of {max_new_tokens}"
        )
    prefill_s, total_s = between - began, ended - between
    if prefill_s >= total_s:
        raise PsannlmError(
            f"{reference_model.name} took {total_s:.4f} s for {max_new_tokens} tokens and {prefill_s:.4f} s for one: "
            "too few to separate decoding from prefill; raise --max-new-tokens"
        )
    return DecodeRun(ids, max_new_tokens, prefill_s, prefill_s, total_s - prefill_s, total_s)
