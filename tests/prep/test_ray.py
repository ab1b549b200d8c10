"""Preparation on real Ray clusters of one to three nodes on this machine: equal bytes, whatever happens to a node."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psannlm.errors import ConfigError, CorpusError, Interrupted, WorkerError
from psannlm.prep import ray_pool, ray_reader
from psannlm.prep.chunks import JSON_LINES, TEXT, Chunk, Section
from psannlm.prep.encode_worker import setup_message
from psannlm.prep.engine import READERS
from psannlm.prep.job import PrepSettings
from psannlm.prep.pipeline import PrepResult, prepare_corpus
from psannlm.prep.ray_cluster import ray_connection
from psannlm.prep.ray_pool import RayPool, describe_sections
from psannlm.prep.ray_worker import encode_on_ray, versions
from psannlm.runtime.processes import python_command

SETTINGS = PrepSettings(val_split=0.1, shard_tokens=5_000)
FolderBytes = Callable[[Path], dict[str, str]]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


class Cluster:
    """A Ray cluster of nodes with one core each on this machine; ``nodes`` excludes the head."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        (Path(os.environ["RAY_TMPDIR"]) / "ray").mkdir()
        head = {"num_cpus": 1, "include_dashboard": False}
        self._cluster = RayCluster()
        self._add(**head)
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []

    def add(self, **arguments: Any) -> Any:
        node = self._add(num_cpus=1, include_log_monitor=False, **arguments)
        self.nodes.append(node)
        return node

    def _add(self, **arguments: Any) -> Any:
        """Start a node; Ray gives up after 30 s, which a machine that runs much else may take."""
        for _ in range(2):
            try:
                return self._cluster.add_node(**arguments)
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
        return self._cluster.add_node(**arguments)

    def grow_to(self, n_nodes: int) -> None:
        while len(self.nodes) + 1 < n_nodes:
            self.add()

    def kill(self, node: Any) -> None:
        """End a node as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests: starting a node takes seconds."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "t" * 64,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,
            # A killed node is noticed after five failed checks, by default of three seconds each.
            "RAY_health_check_period_ms": "500",
        }.items():
            environment.setenv(name, value)
        pytest.importorskip("ray")
        # Another test may have loaded Ray, which read the environment then.
        pytest.importorskip("ray._raylet").Config.initialize("")
        made = Cluster()
        yield made
        made.close()


@pytest.fixture(scope="module")
def expected(
    corpus: Path, tokenizer_path: Path, folder_bytes: FolderBytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The folder that local processes make of the corpus."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare_corpus([str(corpus)], tokenizer_path, out, SETTINGS, n_workers=1, chunk_bytes=5_000)
    return folder_bytes(out)


@pytest.fixture
def on_ray(corpus: Path, tokenizer_path: Path, tmp_path: Path, cluster: Cluster) -> Callable[..., PrepResult]:
    """Prepare the corpus on the cluster, with the settings of ``expected``."""

    def run(name: str = "ray", **arguments: Any) -> PrepResult:
        arguments = {"chunk_bytes": 5_000, "engine": "ray", "ray_address": cluster.address, **arguments}
        return prepare_corpus([str(corpus)], tokenizer_path, tmp_path / name, SETTINGS, **arguments)

    return run


@pytest.fixture
def all_ranges_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``read_on`` workers, no section is so small that its bytes are sent instead."""
    monkeypatch.setattr(ray_reader, "SMALLEST_RANGE_BYTES", 1)


@pytest.mark.parametrize("read_on", READERS)
@pytest.mark.parametrize("n_nodes", [1, 2, 3])
def test_ray_bytes_equal_local_on_any_number_of_nodes(
    n_nodes: int,
    read_on: str,
    all_ranges_are_read: None,
    on_ray: Callable[..., PrepResult],
    cluster: Cluster,
    expected: dict[str, str],
    tmp_path: Path,
    folder_bytes: FolderBytes,
) -> None:
    cluster.grow_to(n_nodes)
    on_ray(read_on=read_on)
    assert folder_bytes(tmp_path / "ray") == expected


