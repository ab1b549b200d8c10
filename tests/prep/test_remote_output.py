"""Preparation to a URL, against a real S3 server: equal bytes, resumed after kills, the manifest last, clear errors."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.data.remote_prepared import find_remote_prepared
from psannlm.errors import ArtifactError, ConfigError, StorageError
from psannlm.io.remote_folder import RemoteFolder
from psannlm.prep.job import PrepSettings
from psannlm.prep.merge import merge_parts
from psannlm.prep.pipeline import PrepResult, prepare_corpus

s3fs = pytest.importorskip("s3fs")

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "s3://corpora"  # of the fixture s3
SETTINGS = {"val_split": 0.15, "shard_tokens": 400, "per_line": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number in range(3):
        lines = [f"the value of object {number * 40 + each} is an object" for each in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"{BUCKET}/{re.sub(r'[^a-z0-9]+', '_', request.node.name)}"


@pytest.fixture
def prepare_to(files: Path, tokenizer_path: Path, tmp_path: Path) -> Callable[..., PrepResult]:
    def run(out: Path | str, part: tuple[int, int] | None = None, **settings: Any) -> PrepResult:
        return prepare_corpus(
            [str(files)],
            tokenizer_path,
            out,
            PrepSettings(**{**SETTINGS, **settings}),
            n_workers=1,
            part=part,
            chunk_bytes=2_000,
            cache_dir=tmp_path / "cache",
        )

    return run


def hashes_at(system: Any, url: str) -> dict[str, str]:
    """The hash of each object below a URL, by the rest of its name."""
    system.invalidate_cache()
    start = len(url) - len("s3://") + 1
    return {name[start:]: hashlib.sha256(system.cat_file(name)).hexdigest() for name in system.find(url)}


def hashes_in(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are written to URLs, in order."""
    seen: list[str] = []
    for method in ("put", "put_bytes"):
        write = getattr(RemoteFolder, method)

        def noting(folder: RemoteFolder, *args: Any, write: Any = write, at: int = method == "put") -> None:
            write(folder, *args)
            seen.append(args[at])

        monkeypatch.setattr(RemoteFolder, method, noting)
    return seen


@pytest.mark.slow
def test_prep_to_a_url_gives_the_local_bytes(
    s3: Any, url: str, tmp_path: Path, prepare_to: Callable[..., PrepResult], puts: list[str]
) -> None:
    local = prepare_to(tmp_path / "local")
    remote = prepare_to(url)
    assert (remote.folder, remote.manifest) == (url, local.manifest)
    assert len(local.manifest.train.shards) > 3
    assert hashes_at(s3, url) == hashes_in(tmp_path / "local")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing is left here"
    assert puts[0] == ".work/plan.json"
    assert puts[-1] == "manifest.json", "it says that everything else is there"
    puts.clear()
    assert prepare_to(f"{url}/").was_done
    assert puts == []
    with pytest.raises(ConfigError, match=r"val_split: 0\.15 then, 0\.3 now"):
        prepare_to(url, val_split=0.3)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from psannlm.io.remote_folder import RemoteFolder
from psannlm.prep.job import PrepSettings
from psannlm.prep.pipeline import prepare_corpus

corpus, tokenizer, out, cache, settings, n_puts = json.loads(sys.argv[1])
put = RemoteFolder.put

def killing(folder, path, name):
    global n_puts
    n_puts -= 1
    if n_puts < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(folder, path, name)

RemoteFolder.put = killing
prepare_corpus([corpus], Path(tokenizer), out, PrepSettings(**settings), n_workers=1, chunk_bytes=2_000,
               cache_dir=Path(cache))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["cache", "other machine"])
def test_prep_killed_between_shards_is_resumed(
    s3: Any,
    url: str,
    cache: str,
    files: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    prepare_to: Callable[..., PrepResult],
    puts: list[str],
) -> None:
    """With the encoded chunks of the killed process, or without on another machine: shards are not sent twice."""
    settings = [str(files), str(tokenizer_path), url, str(tmp_path / cache), SETTINGS, 2]
    done = subprocess.run([sys.executable, "-c", _KILLED, json.dumps(settings)], cwd=REPOSITORY)
    assert done.returncode == -9
    assert sorted(hashes_at(s3, url)) == [".work/plan.json", "train_00000.safetensors", "train_00001.safetensors"]
    with pytest.raises(ArtifactError, match="holds unfinished work of psannlm prep"):
        find_remote_prepared(url)
    with pytest.raises(ConfigError, match=r"unfinished work of another plan:\n  --val-split: 0\.15 then, 0\.3 now"):
        prepare_to(url, val_split=0.3)
    result = prepare_to(url)
    assert [name for name in puts if name.startswith("train")] == [
        entry.file for entry in result.manifest.train.shards[2:]
    ]
    prepare_to(tmp_path / "local")
    assert hashes_at(s3, url) == hashes_in(tmp_path / "local")


