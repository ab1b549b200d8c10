"""Schemas of the records that ``tokenize``, ``prep`` and ``train`` leave beside their results (``metrics.json``)."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from pydantic.dataclasses import dataclass

from psannlm.data.manifest import SplitEntry, TokenizerEntry
from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole, absent_if_none


@dataclass(frozen=True, kw_only=True)
class TokenizerCard(Figures):
    """A fitted tokenizer, with figures on held-out text; also the content of ``<file>.card.json``.

    Attributes:
        held_out_byte_fallback_share: fraction of the tokens that are single bytes.
        fitted_on_chars, sample_chars: characters fitted on, and the most that were allowed.
        card: path of the card; None in the card itself.
    """

    file: str
    backend: str
    model_type: str | None
    vocab_size: Whole
    vocab_size_asked: Whole
    fingerprint: str
    held_out_bytes_per_token: Figure
    held_out_bytes: Whole
    held_out_tokens: Whole
    held_out_byte_fallback_share: Figure
    held_out_is_lossless: Flag
    longest_pieces: list[str]
    corpus_documents: Whole
    corpus_bytes: Whole
    corpus_sha256: str
    fitted_on_chars: Whole
    sample_chars: Whole
    seed: Whole
    card: str | None = None

    _serialize = absent_if_none("card")


@dataclass(frozen=True, kw_only=True)
class PrepRecord(Figures):
    """A preparation: what it took and what its manifest says. ``was_done``: the folder was finished before."""

    folder: str
    was_done: Flag
    seconds: Figure
    corpus_bytes: Whole
    mb_per_s: OptionalFigure
    part: str
    dtype: str
    tokenizer: TokenizerEntry
    train: SplitEntry
    validation: SplitEntry
    drops: dict[str, Whole]
    duplicates: Whole
    lossy_tokenizer: Flag | None = None
    lost_fraction: OptionalFigure = None
    content_sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Figures):
    """A finished training run; the fields are those of ``training.callbacks.TrainResult``."""

    folder: str
    checkpoint: str
    curve: str | None = None
    steps: Whole
    total_steps: Whole
    epochs: OptionalFigure = None
    tokens: Whole
    parameters: Whole
    skipped: Whole
    seconds: Figure
    train_loss: OptionalFigure
    best: dict[str, Any] | None = field(default=None)
    val_overlap: OptionalFigure = None
    lossy_tokenizer: Flag | None = None
    ema: dict[str, Any] | None = field(default=None)

    _serialize = absent_if_none("ema")