def _after_chunks(work: Path, n_chunks: int, act: Callable[[], None]) -> threading.Thread:
    """Call ``act`` in a thread once ``n_chunks`` are encoded."""

    def wait() -> None:
        while len(list(work.glob("piece_*"))) < n_chunks:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def _encoding_processes() -> list[int]:
    """Return the processes that encode a chunk now: Ray names a worker after its task."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::encode_on_ray"):
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="workers are found in /proc")
@pytest.mark.parametrize("read_on", READERS)
def test_ray_bytes_equal_local_with_worker_and_node_killed(
    read_on: str,
    all_ranges_are_read: None,
    on_ray: Callable[..., PrepResult],
    cluster: Cluster,
    expected: dict[str, str],
    tmp_path: Path,
    folder_bytes: FolderBytes,
) -> None:
    cluster.grow_to(3)
    killed: list[int] = []

    def kill_worker() -> None:
        while not killed:
            for process in _encoding_processes()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    work = tmp_path / "ray" / ".work"
    threads = [
        _after_chunks(work, 5, kill_worker),
        _after_chunks(work, 15, lambda: cluster.kill(cluster.nodes[0])),
    ]
    on_ray(read_on=read_on)
    for thread in threads:
        thread.join()
    assert killed
    assert folder_bytes(tmp_path / "ray") == expected


def test_ray_chunk_failing_thrice_names_source_and_bytes(
    on_ray: Callable[..., PrepResult],
    expected: dict[str, str],
    corpus: Path,
    tmp_path: Path,
    folder_bytes: FolderBytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison = (corpus / "03.txt").read_bytes()[:200]
    attempts = tmp_path / "attempts"

    def encode_or_die(key: str, job: list[Any], header: bytes, payload: Any, *rest: Any) -> Any:
        import os

        from psannlm.prep.ray_worker import encode_on_ray

        if poison in payload.tobytes():
            with open(attempts, "a") as file:
                file.write("x")
            os._exit(1)
        return encode_on_ray(key, job, header, payload, *rest)

    monkeypatch.setattr(ray_pool, "encode_on_ray", encode_or_die)
    with pytest.raises(
        WorkerError, match=r"03\.txt, bytes 0 to [\d,]+.* failed 3 times.* with either --engine"
    ) as caught:
        on_ray()
    assert "\n" not in str(caught.value)
    assert attempts.read_text() == "xxx"
    n_before = len(list((tmp_path / "ray" / ".work").glob("piece_*")))
    assert n_before > 3
    on_ray(engine="local", ray_address=None, n_workers=1)
    assert folder_bytes(tmp_path / "ray") == expected


@pytest.mark.parametrize("read_on", READERS)
def test_ray_resumes_what_local_processes_began(
    read_on: str,
    all_ranges_are_read: None,
    on_ray: Callable[..., PrepResult],
    expected: dict[str, str],
    tmp_path: Path,
    folder_bytes: FolderBytes,
) -> None:
    work = tmp_path / "ray" / ".work"

    def stop_early(progress: object) -> None:
        if len(list(work.glob("piece_*"))) >= 8:
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        on_ray(engine="local", ray_address=None, n_workers=1, on_progress=stop_early)
    before = {path: path.stat().st_mtime_ns for path in work.glob("piece_*")}
    kept: list[int] = []

    def look(progress: object) -> None:
        if not kept and work.is_dir():
            kept.append(sum(path.stat().st_mtime_ns == at for path, at in before.items() if path.exists()))

    on_ray(on_progress=look, read_on=read_on)
    assert kept == [len(before)], "what was encoded before is not encoded again"
    assert folder_bytes(tmp_path / "ray") == expected


def test_ray_error_is_the_first_in_corpus_order(tmp_path: Path, tokenizer_path: Path, cluster: Cluster) -> None:
    cluster.grow_to(2)
    for number in range(20):
        bad = b"\xff" if number in (7, 8, 19) else b""
        (tmp_path / f"{number:02d}.txt").write_bytes(b"some text of a file\n" * 20 + bad)
    with pytest.raises(CorpusError, match=r"07\.txt"):
        prepare_corpus(
            [str(tmp_path / "??.txt")],
            tokenizer_path,
            tmp_path / "out",
            PrepSettings(),
            chunk_bytes=300,
            engine="ray",
            ray_address=cluster.address,
        )


def test_ray_chunks_on_their_way_are_bounded(tmp_path: Path, tokenizer_path: Path, cluster: Cluster) -> None:
    """The corpus is read no faster than it is encoded, so that memory does not grow with it."""
    cluster.grow_to(2)
    n_cores = len(cluster.nodes) + 1
    n_read, n_done, most = 0, 0, 0

    def chunks() -> Iterator[Chunk]:
        nonlocal n_read, most
        for index in range(60):
            n_read += 1
            most = max(most, n_read - n_done)
            yield Chunk(index, (Section(JSON_LINES, 0, 1, 0, 14),), {0: "a"}, b'{"text": "ab"}')

    def done(index: int, figures: dict[str, Any]) -> None:
        nonlocal n_done
        n_done += 1

    setup = setup_message(tmp_path, PrepSettings(), None)
    for n_workers, bound in ((None, 2 * n_cores), (1, 1)):
        n_read = n_done = most = 0
        with RayPool(n_workers, setup, tokenizer_path.read_bytes(), tmp_path, cluster.address) as pool:
            pool.encode(chunks(), done, lambda: False)
        assert n_done == 60
        assert most <= bound + 1


def test_ray_refuses_other_versions_before_the_first_chunk(
    on_ray: Callable[..., PrepResult], cluster: Cluster, tmp_path: Path
) -> None:
    information = tmp_path / "other" / "tokenizers-0.0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    other = cluster.add(env_vars={"PYTHONPATH": str(tmp_path / "other")})
    try:
        with pytest.raises(
            ConfigError, match=rf"has tokenizers 0\.0\.1 instead of {versions()['tokenizers']}"
        ) as caught:
            on_ray()
    finally:
        cluster.kill(other)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "ray" / ".work").glob("piece_*")) == []


def test_ray_refuses_a_node_without_the_corpus(
    on_ray: Callable[..., PrepResult], cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nstat = os.stat\n"
        "def hidden(path, *args, **names):\n"
        f"    if str(path).startswith({str(corpus)!r}):\n"
        "        raise FileNotFoundError(2, 'No such file or directory')\n"
        "    return stat(path, *args, **names)\n"
        "os.stat = hidden\n"
    )
    other = cluster.add(env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(
            ConfigError, match=r"Ray node .* does not see the corpus .*00\.txt: cannot be read"
        ) as caught:
            on_ray(read_on="workers")
    finally:
        cluster.kill(other)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "ray" / ".work").glob("piece_*")) == []


def test_ray_task_refuses_other_versions_itself(tmp_path: Path, tokenizer_path: Path, cluster: Cluster) -> None:
    """For a node that joined after the versions were compared."""
    setup = setup_message(tmp_path, PrepSettings(), None)
    with ray_connection(cluster.address, 1, 0) as ray:
        job = [ray.put((setup, tokenizer_path.read_bytes(), {**versions(), "psannlm": "9"}))]
        header = Chunk(0, (Section(TEXT, 0, 1, 0, 1),), {0: "a"}, b"").header()
        figures, content = encode_on_ray("other", job, header, np.frombuffer(b"a", np.uint8))
    assert figures["versions"] == f"psannlm {versions()['psannlm']} instead of 9"
    assert content is None


def _refusal(on_ray: Callable[..., PrepResult], address: str) -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        on_ray(ray_address=address)
    assert time.monotonic() - began < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ray_refuses_a_wrong_address_in_one_line(on_ray: Callable[..., PrepResult]) -> None:
    with socket.create_server(("", 0)) as silent:
        silent_port = silent.getsockname()[1]
        assert "no Ray cluster answers there" in _refusal(on_ray, f"127.0.0.1:{silent_port}")
    assert "no Ray cluster is there" in _refusal(on_ray, f"127.0.0.1:{silent_port}")
    with socket.create_server(("127.0.0.1", 0)) as inner:
        assert "no Ray cluster is" in _refusal(on_ray, f"127.0.0.1:{inner.getsockname()[1]}")
    assert "not HOST:PORT" in _refusal(on_ray, "localhost")
    assert "Ray Client is not supported" in _refusal(on_ray, "ray://127.0.0.1:10001")


def test_ray_engine_is_refused_where_it_cannot_be_used(
    on_ray: Callable[..., PrepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--ray-address 10\.0\.0\.7:1 needs --engine ray"):
        on_ray(engine="local", ray_address="10.0.0.7:1")
    with pytest.raises(ConfigError, match=r"'rya' is not one of local, ray \(did you mean 'ray'\?\)"):
        on_ray(engine="rya", ray_address=None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray, .*\[cluster\]"):
        on_ray(ray_address=None)


def test_chunk_description_names_sources_and_bytes() -> None:
    names = {0: "a.jsonl", 1: "b.parquet"}
    lines = [Section(JSON_LINES, 0, 1, 0, 1_000), Section(JSON_LINES, 0, 40, 1_000, 500)]
    rows = [Section(TEXT, 1, 3, 0, 70), Section(TEXT, 1, 4, 0, 80)]

    def described(*sections: Section) -> str:
        return describe_sections(Chunk(0, sections, names, b""))

    assert described(*lines) == "a.jsonl, bytes 0 to 1,500"
    assert described(rows[0]) == "b.parquet:3, bytes 0 to 70 of its text"
    assert described(*lines, *rows) == "a.jsonl, bytes 0 to 1,000, to b.parquet:4, bytes 0 to 80 of its text"


def _descendants(process: int) -> list[int]:
    found, waiting = [], [process]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            children = [
                int(pid) for task in (folder / "task").iterdir() for pid in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        found += children
        waiting += children
    return found


def _listening_hosts(processes: list[int]) -> set[str]:
    """Return the local addresses, in hexadecimal, on which any of these processes accepts connections."""
    inodes = set()
    for process in processes:
        for link in (Path("/proc") / str(process) / "fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            if target.startswith("socket:"):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def _until_encoded(process: subprocess.Popen[bytes], out: Path) -> str:
    """Write text to ``process`` until its first chunk is encoded; return "", or what it said if it ended before."""
    assert process.stdin is not None
    # A chunk is handed over when it is full, which the second block that is read makes it.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"the value of object 7 is an object\n" * 250_000)
        process.stdin.flush()
    patience = time.monotonic() + 120
    while not list(out.glob(".work/piece_*")):
        if process.poll() is not None:
            return process.communicate()[1].decode() or f"exit code {process.returncode}"
        assert time.monotonic() < patience
        time.sleep(0.05)
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="processes and sockets are found in /proc")
def test_ray_started_by_prep_is_private_and_ends(tokenizer_path: Path, tmp_path: Path) -> None:
    """Loopback sockets, a token, no usage report; nothing imported from the working folder; Ctrl-C ends it all."""
    pytest.importorskip("ray")
    here = tmp_path / "here"
    here.mkdir()
    for name in ("numpy", "tokenizers", "sentencepiece", "psannlm", "msgpack"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\n")
    command = python_command("psannlm", "prep", "-", "--per-line", "--engine", "ray", "--workers", "1")
    command += ["--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out"), "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray gives up on a node that does not start within 30 s, which a busy machine may need more than once.
    for _ in range(3):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here, env=environment, start_new_session=True
        )
        said = _until_encoded(process, tmp_path / "out")
        if "timed out during startup" not in said:
            break
    assert not said, said
    others = _descendants(process.pid)
    lines = [(Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in others]
    assert any(b"raylet" in line for line in lines)
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert _listening_hosts([process.pid, *others]) <= loopback
    for line, pid in zip(lines, others, strict=True):
        if b"gcs_server" in line:
            variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            assert {b"RAY_AUTH_MODE=token", b"RAY_USAGE_STATS_ENABLED=0"} <= set(variables)
    assert not (tmp_path / "imported").exists()
    folders = {name for line in lines for name in re.findall(r"psannlm-ray-\w+", line.decode())}
    assert len(folders) == 1

    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "interrupted after" in said
    assert "Traceback" not in said
    assert [
        line for line in said.splitlines() if "ray" in line.lower() and "encoding on a Ray cluster" not in line
    ] == []
    patience = time.monotonic() + 20
    while alive := [pid for pid in others if (Path("/proc") / str(pid)).exists()]:
        assert time.monotonic() < patience, alive
        time.sleep(0.05)
    assert not list(Path("/tmp").glob(folders.pop()))
