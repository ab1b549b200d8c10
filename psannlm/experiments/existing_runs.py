"""Check of the runs in a study's folder against its plan: settings, text and tokenizer."""

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

_MAX_PROBLEMS = 12


def check_existing_runs(
    plan: StudyPlan, folder: Path, runs: Sequence[StudyRun], data: Mapping[DataConfig, PreparedData]
) -> None:
    """Raise ConfigError if an existing run or tokenizer in ``folder`` is not the one that the plan describes.

    Such runs are neither counted nor resumed: their settings differ, or their text has changed since.

    Raises:
        ConfigError: ``folder`` holds such a run of ``runs``, or a tokenizer trained on other text.
    """
    problems = list(_tokenizer_problems(plan, data, folder))
    problems += [problem for run in runs for problem in _run_problems(run, data)]
    if problems:
        raise ConfigError(
            [*problems[:_MAX_PROBLEMS], Problem("", "choose another --study folder, or delete these runs")],
            f"{folder}, an existing study",
        )


def _tokenizer_problems(plan: StudyPlan, data: Mapping[DataConfig, PreparedData], folder: Path) -> Iterator[Problem]:
    """Yield the tokenizers in the study's folder that differ from those of the present text."""
    for config, prepared in data.items():
        path = tokenizer_path(plan, config, data, folder)
        if fits_tokenizer(config) and path.is_file():
            there = load_tokenizer(path).fingerprint
            if there != prepared.tokenizer.fingerprint:
                message = f"trained on other text ({there:.12}); the present text gives"
                yield Problem(path.name, f"{message} {prepared.tokenizer.fingerprint:.12}")


def _run_problems(run: StudyRun, data: Mapping[DataConfig, PreparedData]) -> Iterator[Problem]:
    """Yield the settings and texts in which an existing run differs from the plan."""
    # The run's own file holds what was trained; the file beside the folder, what was to be trained.
    path = run.folder / CONFIG_FILE if (run.folder / METRICS_FILE).is_file() else run.config_path
    if not path.is_file():
        if path != run.config_path:
            yield Problem(run.name, f"holds a run without its {CONFIG_FILE}, so its settings are unknown")
        return
    # The path of a tokenizer that the study trains is not a setting; every other tokenizer is part of the comparison.
    ignored = set(KEYS_FREE_IN_STUDY)
    if fits_tokenizer(run.variant.variant.config.data):
        ignored.add("data.tokenizer_model_path")
    for line in differences(load_config(path, check_files=False), run.config):
        if line.split(":")[0] not in ignored:
            yield Problem(run.name, f"was trained with other settings: {line}")
    if path != run.config_path:
        yield from _text_problems(run, data[run.variant.variant.config.data])


def _text_problems(run: StudyRun, data: PreparedData) -> Iterator[Problem]:
    """Yield whether a run was trained on other text, or with another tokenizer, than the plan's paths hold now."""
    try:
        record = read_run(run.folder)
    except Unreadable:
        return  # stopped before its first complete line; it starts from scratch
    for found, wanted, name in (
        (record.corpus_sha256, data.report.sha256, "text"),
        (record.tokenizer_fingerprint, data.tokenizer.fingerprint, "tokenizer"),
    ):
        if found is not None and found != wanted:
            yield Problem(run.name, f"was trained with another {name}: SHA-256 {found:.12}, now {wanted:.12}")
