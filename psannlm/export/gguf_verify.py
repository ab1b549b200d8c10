"""Verification of a GGUF file: transformers and llama.cpp, in fresh processes, must compute what psannlm computes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psannlm.display import printable
from psannlm.errors import ConfigError, install_extra
from psannlm.export.held_out import VerificationText, random_texts, windows_of
from psannlm.export.hf import suppressed_ids
from psannlm.export.verify import VerificationFailed
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.sampling import SamplingConfig
from psannlm.models.transformer import Transformer
from psannlm.runtime.processes import python_program
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.sentencepiece import ESCAPES, SentencePieceTokenizer

N_GREEDY = 32
_N_WINDOWS, _MAX_WINDOW = 8, 256
_TOLERANCE = 1e-4
# Of the largest logit. llama.cpp rounds the inputs of a product to the type of its matrix.
_TIE_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_PROMPT_LENGTHS = (2, 5, 17, 40)
# Architectures that transformers reads back. Its reader of SentencePiece's tokenizers adds a space before a text.
_READ_BY_TRANSFORMERS = ("llama", "qwen3")
_CHILD = Path(__file__).with_name("gguf_verify_child.py")
_INSTALL = f"{install_extra('hf,gguf')}, or pip install llama-cpp-python"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class GgufVerification:
    """What was compared, one sentence each, and the text that was compared on."""

    text: str
    compared: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "; ".join(self.compared)


def readers_for(architecture: str) -> list[str]:
    """Return which of ``transformers`` and ``llama_cpp`` are installed and can read a file of ``architecture``.

    Raises:
        ConfigError: none is.
    """
    found = ["llama_cpp"] if find_spec("llama_cpp") else []
    # transformers reads GGUF by way of accelerate.
    if architecture in _READ_BY_TRANSFORMERS and find_spec("transformers") and find_spec("accelerate"):
        found.insert(0, "transformers")
    if not found:
        raise ConfigError(
            f"verification of a GGUF file of the architecture {architecture} needs a program that reads it: "
            f"{_INSTALL}; or export unverified with --no-verify"
        )
    return found


def verify_gguf(
    path: Path,
    reference: Transformer,
    tokenizer: Tokenizer,
    architecture: str,
    dtype: str,
    text: VerificationText,
    on_progress: Progress = lambda line: None,
) -> GgufVerification:
    """Compare the file with ``reference``, the float32 model with weights rounded to ``dtype``, in a folder beside it.

    Raises:
        VerificationFailed: a program cannot load the file, or the first difference.
        ConfigError: no program that reads it is installed.
        OSError: a temporary file cannot be written.
    """
    limit = reference.config.max_seq_len or _MAX_WINDOW
    n_new = max(1, min(N_GREEDY, limit // 2))
    windows = windows_of(text.held_out, tokenizer, _N_WINDOWS, min(limit, _MAX_WINDOW))
    lengths = sorted({max(1, min(length, limit - n_new, len(windows[0]))) for length in _PROMPT_LENGTHS})
    request = {
        "path": str(path),
        "head_dim": reference.config.d_model // reference.config.n_heads,
        "windows": windows,
        "prompts": [windows[0][:length] for length in lengths],
        "n_new": n_new,
        "eos_id": tokenizer.eos_id,
        "suppressed": suppressed_ids(reference.config, tokenizer),
    }
    is_escaping = isinstance(tokenizer, SentencePieceTokenizer)
    escaped = [char for char, _ in ESCAPES] if is_escaping else []
    texts = [t for t in (*text.passages, *random_texts()) if not any(char in t for char in escaped)]
    found = GgufVerification(text.description)
    for by in readers_for(architecture):
        on_progress(f"verifying: reading the file with {by}")
        has_texts = not (by == "transformers" and is_escaping)
        answer, place = _ask(by, {**request, "texts": texts if has_texts else []}, path.parent.parent)
        if by == "transformers":
            largest = max(
                _window_difference(reference, window, place / f"logits_{number}.bin", number)
                for number, window in enumerate(windows)
            )
            noun = "window" if len(windows) == 1 else "windows"
            line = f"{len(windows)} {noun}, largest difference {largest:.1e} of the largest logit"
        else:
            n_ties = _compare_greedy(reference, tokenizer, request, answer["greedy"], _TIE_TOLERANCES[dtype])
            ties = f" but for {n_ties} ties that rounding decides" if n_ties else ""
            line = f"{n_new} greedy tokens of {len(lengths)} prompts equal{ties}"
            if answer["first_ids"] != [tokenizer.bos_id]:
                raise VerificationFailed(f"an encoded text begins with {answer['first_ids']} there")
        ids = _compare_ids(tokenizer, texts, answer["ids"]) if has_texts else "token ids not compared"
        found.compared.append(f"{by} {answer['version']}: {line}; {ids}")
    return found


def _ask(by: str, request: dict[str, Any], beside: Path) -> tuple[dict[str, Any], Path]:
    """Return the answer of a fresh process, and the folder of its files."""
    place = beside / f"verification_{by}"
    place.mkdir()
    asked = place / "request.json"
    asked.write_text(json.dumps({**request, "by": by}), encoding="utf-8")
    done = subprocess.run(
        python_program(f"import runpy; runpy.run_path({str(_CHILD)!a}, run_name='__main__')", str(asked)),
        env=_environment(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise VerificationFailed(f"{by} cannot load or run the exported file: {printable(last[-1])}")
    answer: dict[str, Any] = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    return answer, place


def _environment(place: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "cache"),
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "PYTHONIOENCODING": "utf-8",
    }


@torch.inference_mode()
def _window_difference(reference: Transformer, window: Sequence[int], path: Path, number: int) -> float:
    """Return the largest difference of logits, divided by the largest logit. Raises VerificationFailed above 1e-4."""
    ours = reference(torch.tensor([window]))[0].float().numpy()
    theirs = np.fromfile(path, dtype=np.float32).reshape(ours.shape)
    relative = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not relative <= _TOLERANCE:  # also for NaN
        raise VerificationFailed(
            f"window {number}: logits differ by {relative:.1e} of the largest one; allowed are {_TOLERANCE:g}"
        )
    return relative


def _compare_greedy(
    reference: Transformer, tokenizer: Tokenizer, request: dict[str, Any], rows: list[list[int]], tolerance: float
) -> int:
    """Return the number of rows that end in a tie. Raises VerificationFailed for the first other token."""
    decoder = BatchDecoder(
        Engine(reference),
        request["prompts"],
        max_new_tokens=request["n_new"],
        sampling=SamplingConfig(temperature=0.0),
        eos_id=tokenizer.eos_id,
        forbidden_ids=request["suppressed"],
    )
    for _ in decoder:
        pass
    n_ties = 0
    for prompt, ours, theirs in zip(request["prompts"], decoder.generated, rows, strict=True):
        if ours == theirs:
            continue
        mine, other = [*ours, tokenizer.eos_id], [*theirs, tokenizer.eos_id]
        at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *ours[:at]]]))[0, -1].float()
        if float((logits[mine[at]] - logits[other[at]]).abs()) > 2 * tolerance * float(logits.abs().max()):
            raise VerificationFailed(
                f"greedy text, prompt of {len(prompt)} ids: new token {at} is {other[at]} in llama.cpp, {mine[at]} here"
            )
        n_ties += 1
    return n_ties


def _compare_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[list[int]]) -> str:
    """Return how many ids were equal. Raises VerificationFailed for the first text with other ids."""
    encoded = tokenizer.encode_batch(texts)
    for text, ours, theirs in zip(texts, encoded, found, strict=True):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            raise VerificationFailed(
                f"the text {text!r:.80} has the ids {theirs[at : at + 8]} there, {ours[at : at + 8]} here, from id "
                f"{at} on"
            )
    return f"{sum(map(len, encoded)):,} ids of {len(texts):,} texts equal"
