"""Losses of held-out documents by run, kept with its record, and the bootstrap over documents between variants."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.config.run import plan_batches
from psannlm.data.stream import Stream
from psannlm.errors import ConfigError
from psannlm.evaluation.documents import N_RESAMPLES, DocumentLosses, bootstrap_difference, evaluate_documents
from psannlm.experiments.finished_runs import (
    DocumentRecord,
    Measured,
    Origin,
    keep_measured,
    kept_runs,
    origin_of,
)
from psannlm.experiments.lr_selection import Choice, HalfLosses, Halves, choose, score_of
from psannlm.experiments.measures.measured_models import measured_model, why_no_model
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.run_state import RunState, read_status
from psannlm.reports.schemas.measured import BootstrapDifference
from psannlm.reports.schemas.study import Comparison
from psannlm.runtime.device import pick_precision
from psannlm.training.plan import cut_windows

SEED = 0
# Draws of one comparison, documents times resamples, above which it takes fewer resamples: about a second.
_MOST_DRAWS = 10**8
_FEWEST_RESAMPLES = 1_000
# Relative difference to the validation in the log up to which losses are those of the same model and text: sums in bf16
# differ by rounding between a compiled and an uncompiled model.
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class RunDocuments:
    """Losses of a run by document with their record, or the reason why there are none."""

    losses: DocumentLosses | None
    reason: str = ""
    record: DocumentRecord | None = None


_NOT_MEASURED = RunDocuments(None, "they were not measured")


def encode_documents(losses: DocumentLosses, origin: Origin) -> DocumentRecord:
    """Return the losses of a model as a record: float32 nats and int32 tokens, as base64 of their bytes.

    32 bits are exact to one part in ten million, far below any difference between models.
    """
    nats, tokens = losses.nats.astype("<f4"), losses.tokens.astype("<i4")
    return DocumentRecord(origin=origin, nats=_text(nats.tobytes()), tokens=_text(tokens.tobytes()))


def decode_documents(record: DocumentRecord) -> DocumentLosses | None:
    """Return the losses of a record; None if it is damaged."""
    try:
        nats = np.frombuffer(base64.b64decode(record.nats, validate=True), "<f4").astype(np.float64)
        tokens = np.frombuffer(base64.b64decode(record.tokens, validate=True), "<i4").astype(np.int64)
    except (binascii.Error, ValueError):
        return None
    is_sound = len(nats) == len(tokens) > 0 and bool(np.isfinite(nats).all()) and bool((tokens > 0).all())
    return DocumentLosses(nats, tokens) if is_sound else None


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def measure_documents(
    study: Study,
    former: Mapping[str, RunDocuments] | None = None,
    *,
    is_kept: bool = False,
    on_status: Callable[[str], None] = lambda text: None,
) -> dict[str, RunDocuments]:
    """Return the losses by document, by name, of the finished runs that are compared (``compared_runs``).

    They are those of the last step, or of the best validation if the plan measures that. Losses in the study's
    ``runs.jsonl`` are taken from there; the others are measured with the checkpoints, on the device of the runs.

    Args:
        former: losses that were measured before, which are not measured again.
        is_kept: add those measured here to the study's ``runs.jsonl``.

    Raises:
        ArtifactError: a checkpoint cannot be read.
        StorageError: ``runs.jsonl`` cannot be written, or another process uses the folder.
    """
    states = compared_runs(study)
    kept = {name: run.documents for name, run in kept_runs(study.folder).items()}
    found: dict[str, RunDocuments] = {}
    for state in states:
        assert state.record is not None
        if former is not None and state.run.name in former:
            found[state.run.name] = former[state.run.name]
            continue
        row = score_of(state.record, study.plan.settings.measure)
        origin = origin_of(state.record, row["step"])
        record = kept.get(state.run.name)
        if (
            record is not None
            and record.origin == origin
            and (known := _matching(study, state.run, record, row)) is not None
        ):
            found[state.run.name] = RunDocuments(known, "", record)
            continue
        if reason := why_no_model(study, state, row["step"]):
            found[state.run.name] = RunDocuments(None, reason)
            continue
        on_status(f"losses by document: {state.run.name}")
        record = encode_documents(_evaluate(study, state.run), origin)
        matching = _matching(study, state.run, record, row)
        if matching is None:
            found[state.run.name] = RunDocuments(None, "its checkpoint has another loss than its log")
            continue
        found[state.run.name] = RunDocuments(matching, "", record)
        if is_kept:
            keep_measured(study, state, Measured(documents=record))
    return found


def compared_runs(study: Study) -> list[RunState]:
    """Return the finished runs at the best learning rate of each variant; none if fewer than two variants have any.

    With ``choose_on: tune`` the losses by document decide which learning rate is best: then all finished runs.
    """
    states = [read_status(run) for run in study.runs]
    if study.plan.settings.choose_on == "tune":
        return [state for state in states if state.state == "done"]
    chosen = {sized.variant.name: choose(sized, states, study.plan) for sized in study.variants}
    names = {record.name for choice in chosen.values() for record in choice.done.values()}
    if sum(bool(choice.done) for choice in chosen.values()) < 2:
        return []
    return [state for state in states if state.run.name in names]


def tuning_documents(store: Stream) -> NDArray[np.bool_]:
    """Return which documents of ``store`` select learning rates (N,): every second one in the order of their hashes.

    The hash is the SHA-256 of a document's tokens, so that neither the order of the files nor the run decides.
    """
    starts = store.starts(0, store.n_documents + 1).tolist()
    hashes = [hashlib.sha256(store.tokens(start, end).tobytes()).digest() for start, end in pairwise(starts)]
    is_tuning = np.zeros(len(hashes), dtype=np.bool_)
    is_tuning[sorted(range(len(hashes)), key=lambda at: (hashes[at], at))[::2]] = True
    return is_tuning


def reported_documents(study: Study) -> NDArray[np.int64] | None:
    """Return the numbers of the held-out documents whose figures are reported; None for all (``choose_on: all``)."""
    store = study.data[study.plan.baseline.config.data].val
    if study.plan.settings.choose_on == "all" or store is None:
        return None
    return np.flatnonzero(~tuning_documents(store))


def half_losses(study: Study, documents: Mapping[str, RunDocuments]) -> Halves:
    """Return the losses of both halves of the held-out documents by run; None with ``choose_on: all``.

    Raises:
        ConfigError: a finished run has no losses by document.
    """
    reported = reported_documents(study)
    if reported is None:
        return None
    found = {}
    for name in (state.run.name for state in compared_runs(study)):
        each = documents.get(name)
        if each is None:
            continue  # another process finished it since
        if each.losses is None:
            message = f"{name} has no losses by document, which choose_on: tune needs: {each.reason}"
            raise ConfigError(f"{message}; train it again, or write choose_on: all")
        tuning = np.setdiff1d(np.arange(len(each.losses.tokens)), reported)
        found[name] = HalfLosses(each.losses.loss(tuning), each.losses.loss(reported))
    return found


def _matching(study: Study, run: StudyRun, record: DocumentRecord, row: Mapping[str, float]) -> DocumentLosses | None:
    """Return the losses of a record if they are those of validation ``row`` on the present text."""
    losses = decode_documents(record)
    if losses is None or not np.array_equal(losses.tokens, _document_tokens(study, run)):
        return None
    return losses if abs(losses.loss() - row["loss"]) <= _TOLERANCE * abs(row["loss"]) else None


def _document_tokens(study: Study, run: StudyRun) -> NDArray[np.int64]:
    store = study.data[run.variant.variant.config.data].val
    assert store is not None
    return np.diff(store.starts(0, store.n_documents + 1)) - 1


def _evaluate(study: Study, run: StudyRun) -> DocumentLosses:
    """Return the losses of a run's measured checkpoint, in the precision and windows of its validations."""
    data = study.data[run.variant.variant.config.data]
    assert data.val is not None
    model, device = measured_model(study, run)
    return evaluate_documents(
        model,
        cut_windows(run.config, data.val, data.tokenizer),
        precision=pick_precision(run.config.train.amp, device),
        batch_size=plan_batches(run.config).micro_batch_size,
    )


