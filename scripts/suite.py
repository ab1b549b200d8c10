"""Run a selection of the tests and write reports to a dated folder."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from psannlm.io.run_metadata import new_folder, system_info, timestamp, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUTS = "outputs"


PLUGIN = "pytest_jsonreport"


def run_suite(
    name: str, selection: list[str], arguments: list[str] | None = None, *, keeps_outputs: bool = False
) -> int:
    """Run pytest with ``selection`` and write ``reports/tests/<ts>/``; return the exit code.

    ``junit.xml`` and ``summary.json`` are always written, ``pytest_report.json`` if pytest-json-report is installed.
    With ``keeps_outputs``, files of failed tests are kept in ``outputs/``. Other command-line options go to pytest.
    Exit code 0: every test passed or was skipped; 1: a test failed, nothing ran, or there is no GPU.
    """
    parser = argparse.ArgumentParser(description=f"Run {name}; other options go to pytest.", allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the reports; an existing one, and reports/tests, gets a dated folder inside (default: "
        "reports/tests/<time>)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run of the suite")
    options, others = parser.parse_known_args(arguments)
    if options.device == "cuda" and not _has_gpu():
        sys.stderr.write("error: torch sees no GPU; --device cpu is a dry run of the suite\n")
        return 1
    folder = new_folder("tests", _dated(options.out)).resolve()
    command = [sys.executable, "-m", "pytest", *selection, "--device", options.device]
    command.append(f"--junitxml={folder / 'junit.xml'}")
    has_plugin = importlib.util.find_spec(PLUGIN) is not None
    if has_plugin:
        command += ["-p", PLUGIN, "--json-report", f"--json-report-file={folder / 'pytest_report.json'}"]
    else:
        sys.stderr.write("note: pytest-json-report is not installed: no pytest_report.json\n")
    if keeps_outputs:
        command += [f"--basetemp={folder / OUTPUTS}", "-o", "tmp_path_retention_policy=failed"]
    command += others
    write_json(folder / "system.json", system_info())
    began = time.monotonic()
    code = _run_and_keep(command, folder / "stdout.log")
    if keeps_outputs and (folder / OUTPUTS).is_dir() and not any((folder / OUTPUTS).iterdir()):
        (folder / OUTPUTS).rmdir()
    counts = _counts(folder / "junit.xml")
    ran = sum(count for outcome, count in counts.items() if outcome in ("passed", "failed", "error"))
    # A suite in which everything was skipped has tested nothing.
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
    """Run ``command`` in the repository, with its output on the screen and, line by line, in ``log``."""
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
    """Return the number of tests by outcome; empty if pytest did not finish."""
    if not report.is_file():
        return {}
    found = {"total": 0, "failed": 0, "error": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name, attribute in zip(found, ("tests", "failures", "errors", "skipped"), strict=True):
            found[name] += int(suite.get(attribute, 0))
    found = {"passed": found["total"] - found["failed"] - found["error"] - found["skipped"], **found}
    return {name: count for name, count in found.items() if count}


def _dated(out: Path | None) -> Path | None:
    """Return the output folder: a dated one inside an existing folder or one named ``tests``, else ``out`` itself."""
    if out is None or not (out.is_dir() or out.name == "tests"):
        return out
    folder, number = out / timestamp(), 2
    while folder.exists():
        folder, number = folder.with_name(f"{folder.name[:15]}_{number}"), number + 1
    return folder
