"""Verification of an exported folder: transformers, in a fresh process, must compute what psannlm computes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psannlm.display import printable
from psannlm.errors import ConfigError, LimitMissed, install_extra
from psannlm.export.held_out import VerificationText, random_texts, windows_of
from psannlm.export.hf import Target, suppressed_ids
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.sampling import SamplingConfig
from psannlm.models.transformer import Transformer
from psannlm.runtime.processes import python_program
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

TOLERANCE = 1e-4
N_WINDOWS = 8
_MAX_WINDOW = 256
_N_NEW = 64
_PROMPT_LENGTHS = (2, 5, 17, 40)
_CHILD = Path(__file__).with_name("verify_child.py")
Progress = Callable[[str], None]


class VerificationFailed(LimitMissed):
    """An exported folder that computes something else than the model it was made from (exit code 3)."""


@dataclass(frozen=True)
class Verification:
    """What was compared: ``largest_difference`` of logits, relative to the largest logit of its window.

    ``n_ties``: greedy choices, or segmentations of a text, between equals, where rounding decides.
    """

    transformers: str
    architecture: str
    n_windows: int
    largest_difference: float
    n_greedy: int
    n_texts: int
    n_tokens: int
    n_ties: int
    text: str

    def __str__(self) -> str:
        noun = "tie" if self.n_ties == 1 else "ties"
        ties = f" but for {self.n_ties:,} {noun} that rounding decides" if self.n_ties else ""
        windows = "window" if self.n_windows == 1 else "windows"
        return (
            f"transformers {self.transformers} as {self.architecture}: {self.n_windows} {windows}, largest difference "
            f"{self.largest_difference:.1e} of the largest logit; {self.n_greedy} greedy tokens equal, with and "
            f"without cache, alone and left-padded; {self.n_tokens:,} ids of {self.n_texts:,} texts equal{ties}"
        )


def require_transformers() -> None:
    """Raise ConfigError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise ConfigError(
            f"verification needs transformers, which is not installed; {install_extra('hf')}, or export unverified "
            "with --no-verify"
        )


