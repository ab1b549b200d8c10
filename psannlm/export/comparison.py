"""Comparison of an exported model with ours: a fresh process that loads the export, its logits and its greedy text."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psannlm.display import printable
from psannlm.errors import LimitMissed
from psannlm.export.held_out import windows_of
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.requests import SamplingConfig
from psannlm.models.transformer import Transformer
from psannlm.runtime.processes import python_program
from psannlm.tokenizers.base import Tokenizer

# Allowed difference of logits, relative to the largest logit of a window.
TOLERANCE = 1e-4
_N_WINDOWS, _MAX_WINDOW = 8, 256
_PROMPT_LENGTHS = (2, 5, 17, 40)


class VerificationFailed(LimitMissed):
    """An exported model that computes something else than the model it was made from (exit code 3)."""


@dataclass(frozen=True)
class Questions:
    """What both sides compute: the logits of ``windows``, and ``n_new`` greedy tokens after each of ``prompts``."""

    windows: list[list[int]]
    prompts: list[list[int]]
    n_new: int

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer, held_out: list[str], n_new: int) -> Questions:
        """Take them from held-out texts, within the model's context; at most ``n_new`` tokens."""
        limit = model.config.max_seq_len or _MAX_WINDOW
        n_new = max(1, min(n_new, limit // 2))
        windows = windows_of(held_out, tokenizer, _N_WINDOWS, min(limit, _MAX_WINDOW))
        ids = windows[0]
        lengths = sorted({max(1, min(length, limit - n_new, len(ids))) for length in _PROMPT_LENGTHS})
        return cls(windows, [ids[:length] for length in lengths], n_new)

    @property
    def counted_windows(self) -> str:
        """``1 window`` or ``8 windows``."""
        return f"{len(self.windows)} window{'' if len(self.windows) == 1 else 's'}"


@contextmanager
def asked(script: Path, request: dict[str, Any], place: Path, what: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run ``script`` on ``request`` in a fresh process, in the new folder ``place``; yield a function for its answer.

    The process has no network, no GPU and no module cache of another export. It is ended with the context.

    Raises:
        VerificationFailed: (the function) the process fails; ``what`` is "PROGRAM cannot load or run EXPORT".
    """
    place.mkdir()
    path = place / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(place / "cache"),
        "HF_MODULES_CACHE": str(place / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "PYTHONIOENCODING": "utf-8",
    }
    process = subprocess.Popen(
        python_program(f"import runpy; runpy.run_path({str(script)!a}, run_name='__main__')", str(path)),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )

    def answer() -> dict[str, Any]:
        _, errors = process.communicate()
        if process.returncode:
            last = [line for line in errors.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
            raise VerificationFailed(f"{what}: {printable(last[-1])}")
        found: dict[str, Any] = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        return found

    try:
        yield answer
    finally:
        process.kill()
        process.wait()


@torch.inference_mode()
def largest_difference(reference: Transformer, windows: Sequence[Sequence[int]], place: Path) -> float:
    """Return the largest difference of logits in all windows, each relative to its largest logit.

    The process has written those of window i, (T, V) float32, to ``logits_i.bin`` in ``place``; they are removed.

    Raises:
        VerificationFailed: a difference is above :data:`TOLERANCE`; names the first window, position and token.
    """
    return max(_difference(reference, window, place / f"logits_{i}.bin", i) for i, window in enumerate(windows))


def _difference(reference: Transformer, window: Sequence[int], path: Path, number: int) -> float:
    ours = reference(torch.tensor([window]))[0].float().numpy()
    theirs = np.fromfile(path, dtype=np.float32).reshape(ours.shape)
    path.unlink()
    largest = float(np.abs(ours).max())
    difference = np.abs(ours - theirs)
    relative = float(difference.max()) / (largest or 1.0)
    if not relative <= TOLERANCE:  # also for NaN
        position, token = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), ours.shape)
        raise VerificationFailed(
            f"window {number}, position {position}: the logit of token {token} is {theirs[position, token]:.6g} there, "
            f"{ours[position, token]:.6g} here; allowed are {TOLERANCE:g} of the largest logit, {largest:.4g}"
        )
    return relative


def greedy_ids(
    reference: Transformer, prompts: list[list[int]], n_new: int, eos_id: int, suppressed: Collection[int]
) -> list[list[int]]:
    """Return the new ids of each prompt, decoded greedily as one batch, without EOS."""
    decoder = BatchDecoder(
        Engine(reference),
        prompts,
        max_new_tokens=n_new,
        sampling=SamplingConfig(temperature=0.0),
        eos_id=eos_id,
        forbidden_ids=tuple(suppressed),
    )
    for _ in decoder:
        pass
    return decoder.generated


@torch.inference_mode()
def count_greedy_ties(
    reference: Transformer,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
    *,
    eos_id: int,
    tolerance: float = TOLERANCE,
    way: str = "",
) -> int:
    """Return the number of rows that differ from a tie on: two logits no further apart than rounding.

    Raises:
        VerificationFailed: a row differs elsewhere; ``way`` says how it was decoded.
    """
    n_ties = 0
    for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
        if ours == theirs:
            continue
        pairs = zip([*ours, eos_id], [*theirs, eos_id], strict=False)
        at, mine, other = next((i, mine, other) for i, (mine, other) in enumerate(pairs) if mine != other)
        logits = reference(torch.tensor([[*prompt, *ours[:at]]]))[0, -1].float()
        if not bool((logits[mine] - logits[other]).abs() <= 2 * tolerance * logits.abs().max()):
            raise VerificationFailed(
                f"greedy text{way}, prompt of {len(prompt)} ids: new token {at} is {other} there, {mine} here"
            )
        n_ties += 1
    return n_ties


def other_ids(text: str, ours: Sequence[int], theirs: Sequence[int]) -> VerificationFailed:
    """Return the error for a text whose ids differ, with the first place where they do."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return VerificationFailed(
        f"the text {text!r:.80} has the ids {theirs[at : at + 8]} there, {ours[at : at + 8]} here, from id {at} on"
    )
