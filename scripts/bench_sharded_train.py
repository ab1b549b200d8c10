#!/usr/bin/env python
"""Tokens per second and memory of training on several CPU processes, by ``train.fsdp`` and compilation.

``bench_sharded_train.py [--ranks 4] [--steps 12] [--rounds 2]`` trains a small ``waveresnet`` on the built-in text with
``psannlm train --nproc``, each mode once eager and once compiled, in turns, and prints a Markdown table: the median of
the last half of the steps of every round, and the peak memory of rank 0. Processes that share cores measure what the
modes cost beside each other, not how they scale.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODES = ("off", "full", "hybrid")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="number of processes (default 4)")
    parser.add_argument("--d-model", type=int, default=384, help="model width (default 384)")
    parser.add_argument("--n-layers", type=int, default=8, help="number of blocks (default 8)")
    parser.add_argument("--windows", type=int, default=2, help="windows of 128 tokens per process (default 2)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run (default 12)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind (default 2)")
    return parser.parse_args()


def write_config(options: argparse.Namespace, mode: str, is_compiled: bool, folder: Path) -> Path:
    """Write the configuration of a run to ``folder`` and return its path."""
    n_tokens = 128 * options.windows * options.ranks
    train: dict[str, Any] = {
        "max_steps": options.steps,
        "global_batch_tokens": n_tokens,
        "batch_tokens": n_tokens // options.ranks,
        "optimizer": "adamw",
        "amp": "fp32",
        "device": "cpu",
        "compile": is_compiled,
        "fsdp": mode,
        "log_interval_steps": 1,
        "save_interval_steps": options.steps,
        "sample_prompts": [],
        "checkpoint_dir": str(folder / "run"),
    }
    if mode == "hybrid":
        train["shard_size"] = options.ranks // 2
    model = {"base": "waveresnet", "d_model": options.d_model, "n_layers": options.n_layers, "n_heads": 6}
    data = {
        "sources": [{"builtin": "python-reference"}],
        "max_length": 128,
        "tokenizer": "tokenizers",
        "vocab_size": 4096,
        "val_split": 0.02,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps({"model": model, "data": data, "train": train}), encoding="utf-8")  # JSON is YAML
    return path


def run(options: argparse.Namespace, mode: str, is_compiled: bool) -> tuple[list[float], float]:
    """Train once; return the tokens per second of the last half of the steps and rank 0's peak memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="psannlm-bench-") as name:
        config = write_config(options, mode, is_compiled, Path(name))
        command = [sys.executable, "-m", "psannlm", "train", str(config), "--nproc", str(options.ranks)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"fsdp {mode}, compile {is_compiled}: {done.stderr[-2000:]}")
        lines = (Path(name) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if (row := json.loads(line)).get("kind") == "train"]
    rates = [row["tokens_per_s"] for row in rows[len(rows) // 2 :]]
    return rates, max(row.get("peak_memory_bytes") or 0 for row in rows)


def main() -> None:
    """Measure and print the table."""
    options = parse()
    rates: dict[tuple[str, bool], list[float]] = {}
    peaks: dict[tuple[str, bool], float] = {}
    for _ in range(options.rounds):
        for mode in MODES:
            for is_compiled in (False, True):
                kind = (mode, is_compiled)
                found, peak = run(options, mode, is_compiled)
                rates.setdefault(kind, []).extend(found)
                peaks[kind] = max(peak, peaks.get(kind, 0))
                sys.stderr.write(f"{kind}: {statistics.median(found):,.0f} tokens/s, {peak / 1e6:,.0f} MB\n")
    lines = [
        "| `fsdp` | eager, tokens/s | compiled, tokens/s | eager, peak MB of rank 0 | compiled, peak MB of rank 0 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for mode in MODES:
        cells = [f"{statistics.median(rates[mode, is_compiled]):,.0f}" for is_compiled in (False, True)]
        cells += [f"{peaks[mode, is_compiled] / 1e6:,.0f}" for is_compiled in (False, True)]
        lines.append(f"| `{mode}` | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
