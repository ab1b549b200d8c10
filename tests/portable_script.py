"""A process without the modules, files and functions of one platform: ``portable_script.py FOLDER MODULE ...``.

It imports every module, and trains the smoke configuration, in FOLDER. Left out are the standard modules that only
POSIX or only Linux has, ``/proc``, ``/sys``, and the flags, signals and functions that Windows lacks.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import torch

ABSENT = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty", "pty", "readline", "msvcrt", "winreg")
# torch and the standard library keep the ones they have taken; only what runs later misses them.
# Optional packages are left out too, which saves most of the time.
sys.modules.update(dict.fromkeys((*ABSENT, "transformers", "lm_eval", "pyarrow", "tensorboard", "submitit")))
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "pread", "pwrite", "sysconf", "sched_getaffinity", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)


def hidden(path: Any) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys"))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and hidden(arguments[0]):
        raise FileNotFoundError(2, "hidden", os.fspath(arguments[0]))


def without_hidden(function: Any) -> Any:
    def stat(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if hidden(path):
            raise FileNotFoundError(2, "hidden", os.fspath(path))
        return function(path, *arguments, **keywords)

    return stat


sys.addaudithook(refuse)
os.stat, os.lstat = without_hidden(os.stat), without_hidden(os.lstat)

for name in sys.argv[2:]:
    importlib.import_module(name)

from psannlm.config.run import load_config  # noqa: E402
from psannlm.io.limits import machine_memory_bytes  # noqa: E402
from psannlm.runtime.cores import usable_cores  # noqa: E402
from psannlm.runtime.resident_memory import peak_resident_bytes  # noqa: E402
from psannlm.training.run import train  # noqa: E402

assert machine_memory_bytes() is peak_resident_bytes() is None
assert usable_cores() >= 1
torch.set_num_threads(1)
config = load_config("configs/smoke.yaml")
changes = {
    "checkpoint_dir": os.path.join(sys.argv[1], "run"),
    "device": "cpu",
    "max_steps": 4,
    "eval_interval_steps": 2,
}
train(config.model_copy(update={"train": config.train.model_copy(update=changes)}))
