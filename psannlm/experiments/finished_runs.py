"""Record of a study's finished runs (``runs.jsonl``): all that a report needs of them, without their folders.

It is written beside ``study.json`` as runs end, and into every report, and is a small fraction of the checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from psannlm.config.run import load_config
from psannlm.display import json_text
from psannlm.errors import ConfigError
from psannlm.experiments.model import Study
from psannlm.experiments.run_state import RunState, read_status
from psannlm.io.artifact_schema import Figure, Figures, OptionalFigure, Whole, read_figures
from psannlm.io.atomic import explain_write_errors, is_plain_file, write_text
from psannlm.io.code_identity import CODE_KEY, sources_sha256
from psannlm.io.limits import MAX_LINE_BYTES, json_values
from psannlm.io.lock import RunLock
from psannlm.io.readers import Unreadable, read_text
from psannlm.reports.runs import CONFIG_FILE, RunRecord
from psannlm.reports.schemas.evaluation import QuantizedLossFigures
from psannlm.reports.schemas.study import AnswerScore

RUNS_FILE = "runs.jsonl"
_FORMAT = "psannlm-finished-run"
_LARGEST_BYTES = 512 << 20
_MOST_VALUES = 2 << 20


@dataclass(frozen=True, kw_only=True)
class Origin(Figures):
    """Of which model figures are, and by which code: see :func:`origin_of`. Empty: not recorded."""

    step: Whole
    log_sha256: str = ""
    code_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class DocumentRecord(Figures):
    """Validation losses by document of a model, as ``document_losses.encode_documents`` packs them.

    Without ``origin``, of a version that did not record it, nobody knows of which model they are.
    """

    origin: Origin | None = None
    nats: str
    tokens: str


@dataclass(frozen=True, kw_only=True)
class ActivationTails(Figures):
    """Kurtosis and largest magnitude over root of the mean square of a matrix input, each the mean over the layers."""

    kurtosis: OptionalFigure
    max_over_rms: OptionalFigure


@dataclass(frozen=True, kw_only=True)
class ActivationRecord(Figures):
    """What quantized activations cost a model.

    Attributes:
        places: the inputs that were quantized; None: all.
        tokens, loss: scored tokens, and the unquantized loss on them.
        losses: with quantized inputs, by bits and scale.
        tails: of the unquantized inputs, by place.
    """

    origin: Origin
    places: list[str] | None
    tokens: Whole
    loss: Figure
    losses: list[QuantizedLossFigures]
    tails: dict[str, ActivationTails]


@dataclass(frozen=True, kw_only=True)
class Measured(Figures):
    """What was measured with a run's checkpoint after its end; None where it was not.

    Attributes:
        answers: its score on ``task``, and which model was scored (``measure`` of the plan).
    """

    answers: AnswerScore | None = None
    task: str | None = None
    measure: str | None = None
    documents: DocumentRecord | None = None
    activations: ActivationRecord | None = None


_NOTHING_MEASURED = Measured()


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Figures):
    """One line of the file.

    Attributes:
        config: the configuration as written by the run, by section.
        code: hashes of the code that trained it (``io.code_identity``); empty where it is unknown.
        system: its ``system.json``.
        rows: the lines of its ``metrics.jsonl`` with figures.
        answers: its score on the plan's algorithmic task, and which model was scored (``measure`` of the plan).
        documents: its validation losses by document; None where they were not measured.
        activations: what quantized activations cost it; None where that was not measured.
    """

    format: str = _FORMAT
    run: str
    config: dict[str, Any]
    corpus_sha256: str | None
    tokenizer_fingerprint: str | None
    code: list[str]
    parameters: Whole | None
    system: dict[str, Any]
    rows: list[dict[str, Any]]
    answers: AnswerScore | None = None
    task: str | None = None
    measure: str | None = None
    documents: DocumentRecord | None = None
    activations: ActivationRecord | None = None

    @property
    def measured(self) -> Measured:
        """What was measured after its end."""
        return Measured(
            answers=self.answers,
            task=self.task,
            measure=self.measure,
            documents=self.documents,
            activations=self.activations,
        )


def origin_of(record: RunRecord, step: int) -> Origin:
    """Return the origin of figures that are measured now, of the model of ``step`` of a run.

    It has hashes of the run's log, which no other training of the same configuration repeats, times included, and of
    the code of ``psannlm.evaluation``.
    """
    log = hashlib.sha256(json_text(_rows(record)).encode("utf-8")).hexdigest()
    return Origin(step=step, log_sha256=log, code_sha256=sources_sha256(("evaluation",)))


def _rows(record: RunRecord) -> list[dict[str, Any]]:
    rows = [*record.train_rows, *record.eval_rows, *record.task_rows]
    return sorted(rows, key=lambda row: (int(row["step"]), str(row["kind"])))


def finished_run(record: RunRecord, measured: Measured = _NOTHING_MEASURED) -> FinishedRun | None:
    """Return the record of a finished run; None if its configuration cannot be read."""
    try:
        config = load_config(record.folder / CONFIG_FILE, check_files=False)
    except ConfigError:
        return None
    code = record.system.get(CODE_KEY)
    return FinishedRun(
        run=record.name,
        config=config.model_dump(mode="json"),
        corpus_sha256=record.corpus_sha256,
        tokenizer_fingerprint=record.tokenizer_fingerprint,
        code=[str(each) for each in code] if isinstance(code, list) else [],
        parameters=record.parameters,
        system=dict(record.system),
        rows=_rows(record),
        answers=measured.answers,
        task=measured.task,
        measure=measured.measure,
        documents=measured.documents,
        activations=measured.activations,
    )


def write_finished_runs(path: Path, study: Study, measured: Mapping[str, Measured] | None = None) -> None:
    """Write the finished runs of a study, with what was measured after their end by name, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    measured = measured or {}
    lines = []
    for state in map(read_status, study.runs):
        if state.state == "done" and state.record is not None:
            found = finished_run(state.record, measured.get(state.run.name, _NOTHING_MEASURED))
            lines += [] if found is None else [json_text(found.as_dict()) + "\n"]
    write_text(path, "".join(lines))


