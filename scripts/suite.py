"""A selection of tests in; a folder with reports of how they went, and the exit code, out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from psannlm.reports.store import new_folder, system_info, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
NO_TESTS = 5


def run_suite(name: str, selection: list[str], arguments: list[str] | None = None) -> int:
    """Run pytest with ``selection`` and leave ``reports/tests/<ts>/`` behind; return the exit code.

    What else is on the command line goes to pytest. 0: every test passed or was skipped for a reason; 1: one failed, or
    there was nothing to run, or no GPU.
    """
    parser = argparse.ArgumentParser(description=f"Run {name}; other options go to pytest.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="default: reports/tests/<time>")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the suite itself")
    options, others = parser.parse_known_args(arguments)
    if options.device == "cuda" and not _has_gpu():
        sys.stderr.write("error: torch sees no GPU; --device cpu rehearses the suite itself\n")
        return 1
    folder = new_folder("tests", options.out).resolve()
    command = [sys.executable, "-m", "pytest", *selection, "--device", options.device, "-p", "pytest_jsonreport"]
    command += [
        "--json-report",
        f"--json-report-file={folder / 'pytest_report.json'}",
        f"--junitxml={folder / 'junit.xml'}",
    ]
    command += others
    write_json(folder / "system.json", system_info())
    began = time.monotonic()
    code = _run_and_keep(command, folder / "stdout.log")
    counts = _counts(folder / "pytest_report.json")
    ran = sum(count for outcome, count in counts.items() if outcome in ("passed", "failed", "error"))
    # A suite in which everything was skipped has shown nothing.
    is_ok = code == 0 and (ran > 0 or options.device == "cpu")
    summary = {
        "suite": name,
        "device": options.device,
        "verdict": "ok" if is_ok else "failed",
        "pytest_exit_code": code,
        "counts": counts,
        "seconds": round(time.monotonic() - began, 1),
        "command": command,
    }
    write_json(folder / "summary.json", summary)
    sys.stdout.write(f"{name}: {summary['verdict']}, {counts or 'nothing ran'}; written to {folder}\n")
    return 0 if is_ok else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run_and_keep(command: list[str], log: Path) -> int:
    """Run ``command`` in the repository; show what it says, and keep it in ``log`` from the moment it is said."""
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            file.write(line)
            file.flush()
    return process.returncode


def _counts(report: Path) -> dict[str, int]:
    """How many tests passed, failed, were skipped: from pytest's own report, or nothing where it left none."""
    if not report.is_file():
        return {}
    summary: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["summary"]
    return {name: count for name, count in summary.items() if isinstance(count, int)}