@pytest.mark.slow
def test_damaged_folder_at_a_url_is_prepared_again(
    s3: Any, url: str, prepare_to: Callable[..., PrepResult], puts: list[str]
) -> None:
    prepare_to(url)
    whole = hashes_at(s3, url)
    s3.rm_file(f"{url}/train_00002.safetensors")
    shard = f"{url}/train_00001.safetensors"
    s3.pipe_file(shard, s3.cat_file(shard)[:-1])
    puts.clear()
    assert not prepare_to(url).was_done
    assert hashes_at(s3, url) == whole
    assert [name for name in puts if name.startswith(("train", "validation"))] == [
        "train_00001.safetensors",
        "train_00002.safetensors",
    ]


def test_foreign_files_at_a_url_stay(s3: Any, url: str, prepare_to: Callable[..., PrepResult]) -> None:
    s3.pipe_file(f"{url}/train_00000.safetensors", b"of somebody else")
    with pytest.raises(StorageError, match=r"train_00000.safetensors is in the way: psannlm did not write it"):
        prepare_to(url)
    s3.pipe_file(f"{url}/manifest.json", b'{"name": "another tool"}')
    with pytest.raises(StorageError, match=r"manifest.json is in the way"):
        prepare_to(url)
    assert len(hashes_at(s3, url)) == 2


@pytest.mark.slow
def test_parts_at_urls_are_merged_like_folders(
    s3: Any, url: str, tmp_path: Path, prepare_to: Callable[..., PrepResult]
) -> None:
    for index in (1, 2):
        prepare_to(tmp_path / str(index), part=(index, 2))
        prepare_to(f"{url}/{index}", part=(index, 2))
    merge_parts([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    parts = [f"{url}/{index}" for index in (1, 2)]
    result = merge_parts(parts, f"{url}/merged", cache_dir=tmp_path / "cache")
    assert result.folder == f"{url}/merged"
    assert hashes_at(s3, f"{url}/merged") == hashes_in(tmp_path / "merged")
    with pytest.raises(ConfigError, match="is prepared already"):
        merge_parts(parts, f"{url}/merged", cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="is not a prepared folder"):
        merge_parts([f"{url}/3"], f"{url}/other", cache_dir=tmp_path / "cache")


def test_missing_bucket_is_named_before_the_work(
    s3: Any, prepare_to: Callable[..., PrepResult], tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"s3://no-bucket-here/x.*create the bucket, or check the spelling") as found:
        prepare_to("s3://no-bucket-here/x")
    assert "\n" not in str(found.value)
    assert not s3.exists("no-bucket-here"), "it is not created"
    assert not list((tmp_path / "cache").rglob("piece_*")), "nothing was encoded"


def test_refused_credentials_are_named(
    s3: Any, url: str, prepare_to: Callable[..., PrepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Neither the files nor the service of a machine are asked.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"check the credentials \(AWS_ACCESS_KEY_ID") as found:
        prepare_to(url)
    assert "\n" not in str(found.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_package_is_named(prepare_to: Callable[..., PrepResult], monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StorageError, match=r"s3:// takes the package s3fs: install it with pip"):
        prepare_to("s3://corpora/x")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("https://host/shards", "can be read and not written"),
        ("ftp://host/shards", "URLs of the protocol 'ftp' are not read"),
        ("file://host/shards", "names another machine"),
    ],
)
def test_urls_that_cannot_be_written_are_refused(prepare_to: Callable[..., PrepResult], out: str, said: str) -> None:
    with pytest.raises((ConfigError, StorageError), match=said):
        prepare_to(out)


def test_file_url_names_a_folder(prepare_to: Callable[..., PrepResult], tmp_path: Path) -> None:
    result = prepare_to(f"file://{tmp_path}/out")
    assert result.folder == tmp_path / "out"
    assert (tmp_path / "out" / "manifest.json").is_file()


_COPIER = """
import os, signal, sys
from psannlm.config.data import PathSource
from psannlm.data.prepared import find_prepared
from psannlm.io.remote_folder import RemoteFolder
from psannlm.runtime.progress import Progress

url, cache, log, n_reads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
read = RemoteFolder.read

def noting(folder, name, *limits):
    global n_reads
    if name.endswith(".safetensors"):
        n_reads -= 1
        if n_reads < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(log, "a") as file:
            file.write(name + "\\n")
    return read(folder, name, *limits)

RemoteFolder.read = noting
folder = find_prepared([PathSource(path=url)]).open(cache)
for shard in folder.train.segments:
    shard.verify()
print(folder.manifest.content_sha256)
"""


@pytest.mark.slow
def test_killed_copy_is_finished_once_by_several_processes(
    s3: Any, url: str, tmp_path: Path, prepare_to: Callable[..., PrepResult]
) -> None:
    """One is killed after two shards; of two others, as the ranks of one machine, one copies what is missing."""
    made = prepare_to(url).manifest
    n_shards = len(made.train.shards) + len(made.validation.shards)
    cache, log = tmp_path / "copies", tmp_path / "log"

    def start(n_reads: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _COPIER, url, str(cache), str(log), str(n_reads)]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    with start(2) as killed:
        assert killed.wait() == -9
    assert len(log.read_text().splitlines()) == 2
    processes = [start(n_shards) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in processes]
    assert printed == [made.content_sha256] * 2
    read = log.read_text().splitlines()
    assert len(read) == len(set(read)) == n_shards
    (copy,) = (cache / "prepared").iterdir()
    assert hashes_in(copy) == hashes_at(s3, url), "and neither locks nor leftovers of the killed process"