def add_finished_run(path: Path, state: RunState, measured: Measured = _NOTHING_MEASURED) -> None:
    """Add a finished run to ``path``, in place of an earlier line of its name. Raises StorageError if that fails.

    What an earlier line of the same training has and ``measured`` lacks is kept.
    """
    former = kept_runs(path).get(state.run.name)
    if former is not None and state.record is not None and former.rows == _rows(state.record):
        has_answers = measured.answers is not None
        measured = Measured(
            answers=measured.answers if has_answers else former.answers,
            task=measured.task if has_answers else former.task,
            measure=measured.measure if has_answers else former.measure,
            documents=measured.documents or former.documents,
            activations=measured.activations or former.activations,
        )
    found = None if state.record is None else finished_run(state.record, measured)
    if found is None:
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if is_plain_file(path) else []
    kept = [line for line in lines if _name_in(line) != found.run]
    write_text(path, "".join([*kept, json_text(found.as_dict()) + "\n"]))


def kept_runs(path: Path) -> dict[str, FinishedRun]:
    """Return the runs of a study's folder or file by name, but for lines that are damaged; none where it is missing."""
    file = path / RUNS_FILE if path.is_dir() else path
    try:
        lines = read_text(file, _LARGEST_BYTES).splitlines() if file.is_file() else []
    except Unreadable:
        return {}
    found: dict[str, FinishedRun] = {}
    for line in lines:
        with suppress(Unreadable):
            run = _read_line(line)
            found[run.run] = run
    return found


def keep_measured(study: Study, state: RunState, measured: Measured) -> None:
    """Add what was measured of a finished run to the study's ``runs.jsonl``.

    Raises:
        StorageError: it cannot be written, or another process uses the folder.
    """
    with RunLock(study.folder, "--study"), explain_write_errors(study.folder):
        add_finished_run(study.folder / RUNS_FILE, state, measured)


def is_own_runs_file(path: Path) -> bool:
    """Whether every line of the file is a record of a finished run."""
    try:
        return all(_name_in(line) is not None for line in read_text(path, _LARGEST_BYTES).splitlines())
    except Unreadable:
        return False


def _name_in(line: str) -> str | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content.get("run") if isinstance(content, dict) and content.get("format") == _FORMAT else None


def read_finished_runs(path: Path) -> list[FinishedRun]:
    """Return the finished runs of a report, of a study's folder, or of the file itself.

    Raises:
        ConfigError: there is no such file, or a line of it cannot be used.
    """
    file = path / RUNS_FILE if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise ConfigError(
                f"--reuse {path}: holds no {RUNS_FILE}, which reports and study folders of psannlm compare have since "
                "this version"
            )
        raise ConfigError(f"--reuse {path}: no such report or study folder")
    try:
        lines = read_text(file, _LARGEST_BYTES).splitlines()
        return [_read_line(line) for line in lines if line.strip()]
    except Unreadable as error:
        raise ConfigError(f"--reuse {path}: {file.name}: {error}") from error


def _read_line(line: str) -> FinishedRun:
    content = line.encode("utf-8")
    if len(content) > MAX_LINE_BYTES or json_values(content) > _MOST_VALUES:
        raise Unreadable("a line is too long")
    try:
        value = json.loads(line, parse_constant=lambda word: None)
    except (ValueError, RecursionError) as error:
        raise Unreadable("a line is not JSON") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise Unreadable("a line is not the record of a finished run")
    return read_figures(FinishedRun, value)
