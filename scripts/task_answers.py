"""Score the runs of a study on a counting task by the answers they give to held-out documents.

python scripts/task_answers.py {modular_addition,parity,copying} PLAN [--study FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from psannlm.benchmarks.counting_tasks import TASKS
from psannlm.benchmarks.study_plan import load_plan
from psannlm.benchmarks.study_runs import size_study
from psannlm.benchmarks.task_answers import score_study
from psannlm.errors import PsannlmError
from psannlm.reports.store import write_json


def main(arguments: list[str] | None = None) -> int:
    """Print a table with a row for each variant; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("plan", type=Path, help="as for psannlm compare")
    parser.add_argument("--study", type=Path, help="folder of the runs; default: runs/<name of the plan>")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    try:
        plan = load_plan(options.plan)
        study = size_study(plan, options.study or Path("runs") / plan.name, lambda line: None)
        rows = score_study(study, TASKS[options.task].answers)
        if options.out is not None:
            write_json(options.out, {"task": options.task, "plan": str(options.plan), "variants": rows})
    except PsannlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    table = Table(title=f"{options.task}: answers to held-out documents", box=box.SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    for heading in ("learning rate", "right, mean", "right, by seed", "documents all right", "nats per answer"):
        table.add_column(heading, justify="right")
    for row in rows:
        mean, seeds = row["mean"], row["seeds"].values()
        cells = [f"{mean['documents_right']:.2%}", f"{mean['nats_per_answer']:.4f}"] if seeds else ["–", "–"]
        right = [f"{mean['right']:.2%}", " ".join(f"{score['right']:.2%}" for score in seeds)] if seeds else ["–", "–"]
        table.add_row(row["name"], "–" if row["learning_rate"] is None else f"{row['learning_rate']:g}", *right, *cells)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