def verify_folder(
    folder: Path,
    reference: Transformer,
    tokenizer: Tokenizer,
    target: Target,
    text: VerificationText,
    on_progress: Progress = lambda line: None,
) -> Verification:
    """Compare ``folder`` with the float32 ``reference`` model; temporary files are written beside it.

    Raises:
        VerificationFailed: transformers cannot load the folder, or the first difference.
        ConfigError: transformers is not installed.
        OSError: a temporary file cannot be written.
    """
    require_transformers()
    limit = reference.config.max_seq_len or _MAX_WINDOW
    n_new = max(1, min(_N_NEW, limit // 2))
    texts = [*text.passages, *random_texts()]
    windows = windows_of(text.held_out, tokenizer, N_WINDOWS, min(limit, _MAX_WINDOW))
    ids = windows[0]
    lengths = sorted({max(1, min(length, limit - n_new, len(ids))) for length in _PROMPT_LENGTHS})
    request = {
        "folder": str(folder),
        "is_custom": target.is_custom,
        "windows": windows,
        "prompts": [ids[:length] for length in lengths],
        "n_new": n_new,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "texts": texts,
    }
    place = folder.parent / "verification"
    place.mkdir()
    path = place / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    on_progress("verifying: loading the folder with transformers in a fresh process")
    process = subprocess.Popen(
        python_program(f"import runpy; runpy.run_path({str(_CHILD)!a}, run_name='__main__')", str(path)),
        env=_environment(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        # Both processes work at the same time.
        expected = _greedy(reference, tokenizer, request)
        encoded = tokenizer.encode_batch(texts)
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        last = [line for line in errors.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        raise VerificationFailed(f"transformers cannot load or run the exported folder: {printable(last[-1])}")
    answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    _compare_load(answer, target, tokenizer)
    on_progress("verifying: comparing logits, greedy text and ids")
    largest = max(
        _window_difference(reference, window, place / f"logits_{i}.bin", i) for i, window in enumerate(windows)
    )
    n_ties = _compare_greedy(reference, request, expected, answer)
    n_ties += _compare_tokens(tokenizer, texts, encoded, answer)
    return Verification(
        transformers=answer["transformers"],
        architecture=answer["architecture"],
        n_windows=len(windows),
        largest_difference=largest,
        n_greedy=sum(map(len, expected)),
        n_texts=len(texts),
        n_tokens=sum(map(len, encoded)),
        n_ties=n_ties,
        text=f"{text.description}, and {len(texts) - len(text.passages):,} random Unicode strings",
    )


def _environment(place: Path) -> dict[str, str]:
    """Return the environment of the fresh process: no network, no GPU, and no module that another export left."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "PYTHONIOENCODING": "utf-8",
    }


def _greedy(reference: Transformer, tokenizer: Tokenizer, request: dict[str, Any]) -> list[list[int]]:
    decoder = BatchDecoder(
        Engine(reference),
        request["prompts"],
        max_new_tokens=request["n_new"],
        sampling=SamplingConfig(temperature=0.0),
        eos_id=tokenizer.eos_id,
        forbidden_ids=suppressed_ids(reference.config, tokenizer),
    )
    for _ in decoder:
        pass
    return decoder.generated


def _compare_load(answer: dict[str, Any], target: Target, tokenizer: Tokenizer) -> None:
    if answer["psannlm_modules"]:
        raise VerificationFailed(f"the exported code imports {answer['psannlm_modules'][0]}, which others do not have")
    if answer["architecture"] != target.architecture:
        raise VerificationFailed(f"transformers loads a {answer['architecture']}, not a {target.architecture}")
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    if answer["specials"] != ids:
        raise VerificationFailed(f"pad, begin, end and unknown are the ids {answer['specials']} there, {ids} here")
    if wrong := [first for first in answer["first_ids"] if first != [tokenizer.bos_id]]:
        raise VerificationFailed(f"an encoded text begins with {wrong[0]} there, with {[tokenizer.bos_id]} here")


@torch.inference_mode()
def _window_difference(reference: Transformer, window: Sequence[int], path: Path, number: int) -> float:
    """Return the largest difference of logits, divided by the largest logit. Raises VerificationFailed above 1e-4."""
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


def _compare_greedy(
    reference: Transformer, request: dict[str, Any], expected: list[list[int]], answer: dict[str, Any]
) -> int:
    """Return the number of rows that end in a tie. Raises VerificationFailed for the first other token."""
    ways = {"alone": "alone, with cache", "uncached": "left-padded, without cache", "padded": "left-padded, with cache"}
    n_ties = 0
    for way, described in ways.items():
        for prompt, ours, theirs in zip(request["prompts"], expected, answer[way], strict=True):
            if ours == theirs:
                continue
            eos = request["eos_id"]
            pairs = zip([*ours, eos], [*theirs, eos], strict=False)
            at = next(i for i, (mine, other) in enumerate(pairs) if mine != other)
            mine, other = [*ours, eos][at], [*theirs, eos][at]
            if not _is_tie(reference, [*prompt, *ours[:at]], mine, other):
                raise VerificationFailed(
                    f"greedy text {described}, prompt of {len(prompt)} ids: new token {at} is {other} there, {mine} "
                    "here"
                )
            n_ties += 1
    return n_ties


@torch.inference_mode()
def _is_tie(reference: Transformer, ids: list[int], mine: int, other: int) -> bool:
    logits = reference(torch.tensor([ids]))[0, -1].float()
    return bool((logits[mine] - logits[other]).abs() <= 2 * TOLERANCE * logits.abs().max())


def _compare_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[list[int]], answer: dict[str, Any]
) -> int:
    """Return the number of texts whose segmentations tie. Raises VerificationFailed for the first other difference."""
    n_ties = 0
    decoded = tokenizer.decode_batch(encoded)
    for text, ours, theirs, ours_back, back in zip(
        texts, encoded, answer["ids"], decoded, answer["decoded"], strict=True
    ):
        if back != ours_back:
            raise VerificationFailed(f"the text {text!r:.80} comes back as {back!r:.80} there, {ours_back!r:.80} here")
        if ours != theirs:
            if not _is_segmentation_tie(tokenizer, ours, theirs):
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
                raise VerificationFailed(
                    f"the text {text!r:.80} has the ids {theirs[at : at + 8]} there, {ours[at : at + 8]} here, from "
                    f"id {at} on"
                )
            n_ties += 1
    return n_ties


def _is_segmentation_tie(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two unigram segmentations of one text score the same, up to the rounding of SentencePiece's float32 sums.

    Two pieces in the other order, such as four spaces and then one, have equal sums; which of them is found depends on
    rounding.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    mine, other = tokenizer.score(ours), tokenizer.score(theirs)
    return mine is not None and other is not None and abs(mine - other) <= 2.0**-21 * abs(mine)
