"""What the program makes of the files in ``november_2026``: the outcomes that must stay the same.

``python tests/compatibility/outcomes.py`` records them. Do that only where an outcome is meant to change, in a commit
of its own that says why.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = HERE / "november_2026"
EXPECTED = FILES / "expected.json"
# The losses of the same version on a processor with other arithmetic.
EXPECTED_AVX512 = FILES / "expected_avx512.json"
CONFIGS = HERE.parents[1] / "configs"
BASES = ("respsann", "waveresnet", "transformer")
PRECISIONS = ("fp32", "bf16")
# Runs one command line in the folder; raises if it fails.
Command = Callable[..., None]


def generate(psannlm: Command, folder: Path, model: str) -> str:
    """Return a continuation by the model file or run ``model`` in ``folder``, drawn with a seed."""
    out = folder / "generated.txt"
    psannlm(
        *("generate", "--checkpoint", model, "--prompt", "Book 2: ", "--max-new-tokens", "40", "--temperature", "1"),
        *("--seed", "3", "--device", "cpu", "--json"),
        stdout=out,
    )
    return str(json.loads(out.read_text(encoding="utf-8"))["completions"][0]["completion"])


def evaluate(psannlm: Command, folder: Path) -> float:
    """Return the loss of the model file on the corpus, in nats per token."""
    psannlm(
        "eval", "corpus.txt", "--per-line", "--checkpoint", "model.safetensors", "--device", "cpu", "--out", "figures"
    )
    return float(json.loads((folder / "figures" / "metrics.json").read_text(encoding="utf-8"))["loss"])


def resume(psannlm: Command, folder: Path) -> list[float]:
    """Resume the run, which stopped after step 8 of 16; return its validation losses."""
    psannlm("train", "config.yaml")
    return losses(folder / "run", "eval")


def train_prepared(psannlm: Command, folder: Path) -> list[float]:
    """Train for four steps on the prepared folder; return the losses."""
    settings = ["train.max_steps=4", "train.log_interval_steps=1", "train.checkpoint_dir=from_shards"]
    settings += ["data.sources=[prepared]", "data.val_split=0"]
    psannlm("train", "config.yaml", *(word for setting in settings for word in ("--set", setting)))
    return losses(folder / "from_shards")


def train_shipped(psannlm: Command, folder: Path, base: str, amp: str) -> list[float]:
    """Train a shipped CPU configuration for 20 steps of 512 tokens of the corpus; return the losses."""
    name = f"{base}_{amp}"
    settings = ["train.max_steps=20", "train.batch_tokens=512", "train.log_interval_steps=1", f"train.amp={amp}"]
    settings += ["train.device=cpu", "train.eval_interval_steps=0", f"train.checkpoint_dir={name}"]
    settings += ["data.sources=[{path: corpus.txt, per_line: true}]", "data.val_split=0"]
    words = (word for setting in settings for word in ("--set", setting))
    psannlm("train", str(CONFIGS / f"{base}_cpu.yaml"), *words)
    return losses(folder / name)


def report(psannlm: Command, folder: Path) -> dict[str, Any]:
    """Return what the report gathers from one kept result of each kind."""
    psannlm("report", "--reports", "reports", "--runs", "run", "--out", "gathered")
    gathered = folder / "gathered"
    tables: dict[str, Any] = {}
    for path in sorted(gathered.glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            # When a run's files were written says the file system, which a clone does not keep.
            tables[path.name] = [{**row, "timestamp": ""} for row in csv.DictReader(file)]
    return {**tables, "memory.json": json.loads((gathered / "memory.json").read_text(encoding="utf-8"))}


def losses(run: Path, kind: str = "train") -> list[float]:
    """Return the losses of one kind that a run logged."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == kind]


def arithmetic() -> dict[str, str]:
    """Name what floating-point results depend on to the last digit: processor capabilities and torch."""
    import torch

    from psannlm.runtime.device import computes_in_bf16

    is_hardware = computes_in_bf16(torch.device("cpu"))
    return {
        "capability": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' bf16' if is_hardware else ''}",
        "torch": torch.__version__.partition("+")[0],
    }


def all_losses(psannlm: Command, folder: Path) -> dict[str, list[float]]:
    """Return the losses of all trainings, by name. The folder is used up."""
    found = {"losses on shards": train_prepared(psannlm, folder), "losses of the resumed run": resume(psannlm, folder)}
    for base in BASES:
        for amp in PRECISIONS:
            found[f"losses of {base} in {amp}"] = train_shipped(psannlm, folder, base, amp)
    return found


def write_losses() -> None:
    """Write :func:`all_losses` of this process to ``losses.json`` in the working folder, a copy of the files."""
    from psannlm.commands.app import main

    def psannlm(*arguments: str) -> None:
        try:
            main(list(arguments))
        except SystemExit as ended:
            if ended.code:
                raise

    found = {"arithmetic": arithmetic(), **all_losses(psannlm, Path.cwd())}
    Path("losses.json").write_text(json.dumps(found), encoding="utf-8")


def record() -> None:
    """Write what this version makes of the files to ``expected.json``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        shutil.copytree(FILES, folder)

        def psannlm(*arguments: str, stdout: Path | None = None) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "psannlm", *arguments]
            printed = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE).stdout
            if stdout is not None:
                stdout.write_bytes(printed)

        expected: dict[str, Any] = {"arithmetic": arithmetic()}
        expected["report"] = report(psannlm, folder)
        expected["generated by the model"] = generate(psannlm, folder, "model.safetensors")
        expected["generated by the run"] = generate(psannlm, folder, "run")
        expected["loss of the model"] = evaluate(psannlm, folder)
        expected |= all_losses(psannlm, folder)
    EXPECTED.write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_losses() if sys.argv[1:] == ["losses"] else record()
