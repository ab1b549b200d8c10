"""Throughput of ``psannlm prep`` beside the encoding of the raw tokenizer library.

Prep runs as a command, which starts, reads, hashes, encodes and writes. The library encodes the same texts from memory
in batches, with as many threads, and writes nothing: only its encoding is timed. On request prep runs with a Ray
cluster of this machine too.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psannlm.benchmarks.harness.interleaved import Count, paired_ratio, run_interleaved
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.tokenization.raw_libraries import raw_arrays, raw_encode
from psannlm.config.data import PathSource, Source
from psannlm.data.corpus.documents import read_documents
from psannlm.errors import ConfigError, WorkerError
from psannlm.reports.schemas.measured import Spread
from psannlm.reports.schemas.tokenizers import PrepFigures, RayFigures
from psannlm.runtime.cores import usable_cores
from psannlm.runtime.processes import python_command
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import tokenizer_from_bytes

# Text per call of the library: enough to keep all of its threads busy, little compared with a corpus.
_BATCH_CHARS = 8_000_000
_POLL_S = 0.1
_PROC = Path("/proc")
_ONE_LINE = b"one line\n"


@dataclass(frozen=True)
class RawRun:
    """One pass of the raw library: seconds and CPU seconds of encoding, tokens and bytes."""

    seconds: float
    cpu_s: float
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class PrepRun:
    """One run of the command: seconds, CPU seconds of all its processes, tokens and peak memory.

    ``n_tokens`` excludes BOS and EOS. ``peak_bytes`` is the peak memory of all processes together, with shared pages
    counted once, and ``sampled_cpu_s`` the CPU seconds of all processes, also of those that nobody waits for; both are
    None without Linux's ``/proc``.
    """

    seconds: float
    cpu_s: float
    n_tokens: int
    peak_bytes: int | None
    sampled_cpu_s: float | None = None


class RawBench:
    """The raw library on a corpus, in a process of its own."""

    def __init__(self, sources: Sequence[PathSource], content: bytes, threads: int) -> None:
        self._sources, self._threads = sources, threads
        self._tokenizer = tokenizer_from_bytes(content)

    def has_arrays(self) -> bool:
        """Whether the library can return arrays instead of lists."""
        return raw_arrays(self._tokenizer) is not None

    def run(self, as_arrays: bool) -> RawRun:
        """Encode the corpus once."""
        encode = (raw_arrays if as_arrays else raw_encode)(self._tokenizer, self._threads)
        if encode is None:
            raise ConfigError(f"the {self._tokenizer.backend} backend has no raw encoding to time")
        seconds = cpu_s = 0.0
        n_tokens = n_bytes = 0
        for texts in self._batches():
            began, cpu_began = time.perf_counter(), time.process_time()
            rows = encode(texts)
            seconds += time.perf_counter() - began
            cpu_s += time.process_time() - cpu_began
            n_tokens += sum(map(len, rows))
            n_bytes += sum(len(text.encode("utf-8")) for text in texts)
        return RawRun(seconds, cpu_s, n_tokens, n_bytes)

    def _batches(self) -> Iterator[list[str]]:
        held: list[str] = []
        n_chars = 0
        for document in read_documents(self._sources):
            held.append(document.text)
            n_chars += len(document.text)
            if n_chars >= _BATCH_CHARS:
                yield held
                held, n_chars = [], 0
        if held:
            yield held


def check_preparable(sources: Sequence[Source]) -> list[PathSource]:
    """Return ``sources`` as the files of one ``psannlm prep`` call.

    Raises:
        ConfigError: a source is built in, or sources differ in ``per_line`` or ``text_key``.
    """
    paths = [source for source in sources if isinstance(source, PathSource)]
    if len(paths) < len(sources):
        raise ConfigError("--prep reads files, not the built-in corpus; give a --corpus")
    if len({(source.per_line, source.text_key) for source in paths}) > 1:
        raise ConfigError("--prep reads all files in the same way: per_line and text_key must be equal for all")
    return paths


def bench_prep(
    tokenizers: Mapping[str, Tokenizer],
    sources: Sequence[PathSource],
    *,
    repeats: int,
    engine: str = "local",
    on_progress: OnProgress = ignore_progress,
) -> list[PrepFigures]:
    """Prepare ``sources`` with each tokenizer that wraps a library, interleaved with that library.

    There is no validation split and no deduplication, so that both encode the same text. Shards go to a temporary
    folder, which needs space for them.

    Args:
        sources: as :func:`check_preparable` returns them.
        engine: ``ray`` also prepares them with ``--engine ray``.

    Raises:
        WorkerError: ``psannlm prep`` failed, or a measuring process ended early.
    """
    threads = usable_cores()
    figures = []
    for name, tokenizer in tokenizers.items():
        if raw_encode(tokenizer) is None:
            continue
        content = tokenizer.to_bytes()
        environment = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        with IsolatedProcess(RawBench, sources, content, threads, environment=environment) as raw:
            ways = ["raw", "raw arrays"] if raw.call("has_arrays") else ["raw"]
            candidates: dict[str, Callable[[Count], RawRun | PrepRun]] = {
                f"{way} {name}": _raw_candidate(raw, way == "raw arrays") for way in ways
            }
            candidates |= _prep_candidates(name, sources, content, threads, engine)
            runs: dict[str, list[Any]] = run_interleaved(candidates, repeats, warm_ups=0, on_progress=on_progress)
        of = _figures(name, threads, runs[f"prep {name}"], runs[f"raw {name}"], runs.get(f"raw arrays {name}"))
        if engine == "ray":
            of = replace(of, ray=_ray_figures(name, runs))
        figures.append(of)
    return figures


def _prep_candidates(
    name: str, sources: Sequence[PathSource], content: bytes, threads: int, engine: str
) -> dict[str, Callable[[Count], RawRun | PrepRun]]:
    """Return the runs of the command: on the corpus and, where two engines are compared, on one line, with each."""

    def run(engine: str) -> Callable[[Count], PrepRun]:
        return lambda _: run_prep(sources, content, threads, engine)

    def start(engine: str) -> Callable[[Count], PrepRun]:
        def run_on_one_line(_: Count) -> PrepRun:
            with tempfile.TemporaryDirectory(prefix="psannlm-prep-") as folder:
                (Path(folder) / "line.txt").write_bytes(_ONE_LINE)
                return run_prep([PathSource(path=f"{folder}/line.txt")], content, threads, engine)

        return run_on_one_line

    if engine == "local":
        return {f"prep {name}": run("local")}
    return {
        f"prep {name}": run("local"),
        f"prep with ray {name}": run("ray"),
        f"start {name}": start("local"),
        f"start with ray {name}": start("ray"),
    }


def _ray_figures(name: str, runs: Mapping[str, Sequence[PrepRun]]) -> RayFigures:
    here, there = runs[f"prep {name}"], runs[f"prep with ray {name}"]
    begun, begun_there = runs[f"start {name}"], runs[f"start with ray {name}"]
    cpu_s = [run.sampled_cpu_s for run in there if run.sampled_cpu_s is not None]
    return RayFigures(
        prep_s=Spread.of([run.seconds for run in there]),
        prep_cpu_s=Spread.of(cpu_s) if cpu_s else None,
        peak_bytes=max((run.peak_bytes for run in there if run.peak_bytes is not None), default=None),
        start_s=Spread.of([b.seconds - a.seconds for a, b in zip(begun, begun_there, strict=True)]),
        ratio_to_local=paired_ratio([run.seconds for run in here], [run.seconds for run in there]),
    )


def _raw_candidate(raw: IsolatedProcess, as_arrays: bool) -> Callable[[Count], RawRun]:
    def run(_: Count) -> RawRun:
        made: RawRun = raw.call("run", as_arrays)
        return made

    return run


def _figures(
    name: str, workers: int, prep: Sequence[PrepRun], raw: Sequence[RawRun], arrays: Sequence[RawRun] | None
) -> PrepFigures:
    def spread(runs: Sequence[RawRun] | Sequence[PrepRun], what: str) -> Spread:
        return Spread.of([getattr(run, what) for run in runs])

    def ratio(others: Sequence[RawRun]) -> Spread:
        return paired_ratio([run.seconds for run in others], [run.seconds for run in prep])

    peaks = [run.peak_bytes for run in prep if run.peak_bytes is not None]
    return PrepFigures(
        name=name,
        workers=workers,
        n_bytes=raw[0].n_bytes,
        n_tokens=prep[0].n_tokens,
        extra_tokens=prep[0].n_tokens - raw[0].n_tokens,
        prep_s=spread(prep, "seconds"),
        prep_cpu_s=spread(prep, "cpu_s"),
        peak_bytes=max(peaks, default=None),
        raw_s=spread(raw, "seconds"),
        raw_cpu_s=spread(raw, "cpu_s"),
        ratio_to_raw=ratio(raw),
        raw_arrays_s=None if arrays is None else spread(arrays, "seconds"),
        raw_arrays_cpu_s=None if arrays is None else spread(arrays, "cpu_s"),
        ratio_to_raw_arrays=None if arrays is None else ratio(arrays),
    )


def run_prep(sources: Sequence[PathSource], tokenizer: bytes, workers: int, engine: str = "local") -> PrepRun:
    """Run ``psannlm prep`` on ``sources`` into a temporary folder and measure the whole command.

    Raises:
        WorkerError: the command failed; the message holds the last line of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="psannlm-prep-") as name:
        folder = Path(name)
        (folder / "tokenizer").write_bytes(tokenizer)
        command = python_command("psannlm", "prep", *(source.path for source in sources))
        command += ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "shards"), "--json"]
        command += ["--val-split", "0", "--keep-duplicates", "--workers", str(workers)]
        command += ["--engine", engine]
        command += ["--text-key", sources[0].text_key, *(["--per-line"] if sources[0].per_line else [])]
        cpu_before = _children_cpu_s()
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with _ProcessMonitor(process.pid) as monitor:
            out, err = process.communicate()
        seconds = time.perf_counter() - began
        if process.returncode != 0:
            reason = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
            raise WorkerError(f"psannlm prep ended with exit code {process.returncode}: {reason}")
        train = json.loads(out)["train"]
    n_text_tokens = train["tokens"] - 2 * train["documents"]
    return PrepRun(seconds, _children_cpu_s() - cpu_before, n_text_tokens, monitor.peak_bytes, monitor.cpu_s)


