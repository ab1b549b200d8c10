"""Settings, loss curve and figures of a run folder, read from its files."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from psannlm.config.non_semantic import BOOKKEEPING_KEYS
from psannlm.config.validation import with_present_keys
from psannlm.data.record_figures import TrainRecord
from psannlm.io.artifact_schema import read_figures
from psannlm.io.atomic import is_plain_folder, read_head
from psannlm.io.limits import MAX_HEADER_VALUES, json_values
from psannlm.io.readers import Unreadable, flatten, number, read_json, read_text, read_yaml
from psannlm.io.records import FIGURES_FILE as RECORD_FILE
from psannlm.io.records import read_record
from psannlm.reports.schemas.runs import RunRow

METRICS_FILE, CONFIG_FILE, SYSTEM_FILE = "metrics.jsonl", "config.yaml", "system.json"
# Key of ``system.json`` of a run whose results were taken from a kept report.
REUSED_KEY = "reused_from"
_DEEPEST = 6
# exp of more exceeds a float.
_LARGEST_LOSS = 709.0
_MAX_HEADER_BYTES = 64 << 20
# Above it a float does not represent every whole number; no step, size or throughput comes near.
_LARGEST_WHOLE = 1 << 53
_ROW_KINDS = ("train", "eval", "ema", "tasks")
_MOST_DAMAGED_LINES = 10_000
_HASHES = ("corpus_sha256", "tokenizer_fingerprint")
_COUNTS, _FLAG = ("tokens", "peak_memory_bytes"), "lossy_tokenizer"


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run folder. Losses are in nats per token.

    Attributes:
        name: path of the folder below the folder that was searched.
        config: the settings by dotted key; empty where they cannot be read.
        train_rows, eval_rows: the lines of ``metrics.jsonl`` that can be read, in the order of their steps.
        task_rows: the same of task scores: by task, with ``/stderr`` and ``/chance`` after its name.
        ema_rows: the same of the validations of averaged weights (``train.ema``).
        parameters: elements of the saved weights, or None without a checkpoint.
        corpus_sha256, tokenizer_fingerprint: of what it was trained on, or None without a checkpoint.
        problems: what could not be read, each with the reason.
        record: what ``psannlm train`` printed at the end; None where the run has not ended.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    system: dict[str, Any]
    train_rows: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]
    parameters: int | None
    corpus_sha256: str | None
    tokenizer_fingerprint: str | None
    problems: tuple[str, ...]
    record: TrainRecord | None = None
    task_rows: tuple[dict[str, Any], ...] = ()
    ema_rows: tuple[dict[str, Any], ...] = ()

    @property
    def timestamp(self) -> str | None:
        """When the run started or resumed: ISO 8601, UTC."""
        when = self.system.get("time_utc")
        return when if isinstance(when, str) else None

    @property
    def corpus(self) -> str:
        """Names of the files and built-in texts that the run was trained on."""
        return describe_sources(self.config.get("data.sources"))

    @property
    def parent(self) -> str | None:
        """The model file that the weights of the run came from, with its step and hash; None for new weights."""
        found = self.system.get("init_from")
        if not isinstance(found, dict) or not isinstance(found.get("path"), str):
            return None
        step, digest = found.get("step"), found.get("sha256")
        details = [f"step {step:,}"] if isinstance(step, int) else []
        details += [digest[:12]] if isinstance(digest, str) else []
        return f"{found['path']} ({', '.join(details)})" if details else str(found["path"])

    @property
    def origin(self) -> dict[str, Any]:
        """Where a reused run comes from (``report``, ``run``), with the hashes of its text; empty for other runs."""
        found = self.system.get(REUSED_KEY)
        return found if isinstance(found, dict) else {}

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest loss."""
        return min(self.eval_rows, key=lambda row: row["loss"], default=None)

    @property
    def tokens_per_s(self) -> dict[str, float] | None:
        """Median, lowest and highest of the logged rates; the first line, which times the warm-up, is left out."""
        logged = [number(row.get("tokens_per_s")) for row in self.train_rows[1:] or self.train_rows]
        rates = [rate for rate in logged if rate and abs(rate) < _LARGEST_WHOLE]
        if not rates:
            return None
        return {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory of the run, or None where it was not logged."""
        peaks = [int(peak) for row in self.train_rows if (peak := number(row.get("peak_memory_bytes")))]
        return max(peaks, default=None)

    def task_scores(self, step: int | None = None) -> dict[str, tuple[float, float | None, float | None]]:
        """Return (score, standard error, chance level) by task, at a validation, or at the last one."""
        rows = [row for row in self.task_rows if step is None or row["step"] == step]
        last = rows[-1] if rows else {}
        names = [key for key in last if key not in ("kind", "step") and "/" not in key]
        return {name: (last[name], last.get(f"{name}/stderr"), last.get(f"{name}/chance")) for name in names}

    @cached_property
    def row(self) -> RunRow:
        """The figures of the run, unrounded."""
        last = self.train_rows[-1] if self.train_rows else {}
        best = self.best or {}
        final = self.eval_rows[-1] if self.eval_rows else {}
        rates, record = self.tokens_per_s or {}, self.record
        return RunRow(
            timestamp=self.timestamp,
            run=self.name,
            base=self.config.get("model.base"),
            mlp=self.config.get("model.mlp"),
            parameters=self.parameters,
            corpus=self.corpus,
            corpus_sha256=self.corpus_sha256,
            seed=self.config.get("train.seed"),
            lr=self.config.get("train.lr"),
            batch_tokens=self.config.get("train.batch_tokens"),
            step=last.get("step"),
            tokens=last.get("tokens"),
            train_loss=last.get("loss"),
            val_loss=best.get("loss"),
            val_step=best.get("step"),
            perplexity=best.get("perplexity"),
            bits_per_byte=best.get("bits_per_byte"),
            lossy_tokenizer=best.get("lossy_tokenizer", None if record is None else record.lossy_tokenizer),
            final_val_loss=final.get("loss"),
            ema_val_loss=self.ema_rows[-1]["loss"] if self.ema_rows else None,
            tokens_per_s=rates.get("median"),
            tokens_per_s_lowest=rates.get("lowest"),
            tokens_per_s_highest=rates.get("highest"),
            peak_memory_bytes=self.peak_memory_bytes,
            epochs=None if record is None else record.epochs,
            val_overlap=None if record is None else record.val_overlap,
            folder=str(self.folder),
        )

    def step_rows(self) -> list[dict[str, Any]]:
        """Return a row for every logged step and every validation, in the order of the steps, as ``metrics.csv`` has.

        ``perplexity`` is that of the validation; ``train_perplexity`` is exp(loss) of the step's own batch,
        empty where label smoothing made the loss another quantity.
        """
        is_smoothed = bool(number(self.config.get("train.label_smoothing")))
        rows: dict[int, dict[str, Any]] = {}
        for row in self.train_rows:
            loss = row["loss"]
            rows[row["step"]] = {
                "loss": loss,
                "train_perplexity": math.exp(loss) if loss < _LARGEST_LOSS and not is_smoothed else None,
                **{key: row.get(key) for key in ("lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_bytes")},
            }
        for row in self.ema_rows:
            rows.setdefault(row["step"], {})["ema_val_loss"] = row["loss"]
        for row in self.eval_rows:
            validation = {"val_loss": row["loss"], **{key: row.get(key) for key in ("perplexity", "bits_per_byte")}}
            rows.setdefault(row["step"], {}).update(validation)
        return [{"run": self.name, "step": step, **rows[step]} for step in sorted(rows)]

    @property
    def wall_time_s(self) -> float | None:
        """Seconds of the run's training steps, summed from the logged rates; None where nothing was logged."""
        seconds = [passed for _, (_, passed) in self._clock()]
        return max(seconds, default=None)

    def settings(self) -> dict[str, Any]:
        """Return the settings that make the run what it is."""
        return {key: value for key, value in self.config.items() if key not in BOOKKEEPING_KEYS}

    def points(self, kind: str = "eval") -> list[tuple[int, float, float]]:
        """Return (tokens seen, seconds of training, loss) of the validations, or of the rows of another ``kind``.

        ``ema``: the validations of the averaged weights; ``train``: the logged steps.

        Seconds are those of training alone, summed from the logged rates: validations and checkpoints take no part.
        """
        clock = dict(self._clock())
        rows = {"eval": self.eval_rows, "ema": self.ema_rows, "train": self.train_rows}[kind]
        return [(*clock[row["step"]], row["loss"]) for row in rows if row["step"] in clock]

    def _clock(self) -> Iterator[tuple[int, tuple[int, float]]]:
        """Yield (step, (tokens, seconds)) for every step of the log, validations between two of its lines included."""
        passed: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]
        for row in self.train_rows:
            tokens, rate = number(row.get("tokens")), number(row.get("tokens_per_s"))
            _, before, seconds = passed[-1]
            if tokens is not None and tokens >= before:
                passed.append((row["step"], tokens, seconds + ((tokens - before) / rate if rate else 0.0)))
        steps = sorted({row["step"] for row in (*self.train_rows, *self.eval_rows)})
        at = 0
        for step in steps:
            while at + 1 < len(passed) and passed[at + 1][0] <= step:
                at += 1
            here = passed[at]
            after = passed[min(at + 1, len(passed) - 1)]
            fraction = (step - here[0]) / (after[0] - here[0]) if after[0] > here[0] else 0.0
            tokens, seconds = (low + fraction * (high - low) for low, high in zip(here[1:], after[1:], strict=True))
            yield step, (round(tokens), seconds)


