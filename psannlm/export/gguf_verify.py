"""Verification of a GGUF file: transformers and llama.cpp, in fresh processes, must compute what psannlm computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from psannlm.errors import ConfigError, install_extra
from psannlm.export.comparison import (
    Questions,
    VerificationFailed,
    asked,
    count_greedy_ties,
    greedy_ids,
    largest_difference,
    other_ids,
)
from psannlm.export.held_out import VerificationText, random_texts
from psannlm.export.hf import suppressed_ids
from psannlm.models.transformer import Transformer
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.sentencepiece import ESCAPES, SentencePieceTokenizer

N_GREEDY = 32
# Of the largest logit. llama.cpp rounds the inputs of a product to the type of its matrix.
_TIE_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
# Architectures that transformers reads back. Its reader of SentencePiece's tokenizers adds a space before a text.
_READ_BY_TRANSFORMERS = ("llama", "qwen3")
_CHILD = Path(__file__).with_name("gguf_verify_child.py")
_INSTALL = f"{install_extra('hf,gguf')}, or pip install llama-cpp-python"


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
    on_progress: OnProgress = ignore_progress,
) -> GgufVerification:
    """Compare the file with ``reference``, the float32 model with weights rounded to ``dtype``, in a folder beside it.

    Raises:
        VerificationFailed: a program cannot load the file, or the first difference.
        ConfigError: no program that reads it is installed.
        OSError: a temporary file cannot be written.
    """
    questions = Questions.of(reference, tokenizer, text.held_out, N_GREEDY)
    suppressed = suppressed_ids(reference.config, tokenizer)
    request = {
        "path": str(path),
        "head_dim": reference.config.d_model // reference.config.n_heads,
        **asdict(questions),
        "eos_id": tokenizer.eos_id,
        "suppressed": suppressed,
    }
    is_escaping = isinstance(tokenizer, SentencePieceTokenizer)
    escaped = [char for char, _ in ESCAPES] if is_escaping else []
    texts = [t for t in (*text.passages, *random_texts()) if not any(char in t for char in escaped)]
    found = GgufVerification(text.description)
    for by in readers_for(architecture):
        on_progress(Progress(f"verifying: reading the file with {by}"))
        has_texts = not (by == "transformers" and is_escaping)
        asking = {**request, "by": by, "texts": texts if has_texts else []}
        place = path.parent.parent / f"verification_{by}"
        with asked(_CHILD, asking, place, f"{by} cannot load or run the exported file") as answer_of:
            answer = answer_of()
        if by == "transformers":
            largest = largest_difference(reference, questions.windows, place)
            line = f"{questions.counted_windows}, largest difference {largest:.1e} of the largest logit"
        else:
            prompts, eos_id, tolerance = questions.prompts, tokenizer.eos_id, _TIE_TOLERANCES[dtype]
            expected = greedy_ids(reference, prompts, questions.n_new, eos_id, suppressed)
            n_ties = count_greedy_ties(
                reference, prompts, expected, answer["greedy"], eos_id=eos_id, tolerance=tolerance
            )
            ties = f" but for {n_ties} tie{'' if n_ties == 1 else 's'} that rounding decides" if n_ties else ""
            line = f"{questions.n_new} greedy tokens of {len(prompts)} prompts equal{ties}"
            if answer["first_ids"] != [tokenizer.bos_id]:
                raise VerificationFailed(f"an encoded text begins with {answer['first_ids']} there")
        ids = _compare_ids(tokenizer, texts, answer["ids"]) if has_texts else "token ids not compared"
        found.compared.append(f"{by} {answer['version']}: {line}; {ids}")
    return found


def _compare_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[list[int]]) -> str:
    """Return how many ids were equal. Raises VerificationFailed for the first text with other ids."""
    encoded = tokenizer.encode_batch(texts)
    for text, ours, theirs in zip(texts, encoded, found, strict=True):
        if ours != theirs:
            raise other_ids(text, ours, theirs)
    return f"{sum(map(len, encoded)):,} ids of {len(texts):,} texts equal"
