"""Limits on sizes given by files, checked before any memory is allocated, and the memory of the machine.

Files come from anywhere. A number in one may ask for memory or time out of all proportion to the file, so each is held
against a bound here, or against what the machine has, before anything is read, hashed or allocated.
"""

from __future__ import annotations

import os
from contextlib import suppress

from psannlm.io.cgroups import memory_limit_bytes as cgroup_limit_bytes

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

# Maximum dilation of a short convolution, beyond any trained context.
MAX_DILATION = 1 << 20
# Maximum conv state while decoding, in positions: (kernel_size - 1) * dilation.
MAX_CONV_REACH = 1 << 24
# Maximum vocabulary size; the largest in use have about one million entries.
MAX_VOCAB_SIZE = 1 << 24
# Maximum number of parts of a corpus (prep --part I/N).
MAX_PARTS = 1 << 16
MAX_TOKENIZER_BYTES = 256 << 20
# Soft limit of open files that commands request: each worker process takes a few.
OPEN_FILES = 1 << 16
# Maximum number of values in a JSON header: parsed, each takes some 60 bytes, so that 64 MB would take gigabytes.
MAX_HEADER_VALUES = 1 << 20
# A model file up to this size is hashed before its shapes are checked, so that damage is reported as damage.
HASHED_FIRST_BYTES = 1 << 30
# Maximum length of a line, JSON record, prompt or Parquet cell. Whole text files are streamed and may be longer.
MAX_LINE_BYTES = 64 << 20
# Maximum size of all prompts of one file, which are in memory at once.
MAX_PROMPTS_BYTES = 64 << 20
# Maximum window of a zstd frame: the limit of the library, and that of zstd --long=31.
MAX_ZSTD_WINDOW_BYTES = 1 << 31
# Used if the memory of the machine is unknown.
_ASSUMED_MEMORY_BYTES = 8 << 30


def max_held_bytes() -> int:
    """Return the maximum size of a corpus in memory, in bytes: half of the machine's memory."""
    return (machine_memory_bytes() or _ASSUMED_MEMORY_BYTES) // 2


def max_document_bytes() -> int:
    """Return the maximum size of a document in memory, in bytes: a quarter of the machine's memory."""
    return (machine_memory_bytes() or _ASSUMED_MEMORY_BYTES) // 4


def json_values(content: bytes) -> int:
    """Return an upper bound on the number of values in a JSON text, found without parsing it."""
    return 1 + sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))


def machine_memory_bytes() -> int | None:
    """Return the memory that this process may use in bytes: the machine's, or less where a cgroup limits it.

    None if the system does not report it.
    """
    found = [each for each in (_physical_bytes(), cgroup_limit_bytes()) if each is not None]
    return min(found, default=None)


def describe_memory() -> str:
    """Return :func:`machine_memory_bytes` as text."""
    memory, limit = machine_memory_bytes(), cgroup_limit_bytes()
    if memory is None:
        return "the memory of this machine is unknown"
    where = "a cgroup limits this process to" if memory == limit else "this machine has"
    return f"{where} {memory / 1e9:,.1f} GB"


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def raise_open_files() -> None:
    """Raise the soft limit of open files to ``OPEN_FILES``, as far as the hard limit allows; for commands, not the API.

    Shells set it to 1,024 or 256, which many workers or runs at a time exceed.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS has an undocumented lower limit; then the soft limit is left unchanged.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
