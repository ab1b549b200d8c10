"""Artifact folders named by time, ``system.json`` (machine, versions, command line), and JSON files."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from psannlm.display import json_text
from psannlm.errors import ConfigError
from psannlm.io.atomic import explain_write_errors, require_writable, write_text
from psannlm.io.urls import is_remote

VISIBLE_GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"
# Set for the runs of a study that share a GPU, so that their records say it.
SHARED_GPU_VARIABLE = "PSANNLM_SHARED_GPU"
# Key of ``system.json``: other runs used the GPU at the same time.
GPU_IS_SHARED = "gpu_is_shared"
_PACKAGES = ("torch", "numpy", "sentencepiece", "tokenizers", "safetensors", "pydantic")


def timestamp() -> str:
    """Return the current time in UTC as ``YYYYmmdd_HHMMSS``."""
    return datetime.now(timezone.utc).strftime("%Y%m%d_%H%M%S")


def new_folder(kind: str, out: Path | None = None) -> Path:
    """Make and return a folder that did not exist: ``reports/<kind>/<ts>``, ``out``, or ``out/<ts>`` if ``out`` exists.

    ``<ts>`` is numbered on (``<ts>_2``) should two start in one second. Nothing that exists is ever written to.

    Raises:
        ConfigError: ``out`` is a URL.
        StorageError: the folder cannot be made.
    """
    _refuse_url(out)
    if out is not None and not os.path.lexists(out):
        with explain_write_errors(out):
            out.mkdir(parents=True)
        return out
    stem = (Path("reports") / kind if out is None else out) / timestamp()
    number = 1
    while True:
        folder = stem if number == 1 else stem.with_name(f"{stem.name}_{number}")
        with explain_write_errors(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if not os.path.lexists(folder):
                    raise  # a file in the place of one of its parents
                number += 1
                continue
        return folder


def require_folder(kind: str, out: Path | None = None) -> None:
    """Check before the work that :func:`new_folder` will be able to make its folder and files in it.

    Raises:
        ConfigError: ``out`` is a URL.
        StorageError: it cannot.
    """
    _refuse_url(out)
    folder = out if out is not None and not os.path.lexists(out) else (out or Path("reports") / kind) / timestamp()
    require_writable(folder / "metrics.json")


def _refuse_url(out: Path | None) -> None:
    # A path has lost the second slash of s3://.
    if out is not None and is_remote(str(out)):
        raise ConfigError(f"{out} is a URL, and only psannlm prep writes to URLs; name a folder and copy it afterwards")


def system_info() -> dict[str, Any]:
    """Return versions, processor, threads, GPUs, commit and command line, as plain JSON."""
    import torch

    info: dict[str, Any] = {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "psannlm": _version("psannlm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if info["gpus"]:
        info["cuda"] = torch.version.cuda
    if VISIBLE_GPUS_VARIABLE in os.environ:
        info["visible_gpus"] = os.environ[VISIBLE_GPUS_VARIABLE]
    if os.environ.get(SHARED_GPU_VARIABLE):
        info[GPU_IS_SHARED] = True
    return info


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout, with a + if files were modified; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if commit.returncode:
            return None
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_json(path: Path, content: Any) -> None:
    """Write plain data as readable JSON, NaN and infinities as null, atomically. Raises StorageError if it fails."""
    write_text(path, json_text(content, indent=2) + "\n")