def _children_cpu_s() -> float:
    """Return the CPU seconds of all ended child processes and their children."""
    times = os.times()
    return times.children_user + times.children_system


class _ProcessMonitor:
    """Context that polls the memory and CPU time of a process and its descendants every tenth of a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._cpu_s: dict[int, float] = {}
        self.peak_bytes: int | None = None

    def __enter__(self) -> _ProcessMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds that the processes had used when they were last seen."""
        return sum(self._cpu_s.values()) if self._cpu_s else None

    def _poll(self) -> None:
        while not self._ended.wait(_POLL_S):
            held = held_bytes(self._pid)
            if held is not None:
                self.peak_bytes = max(held, self.peak_bytes or 0)
                self._cpu_s.update(used_cpu_s(self._pid))


def used_cpu_s(pid: int) -> dict[int, float]:
    """Return the CPU seconds of a process and of each of its descendants, by process id; only with ``/proc``."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    used = {}
    for folder in _descendants(pid):
        try:
            # The name of the program, in parentheses, may hold anything.
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        used[int(folder.name)] = tick_s * (int(fields[11]) + int(fields[12]))
    return used


def held_bytes(pid: int) -> int | None:
    """Return the memory of a process and its descendants: their proportional set sizes, in bytes.

    None without Linux's ``/proc``; a process that has ended meanwhile counts 0.
    """
    if not (_PROC / "self" / "smaps_rollup").is_file():
        return None
    total = 0
    for folder in _descendants(pid):
        try:
            lines = (folder / "smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _descendants(pid: int) -> Iterator[Path]:
    """Yield the folders in ``/proc`` of a process and its descendants."""
    waiting = [pid]
    while waiting:
        folder = _PROC / str(waiting.pop())
        try:
            waiting += [
                int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        yield folder