def describe_sources(sources: object) -> str:
    """Return the paths and built-in texts that ``data.sources`` lists, as one line of text."""
    if not isinstance(sources, (list, tuple)):
        return "unknown" if sources is None else str(sources)
    names = [
        str(item.get("path") or item.get("builtin") or item) if isinstance(item, dict) else str(item)
        for item in sources
    ]
    return ", ".join(names)


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run folders (those with ``metrics.jsonl``) at or below ``root``, by name; links are not followed."""
    for folder, names, files in os.walk(root):
        here = Path(folder)
        if METRICS_FILE in files:
            names.clear()
            yield here
        names[:] = sorted(name for name in names if not name.startswith((".", "step_")))
        if len(here.relative_to(root).parts) >= _DEEPEST:
            names.clear()


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Return the record of a run folder, and what could not be read in its ``problems``.

    Raises:
        Unreadable: no line of ``metrics.jsonl`` can be read.
    """
    problems: list[str] = []
    rows = _read_rows(folder / METRICS_FILE, problems)
    if not rows:
        because = f": {problems[0]}" if problems else ""
        raise Unreadable(f"{METRICS_FILE} holds no line that can be read{because}")
    config: dict[str, Any] = {}
    system: dict[str, Any] = {}
    try:
        config = flatten(with_present_keys(read_yaml(folder / CONFIG_FILE)))
    except Unreadable as error:
        problems.append(str(error))
    try:
        system = read_json(folder / SYSTEM_FILE)
    except Unreadable as error:
        problems.append(str(error))
    record = None
    if (figures := read_record(folder)) is not None:
        try:
            record = read_figures(TrainRecord, figures)
        except Unreadable as error:
            problems.append(f"{RECORD_FILE}: {error}")
    parameters, trained_on = _read_checkpoint(folder, problems)
    if not trained_on and isinstance(reused := system.get(REUSED_KEY), dict):
        trained_on = {key: value for key in _HASHES if isinstance(value := reused.get(key), str)}
        parameters = n if type(n := reused.get("parameters")) is int and 0 <= n <= _LARGEST_WHOLE else None
    run = RunRecord(
        folder=folder,
        name=name or folder.name,
        config=config,
        system=system,
        train_rows=[row for row in rows if row["kind"] == "train"],
        eval_rows=[row for row in rows if row["kind"] == "eval"],
        parameters=parameters,
        corpus_sha256=trained_on.get("corpus_sha256"),
        tokenizer_fingerprint=trained_on.get("tokenizer_fingerprint"),
        problems=tuple(problems),
        record=record,
        task_rows=tuple(row for row in rows if row["kind"] == "tasks"),
        ema_rows=tuple(row for row in rows if row["kind"] == "ema"),
    )
    try:
        # Everything that a report reads: unusable figures must fail here, not while a page is written.
        run.row, run.task_scores(), run.step_rows(), run.points(), run.wall_time_s, run.corpus
    except (ArithmeticError, ValueError, TypeError, LookupError) as error:
        raise Unreadable(f"its figures cannot be used: {type(error).__name__} {str(error)[:120]}") from error
    return run


