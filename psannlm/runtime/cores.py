"""CPU cores that this process may use, and the threads of the processes that divide them."""

from __future__ import annotations

import os

from psannlm.io.cgroups import cpu_quota
from psannlm.io.limits import machine_memory_bytes

_THREADS = "OMP_NUM_THREADS"
# Set beside it where the number is of a quota: processes started from here may be in another control group.
_OF_QUOTA = "PSANNLM_THREADS_OF_QUOTA"


def usable_cores() -> int:
    """Return the number of cores this process may use: its affinity, or less where a cgroup has a CPU quota."""
    quota = cpu_quota()
    return _bound_cores() if quota is None else max(1, min(_bound_cores(), int(quota)))


def usable_workers(bytes_each: int) -> int:
    """Return how many worker processes the usable cores and the memory (or that of a cgroup) allow, at least one.

    Args:
        bytes_each: memory of a worker, in bytes.
    """
    memory = machine_memory_bytes()
    return usable_cores() if memory is None else max(1, min(usable_cores(), memory // bytes_each))


def _bound_cores() -> int:
    # Not on macOS and Windows.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(n_processes: int) -> dict[str, str]:
    """Return the environment variables that divide the usable cores among ``n_processes``.

    Empty where the user has set the number of threads, which then holds for every process.
    """
    is_of_quota = bool(os.environ.get(_OF_QUOTA))
    if _THREADS in os.environ and not is_of_quota:
        return {}
    # A share is a number like the user's: the mark is emptied.
    return {_THREADS: str(max(1, usable_cores() // n_processes)), **({_OF_QUOTA: ""} if is_of_quota else {})}


def limit_threads() -> None:
    """Set the threads of this process to its CPU quota, before torch is loaded; for commands, not the API.

    torch counts the cores of the affinity mask and does not know quotas: its threads would be paused in every period.
    An ``OMP_NUM_THREADS`` of the user's stays.
    """
    if os.environ.pop(_OF_QUOTA, ""):
        del os.environ[_THREADS]
    if _THREADS not in os.environ and usable_cores() < _bound_cores():
        os.environ[_THREADS] = os.environ[_OF_QUOTA] = str(usable_cores())