def with_document_intervals(
    comparisons: Sequence[Comparison],
    chosen: Mapping[str, Choice],
    documents: Mapping[str, RunDocuments],
    reported: NDArray[np.int64] | None = None,
) -> list[Comparison]:
    """Return the comparisons with their intervals over held-out documents, or the reason why one has none.

    Both variants are averaged over the seeds that both have, document by document, so that the difference is that of
    the interval paired over seeds. Every comparison draws the same documents, of those numbered in ``reported``.
    """
    return [
        replace(each, **_interval(chosen[each.variant], chosen[each.against], documents, reported))
        if each.variant in chosen and each.against in chosen
        else each
        for each in comparisons
    ]


def _interval(
    ours: Choice, theirs: Choice, documents: Mapping[str, RunDocuments], reported: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Return the fields of a comparison about documents."""
    seeds = sorted(ours.done.keys() & theirs.done.keys())
    if not seeds:
        return {"documents": None, "documents_missing": "the variants share no finished seed"}
    sides: list[list[DocumentLosses]] = []
    for choice in (ours, theirs):
        side = []
        for seed in seeds:
            name = choice.done[seed].name
            found = documents.get(name, _NOT_MEASURED)
            if found.losses is None:
                return {"documents": None, "documents_missing": f"{name}: {found.reason}"}
            side.append(found.losses)
        sides.append(side)
    n_documents = len(sides[0][0].tokens) if reported is None else len(reported)
    n_resamples = min(N_RESAMPLES, max(_FEWEST_RESAMPLES, _MOST_DRAWS // n_documents))
    found_difference = bootstrap_difference(*sides, seed=SEED, n_resamples=n_resamples, documents=reported)
    if found_difference.low is None:
        return {"documents": None, "documents_missing": "there is only one document"}
    return {
        "documents": BootstrapDifference(
            mean=found_difference.mean,
            low=found_difference.low,
            high=found_difference.high,
            n_documents=n_documents,
            n_resamples=n_resamples,
            seed=SEED,
        ),
        "documents_missing": "",
    }