def _read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    text = read_text(path)
    n_lines = text.count("\n") + (not text.endswith("\n"))
    rows = []
    for at, line in enumerate(io.StringIO(text), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line, parse_constant=lambda word: None)
        except (ValueError, RecursionError):
            cut_short = "cut short" if at == n_lines else "not JSON"
            problems.append(f"{path.name}, line {at}: {cut_short}")
        else:
            if _is_row(row):
                rows.append({key: value for key, value in row.items() if key == "kind" or _is_figure(key, value)})
            elif not _is_other(row):
                problems.append(f"{path.name}, line {at}: no step, kind and loss in it")
        if len(problems) > _MOST_DAMAGED_LINES:
            raise Unreadable(f"more than {_MOST_DAMAGED_LINES:,} lines of {path.name} cannot be read: is it a log?")
    if len(problems) > 3:
        problems[3:] = [f"{path.name}: {len(problems) - 3} more lines that cannot be read"]
    return sorted(rows, key=lambda row: row["step"])


def _is_figure(key: str, value: object) -> bool:
    if key in _COUNTS:
        return type(value) is int and abs(value) <= _LARGEST_WHOLE
    return isinstance(value, bool) if key == _FLAG else number(value) is not None


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or row.get("kind") not in _ROW_KINDS:
        return False
    step = row.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and abs(step) <= _LARGEST_WHOLE
    return is_step and (row["kind"] == "tasks" or number(row.get("loss")) is not None)


