"""Results of finished runs from kept reports, in place of training the same runs again.

A run is the same if configuration, text, tokenizer and code are. Paths, and the settings that change no result
(``config.non_semantic``), may differ. What differs otherwise is named, and the run is trained.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from psannlm.config.non_semantic import KEYS_FREE_IN_STUDY
from psannlm.config.run import config_from_mapping, differences, to_yaml
from psannlm.display import json_text
from psannlm.errors import ConfigError
from psannlm.experiments.finished_runs import RUNS_FILE, FinishedRun, add_finished_run, read_finished_runs
from psannlm.experiments.measures.document_losses import reported_documents
from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.run_state import read_status
from psannlm.io.atomic import explain_write_errors, temporary_beside, write_text
from psannlm.io.code_identity import code_sha256, sources_sha256
from psannlm.io.lock import RunLock
from psannlm.io.readers import number
from psannlm.io.run_metadata import write_json
from psannlm.reports.runs import CONFIG_FILE, METRICS_FILE, REUSED_KEY, SYSTEM_FILE
from psannlm.training.run_folder import RunStatus, write_status

log = logging.getLogger(__name__)

# Where text and tokenizer lie; their hashes are compared.
_PATHS = re.compile(r"data\.(sources\.\d+\.path|tokenizer_model_path)\Z")
_MOST_NAMED = 3


@dataclass(frozen=True)
class KeptRun:
    """A finished run of a kept report."""

    report: Path
    run: FinishedRun


def read_kept_runs(reports: Sequence[Path]) -> list[KeptRun]:
    """Return the finished runs of reports and study folders, in their order.

    Raises:
        ConfigError: one of them holds no record of finished runs, or a damaged one.
    """
    return [KeptRun(path, run) for path in reports for run in read_finished_runs(path)]


def reuse_runs(study: Study, only: Collection[str], kept: Sequence[KeptRun], *, is_dry: bool = False) -> list[str]:
    """Take the results of the runs named in ``only`` that have not begun here from ``kept``, and return their names.

    Each gets a run folder with its log, configuration and the description of its machine, without a checkpoint. What is
    reused, and what differs where a kept run of the same name is not, is logged.

    Args:
        is_dry: write nothing, and only log.

    Raises:
        StorageError: the study's folder cannot be written, or another process uses it.
    """
    found: list[tuple[StudyRun, KeptRun]] = []
    for run in study.runs:
        if not kept or run.name not in only or os.path.lexists(run.folder) or read_status(run).state != "new":
            continue
        faults = [(each, list(_differences(study, run, each.run))) for each in kept]
        same = [each for each, differing in faults if not differing]
        if same:
            found.append((run, same[0]))
            continue
        for each, differing in faults:
            if each.run.run == run.name:
                more = f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
                log.info(f"{run.name} is not reused from {each.report}: {'; '.join(differing[:_MOST_NAMED])}{more}")
    if found and not is_dry:
        with RunLock(study.folder, "--study"), explain_write_errors(study.folder):
            for run, each in found:
                _write_folder(study, run, each)
    verb = "would be reused" if is_dry else "reused"
    for report in dict.fromkeys(each.report for _, each in found):
        names = [run.name for run, each in found if each.report == report]
        log.info(f"{len(names)} of {len(study.runs)} runs {verb} from {report}: {', '.join(names)}")
    return [run.name for run, _ in found]


def _differences(study: Study, run: StudyRun, kept: FinishedRun) -> Iterator[str]:
    """Yield what makes a kept run another one than ``run``, or less than it."""
    try:
        config = config_from_mapping(kept.config, check_files=False)
    except ConfigError as error:
        yield f"its configuration is not one of this version: {str(error).splitlines()[0]:.120}"
        return
    for line in differences(config, run.config):
        key = line.split(":")[0]
        if key not in KEYS_FREE_IN_STUDY and not _PATHS.match(key):
            yield line
    if run.config.train.init_from is not None:
        yield "it starts from train.init_from, whose weights are not recorded with a study"
    data = study.data[run.variant.variant.config.data]
    for then, now, name in (
        (kept.corpus_sha256, data.report.sha256, "text"),
        (kept.tokenizer_fingerprint, data.tokenizer.fingerprint, "tokenizer"),
        (" then ".join(code[:12] for code in kept.code) or None, code_sha256()[:12], "code"),
    ):
        if then is None:
            yield f"its {name} is not recorded"
        elif then != now:
            yield f"another {name}: SHA-256 {then if name == 'code' else then[:12]}, now {now[:12]}"
    if not any(row.get("kind") == "eval" and _step(row) >= run.variant.n_steps for row in kept.rows):
        yield f"no validation at step {run.variant.n_steps}"
    settings = study.plan.settings
    if settings.answers is not None and (kept.task, kept.measure) != (settings.answers, settings.measure):
        yield f"its model was not scored on {settings.answers} ({settings.measure})"
    elif settings.answers is not None and kept.answers is not None:
        reported = reported_documents(study)
        expected = (0 if data.val is None else data.val.n_documents) if reported is None else len(reported)
        if kept.answers.n_documents != expected:
            yield f"its answers are those of {kept.answers.n_documents} held-out documents, not of {expected}"
    if settings.choose_on == "tune":
        if kept.documents is None:
            yield "its losses by document are not recorded, which choose_on: tune needs"
        elif kept.documents.origin is None or kept.documents.origin.code_sha256 != sources_sha256(("evaluation",)):
            yield "its losses by document were measured by other code, and choose_on: tune needs them"


def _step(row: dict[str, object]) -> float:
    step = number(row.get("step"))
    return -1 if step is None else step


def _write_folder(study: Study, run: StudyRun, kept: KeptRun) -> None:
    """Write the run folder of a reused run, whole or not at all, and its line in the study's record."""
    origin = {
        "report": str(kept.report),
        "run": kept.run.run,
        "corpus_sha256": kept.run.corpus_sha256,
        "tokenizer_fingerprint": kept.run.tokenizer_fingerprint,
        "parameters": kept.run.parameters,
        "answers": None if kept.run.answers is None else kept.run.answers.as_dict(),
    }
    with temporary_beside(run.folder) as beside:
        beside.mkdir()
        write_text(beside / CONFIG_FILE, to_yaml(run.config))
        write_text(beside / METRICS_FILE, "".join(json_text(row) + "\n" for row in kept.run.rows))
        write_json(beside / SYSTEM_FILE, {**kept.run.system, REUSED_KEY: origin})
        write_status(beside, RunStatus.FINISHED)
        os.rename(beside, run.folder)
    add_finished_run(run.study / RUNS_FILE, read_status(run), kept.run.measured)
