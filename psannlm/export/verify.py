"""Verification of an exported folder: transformers, in a fresh process, must compute what psannlm computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from psannlm.export.hf import Target, suppressed_ids
from psannlm.models.transformer import Transformer
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

_N_NEW = 64
_CHILD = Path(__file__).with_name("verify_child.py")
# How transformers decodes each prompt.
_WAYS = {"alone": "alone, with cache", "uncached": "left-padded, without cache", "padded": "left-padded, with cache"}


@dataclass(frozen=True)
class Verification:
    """What was compared: ``largest_difference`` of logits, relative to the largest logit of its window.

    ``n_ties``: greedy choices, or segmentations of a text, between equals, where rounding decides.
    """

    transformers: str
    architecture: str
    windows: str
    largest_difference: float
    n_greedy: int
    n_texts: int
    n_tokens: int
    n_ties: int
    text: str

    def __str__(self) -> str:
        noun = "tie" if self.n_ties == 1 else "ties"
        ties = f" but for {self.n_ties:,} {noun} that rounding decides" if self.n_ties else ""
        return (
            f"transformers {self.transformers} as {self.architecture}: {self.windows}, largest difference "
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
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Compare ``folder`` with the float32 ``reference`` model; temporary files are written beside it.

    Raises:
        VerificationFailed: transformers cannot load the folder, or the first difference.
        ConfigError: transformers is not installed.
        OSError: a temporary file cannot be written.
    """
    require_transformers()
    questions = Questions.of(reference, tokenizer, text.held_out, _N_NEW)
    texts = [*text.passages, *random_texts()]
    request = {
        "folder": str(folder),
        "is_custom": target.is_custom,
        **asdict(questions),
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "texts": texts,
    }
    place = folder.parent / "verification"
    on_progress(Progress("verifying: loading the folder with transformers in a fresh process"))
    with asked(_CHILD, request, place, "transformers cannot load or run the exported folder") as answer_of:
        # Both processes work at the same time.
        suppressed = suppressed_ids(reference.config, tokenizer)
        expected = greedy_ids(reference, questions.prompts, questions.n_new, tokenizer.eos_id, suppressed)
        encoded = tokenizer.encode_batch(texts)
        answer = answer_of()
    _compare_load(answer, target, tokenizer)
    on_progress(Progress("verifying: comparing logits, greedy text and ids"))
    largest = largest_difference(reference, questions.windows, place)
    n_ties = sum(
        count_greedy_ties(
            reference, questions.prompts, expected, answer[way], eos_id=tokenizer.eos_id, way=f" {described}"
        )
        for way, described in _WAYS.items()
    )
    n_ties += _compare_tokens(tokenizer, texts, encoded, answer)
    return Verification(
        transformers=answer["transformers"],
        architecture=answer["architecture"],
        windows=questions.counted_windows,
        largest_difference=largest,
        n_greedy=sum(map(len, expected)),
        n_texts=len(texts),
        n_tokens=sum(map(len, encoded)),
        n_ties=n_ties,
        text=f"{text.description}, and {len(texts) - len(text.passages):,} random Unicode strings",
    )


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
                raise other_ids(text, ours, theirs)
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