def _is_other(row: object) -> bool:
    """Whether a line is of a kind without a loss: a sample, or a skipped step."""
    return isinstance(row, dict) and isinstance(row.get("kind"), str) and row["kind"] not in _ROW_KINDS


def _read_checkpoint(folder: Path, problems: list[str]) -> tuple[int | None, dict[str, str]]:
    """Return how many elements the newest checkpoint's weights have, and the hashes of what it was trained on."""
    checkpoints = sorted(path for path in folder.glob("step_*") if is_plain_folder(path))
    if not checkpoints:
        return None, {}
    parameters = None
    trained_on: dict[str, str] = {}
    try:
        state = read_json(checkpoints[-1] / "trainer.json").get("state")
        found = state if isinstance(state, dict) else {}
        hashes = {key: found.get(key) for key in _HASHES}
        trained_on = {key: value for key, value in hashes.items() if isinstance(value, str)}
    except Unreadable as error:
        problems.append(f"{checkpoints[-1].name}: {error}")
    try:
        parameters = _count_elements(checkpoints[-1] / "model.safetensors")
        # The shards of a sharded model.
        shards = sorted((checkpoints[-1] / "model").glob("shard-*.safetensors"))
        parameters += sum(_count_elements(path) for path in shards)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError):
        problems.append(f"{checkpoints[-1].name}: model.safetensors is missing or damaged")
    return parameters, trained_on


def _count_elements(path: Path) -> int:
    """Elements of all tensors, from the header: eight bytes of length, then JSON (the safetensors format)."""
    (length,) = struct.unpack("<Q", read_head(path, 8))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(length)
    header = read_head(path, 8 + length)[8:]
    if json_values(header) > MAX_HEADER_VALUES:
        raise ValueError("too many values")
    return sum(_elements(entry["shape"]) for name, entry in json.loads(header).items() if name != "__metadata__")


def _elements(shape: list[Any]) -> int:
    """Elements of a tensor. Raises ValueError for a shape that no tensor has."""
    elements = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _LARGEST_WHOLE:
            raise ValueError(shape)
        elements *= size
        if elements > _LARGEST_WHOLE:
            raise ValueError(shape)
    return elements
