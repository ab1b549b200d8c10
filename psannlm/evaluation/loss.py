"""Evaluation: loss per token, perplexity and bits per byte of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from psannlm.config.constants import IGNORE_INDEX
from psannlm.config.data import Source
from psannlm.config.model import ModelConfig
from psannlm.data.corpus.documents import ReadReport, read_documents
from psannlm.data.memory_store import encode_documents
from psannlm.data.prepared import find_prepared
from psannlm.data.stream import Stream
from psannlm.data.windows import Windows
from psannlm.errors import ArtifactError, ConfigError, CorpusError, TokenizerError
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.artifact import ISOLATED_NOTE, LoadedModel
from psannlm.runtime.device import Precision, gpu_memory_bytes
from psannlm.runtime.distributed import World
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.roundtrip import RoundTripMeter, check_roundtrip, folder_warning, is_lossy


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation: total cross-entropy in ``nats`` over ``n_labels`` tokens (EOS of documents included).

    ``n_bytes`` is the size of the text in UTF-8. EOS counts towards the loss but not towards the bytes, so that bits
    per byte is an upper bound of the text's code length, comparable between lossless tokenizers. A tokenizer that loses
    text has fewer tokens to predict: ``lost_fraction`` is the fraction of checked bytes lost, None where unknown.
    """

    nats: float
    n_labels: int
    n_bytes: int
    lost_fraction: float | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.n_labels

    @property
    def perplexity(self) -> float:
        """exp(loss): depends on the tokenizer, not comparable between two."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per byte of UTF-8: comparable between tokenizers."""
        return self.nats / math.log(2.0) / self.n_bytes

    @property
    def lossy_tokenizer(self) -> bool | None:
        """Whether the tokenizer loses text, so that bits per byte are too low; None where it was not checked."""
        return is_lossy(self.lost_fraction)

    def as_dict(self) -> dict[str, Any]:
        """Return every figure by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.n_labels,
            "bytes": self.n_bytes,
            "lossy_tokenizer": self.lossy_tokenizer,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    precision: Precision,
    batch_size: int = 16,
    world: World | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Return the :class:`Evaluation` of ``model`` over every window, each token counted once.

    The first tokens of a window are predicted from a short context, as in training; so are those of each document where
    ``windows`` isolates documents. ``model`` maps (input_ids, labels) to a summed loss and keeps its mode. Windows are
    divided among the ranks, and all ranks get the same result.

    Raises:
        CorpusError: the text has no tokens.
    """
    world = world or World()
    if windows.n_labels == 0 or windows.store.n_bytes == 0:
        raise CorpusError("the text to evaluate on has no tokens; add text")
    was_training = model.training
    model.eval()
    mine = range(world.rank, len(windows), world.size)
    nats, count = 0.0, ProgressCounter(on_progress, "evaluating", "windows", len(mine))
    try:
        # The same number of passes on every rank, because a sharded model is gathered from all of them. A rank that has
        # no window left repeats one with every label ignored.
        for start in range(0, -(-len(windows) // world.size), batch_size):
            rows = mine[start : start + batch_size] or range(1)
            input_ids, labels = windows.batch(rows)
            positions = windows.document_positions(rows)
            # Without a border the model is called as before, also a model that takes no positions.
            isolated = {} if positions is None else {"document_positions": positions.to(precision.device)}
            if start >= len(mine):
                labels = torch.full_like(labels, IGNORE_INDEX)
            with precision.autocast():
                nats += float(model(input_ids.to(precision.device), labels.to(precision.device), **isolated))
            count.at(min(start + batch_size, len(mine)))
    finally:
        model.train(was_training)
    return Evaluation(world.sum(nats, precision.device), windows.n_labels, windows.store.n_bytes)


@dataclass(frozen=True)
class EvaluationText:
    """Windows of a text to evaluate on, what was read, and the fraction that the tokenizer lost (None: unknown)."""

    windows: Windows
    report: ReadReport
    lost_fraction: float | None


def read_windows(
    loaded: LoadedModel,
    sources: Sequence[Source],
    *,
    precision: Precision,
    batch_size: int = 16,
    window: int | None = None,
    isolate_documents: bool | None = None,
    replace_option: str = "",
    on_progress: OnProgress = ignore_progress,
) -> EvaluationText:
    """Return all text of ``sources`` as windows for a loaded model, which is on the device of ``precision``.

    Arguments and errors are those of :func:`evaluate_sources`.
    """
    if loaded.tokenizer is None:
        raise ArtifactError(
            "the model file has no tokenizer, and text can only be evaluated with the one it was trained with"
        )
    config = loaded.model.config
    longest = config.max_seq_len or 256
    if window is not None and window > longest and config.positional_encoding != "alibi":
        raise CorpusError(f"a window of {window} tokens is longer than the model's context of {longest}")
    store, report, lost_fraction = _read(sources, loaded.tokenizer, replace_option, on_progress)
    if isolate_documents is None:
        isolate_documents = loaded.notes.get(ISOLATED_NOTE) is True
    windows = Windows(store, window or longest, pad_id=loaded.tokenizer.pad_id, isolate_documents=isolate_documents)
    _refuse_oversize(config, windows, batch_size, precision.device)
    return EvaluationText(windows, report, lost_fraction)


def evaluate_sources(
    loaded: LoadedModel,
    sources: Sequence[Source],
    *,
    precision: Precision,
    batch_size: int = 16,
    window: int | None = None,
    isolate_documents: bool | None = None,
    replace_option: str = "",
    on_progress: OnProgress = ignore_progress,
) -> tuple[Evaluation, ReadReport]:
    """Evaluate a loaded model, already on the device of ``precision``, on all text of ``sources``.

    Of a prepared folder that is the validation split, or all of it where nothing was held out.

    Args:
        window: tokens per window; None: the length the model was trained with.
        isolate_documents: keep the documents of a window apart; None: as the model was trained.
        replace_option: what errors recommend for bytes that are not UTF-8.

    Raises:
        ArtifactError: the model file has no tokenizer, or a prepared folder is damaged.
        TokenizerError: a prepared folder was made with another tokenizer than the model.
        ConfigError: a prepared folder is combined with other sources, or a pass over ``batch_size`` windows does not
            fit into memory.
        CorpusError: a source cannot be read, holds no text, or ``window`` is longer than the model's context.
    """
    text = read_windows(
        loaded,
        sources,
        precision=precision,
        batch_size=batch_size,
        window=window,
        isolate_documents=isolate_documents,
        replace_option=replace_option,
        on_progress=on_progress,
    )
    result = evaluate(loaded.model, text.windows, precision=precision, batch_size=batch_size, on_progress=on_progress)
    return replace(result, lost_fraction=text.lost_fraction), text.report


def read_texts(sources: Sequence[Source], tokenizer: Tokenizer, *, replace_option: str = "") -> Iterator[str]:
    """Yield the documents of ``sources``; of a prepared folder those of its validation split, decoded.

    Raises:
        ConfigError, CorpusError, TokenizerError, ArtifactError: as :func:`evaluate_sources`.
    """
    if not sources:
        return
    if find_prepared(sources) is None:
        yield from (document.text for document in read_documents(sources, replace_option=replace_option))
        return
    store, _, _ = _read(sources, tokenizer, replace_option)
    yield from decode_documents(store, tokenizer)


def decode_documents(store: Stream, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts of the documents of ``store``."""
    for number in range(store.n_documents):
        start, end = store.starts(number, number + 2)
        yield tokenizer.decode(store.tokens(int(start), int(end)).tolist())


def _refuse_oversize(config: ModelConfig, windows: Windows, batch_size: int, device: torch.device) -> None:
    """Raise ConfigError where the windows of one pass do not fit into memory."""
    n_rows = min(batch_size, len(windows))
    # The residual stream before and after a branch, and the hidden features of one feed-forward, in float32.
    needed = 4 * n_rows * windows.seq_len * (2 * config.d_model + (config.d_mlp or 0))
    memory = gpu_memory_bytes(device) if device.type == "cuda" else machine_memory_bytes()
    if memory is not None and needed > memory:
        has = f"the GPU has {memory / 1e9:,.1f} GB" if device.type == "cuda" else describe_memory()
        raise ConfigError(
            f"{n_rows:,} windows of {windows.seq_len:,} tokens per pass need {needed / 1e9:,.1f} GB, and {has}; lower "
            "the batch size or the window"
        )


def _read(
    sources: Sequence[Source], tokenizer: Tokenizer, replace_option: str, on_progress: OnProgress = ignore_progress
) -> tuple[Stream, ReadReport, float | None]:
    """Return the tokens to evaluate on, a report of what was read, and the fraction of text the tokenizer lost."""
    source = find_prepared(sources)
    if source is None:
        report = ReadReport()
        meter = RoundTripMeter()
        documents = read_documents(sources, report, replace_option=replace_option)
        watched = check_roundtrip(tokenizer, documents, report.warnings.append, meter)
        return encode_documents(watched, tokenizer), report, meter.fraction
    folder = source.open_held_out(on_progress=on_progress)
    if folder.tokenizer.fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"{folder.path} was prepared with tokenizer {folder.tokenizer.fingerprint}, the model was trained with "
            f"{tokenizer.fingerprint}; name the text itself, or prepare it with the model's tokenizer"
        )
    part = folder.held_out
    report = folder.report()
    report.documents, report.bytes = part.n_documents, part.n_bytes
    name = "training part: nothing was held out" if folder.validation is None else "validation part"
    report.builtin[str(folder.path)] = f"{folder.path}: the {name}"
    if (warning := folder_warning(str(folder.path), folder.manifest.lost_fraction)) is not None:
        report.warnings.append(warning)
    return part, report, folder.manifest.lost_fraction
