"""State of a study's run, read from its files: done, failed, stopped or new."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psannlm.experiments.local_launcher import LOG_START
from psannlm.experiments.model import StudyRun
from psannlm.io.code_identity import CODE_KEY
from psannlm.io.readers import Unreadable
from psannlm.reports.runs import METRICS_FILE, RunRecord, read_run
from psannlm.training.checkpoint import LATEST, read_pointer, step_of
from psannlm.training.failures import NOT_FINITE
from psannlm.training.run_folder import RunStatus, read_run_status

_ERROR = "error: "


@dataclass(frozen=True)
class RunState:
    """State of a run by its files: ``done``, ``failed`` (with the reason), ``stopped``, or ``new``.

    ``status`` is that of ``status.json``; None for runs from before that file, and for runs that were killed.
    """

    run: StudyRun
    state: str
    step: int = 0
    reason: str = ""
    record: RunRecord | None = None
    status: RunStatus | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the run needs no further training."""
        return self.state == "done" or self.is_diverged

    @property
    def is_diverged(self) -> bool:
        """Whether it failed because of a non-finite loss, gradient or parameter, and would fail again."""
        if self.status is None:
            # Study folders from before status.json: the log has the error message.
            return self.state == "failed" and NOT_FINITE in self.reason
        return self.status is RunStatus.DIVERGED


def read_status(run: StudyRun) -> RunState:
    """Read the status of a run from its files."""
    record = None
    if (run.folder / METRICS_FILE).is_file():
        try:
            record = read_run(run.folder, run.name)
        except Unreadable:
            record = None  # stopped before its first complete line
    status, message = read_run_status(run.folder) or (None, None)
    last = run.variant.n_steps
    if record is not None and record.eval_rows and record.eval_rows[-1]["step"] >= last:
        if status is RunStatus.FINISHED or _has_saved(run, record):
            return RunState(run, "done", last, record=record)
    step = record.train_rows[-1]["step"] if record is not None and record.train_rows else 0
    reason = _last_error(run.log_path)
    if reason or status in (RunStatus.DIVERGED, RunStatus.FAILED):
        return RunState(run, "failed", step, reason or message or "", record, status)
    return RunState(run, "stopped" if step else "new", step, record=record, status=status)


def _has_saved(run: StudyRun, record: RunRecord) -> bool:
    """Whether a run that was validated at its last step saved its model too, which comes afterwards."""
    if record.origin or CODE_KEY not in record.system:
        # Reused, without checkpoints; or of a version that did not record how a run ended.
        return True
    folder = read_pointer(run.folder, LATEST)
    return folder is not None and step_of(folder) >= run.variant.n_steps


def _last_error(path: Path) -> str:
    """Return the error at the end of a run's log, or an empty string."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith(_ERROR)]
    # The lines after an error belong to it, unless the run was started again since.
    if not starts or any(line.startswith(LOG_START) for line in lines[starts[-1] :]):
        return ""
    return " ".join(line.strip() for line in lines[starts[-1] :]).removeprefix(_ERROR)[:400]
