"""The runs that are in a study's folder, against those that its plan now asks for: settings, text and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from psannlm.config.data import DataConfig
from psannlm.config.non_semantic import KEYS_FREE_IN_STUDY
from psannlm.config.run import differences, load_config
from psannlm.data.prepare import PreparedData
from psannlm.errors import ConfigError, Problem
from psannlm.experiments.model import StudyRun, fits_tokenizer, tokenizer_path
from psannlm.experiments.plan import StudyPlan
from psannlm.io.readers import Unreadable
from psannlm.reports.runs import CONFIG_FILE, METRICS_FILE, read_run
from psannlm.tokenizers.resolve import load_tokenizer

_MOST_TOLD = 12


def check_existing_runs(
    plan: StudyPlan, folder: Path, runs: Sequence[StudyRun], data: Mapping[DataConfig, PreparedData]
) -> None:
    """Let nothing be counted, or gone on with, that was made by another plan or on a text that has changed since.

    Raises:
        ConfigError: ``folder`` holds such a run of ``runs``, or a tokenizer that another text gave.
    """
    problems = list(_former_tokenizers(plan, data, folder))
    problems += [problem for run in runs for problem in _former_differences(run, data)]
    if problems:
        raise ConfigError(
            [*problems[:_MOST_TOLD], Problem("", "choose another --study folder, or remove these runs")],
            f"{folder}, an earlier study",
        )


def _former_tokenizers(plan: StudyPlan, data: Mapping[DataConfig, PreparedData], folder: Path) -> Iterator[Problem]:
    """Tokenizers in the study's folder that are not those which the text of today gives."""
    for config, prepared in data.items():
        path = tokenizer_path(plan, config, data, folder)
        if fits_tokenizer(config) and path.is_file():
            there = load_tokenizer(path).fingerprint
            if there != prepared.tokenizer.fingerprint:
                message = f"another text gave it ({there:.12}); the text as it is now gives"
                yield Problem(path.name, f"{message} {prepared.tokenizer.fingerprint:.12}")


def _former_differences(run: StudyRun, data: Mapping[DataConfig, PreparedData]) -> Iterator[Problem]:
    """By which settings or text the run that is there is not the one that the plan asks for."""
    # What was trained is told by the run's own file; the one beside it says what was to be trained.
    path = run.folder / CONFIG_FILE if (run.folder / METRICS_FILE).is_file() else run.config_path
    if not path.is_file():
        if path != run.config_path:
            yield Problem(run.name, f"holds a run without its {CONFIG_FILE}, and nothing tells what was trained")
        return
    # A tokenizer that the study fits lies in its folder, wherever that is; every other is a part of what is compared.
    ignored = set(KEYS_FREE_IN_STUDY)
    if fits_tokenizer(run.variant.variant.config.data):
        ignored.add("data.tokenizer_model_path")
    for line in differences(load_config(path, check_files=False), run.config):
        if line.split(":")[0] not in ignored:
            yield Problem(run.name, f"was made with other settings: {line}")
    if path != run.config_path:
        yield from _former_text(run, data[run.variant.variant.config.data])


def _former_text(run: StudyRun, data: PreparedData) -> Iterator[Problem]:
    """Whether a run's checkpoint tells of other text, or of other tokens, than the plan's paths hold now."""
    try:
        record = read_run(run.folder)
    except Unreadable:
        return  # stopped before its first line was whole; it starts again
    for found, wanted, name in (
        (record.corpus_sha256, data.report.sha256, "text"),
        (record.tokenizer_fingerprint, data.tokenizer.fingerprint, "tokenizer"),
    ):
        if found is not None and found != wanted:
            yield Problem(run.name, f"was made with another {name}: SHA-256 {found:.12}, and now {wanted:.12}")
