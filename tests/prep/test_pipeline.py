"""Preparation: reproducible bytes, resuming, deduplication and refusal of other settings."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from psannlm.data.framing import unpack_origin
from psannlm.data.manifest import read_manifest
from psannlm.errors import ConfigError, CorpusError, StorageError
from psannlm.io.atomic import sha256_file
from psannlm.io.lock import RunLock
from psannlm.prep.job import PrepSettings
from psannlm.prep.pipeline import PrepResult, prepare_corpus
from psannlm.tokenizers.resolve import fit_tokenizer

Prepare = Callable[..., PrepResult]
FolderBytes = Callable[[Path], dict[str, str]]
DocumentsIn = Callable[..., list[tuple[str, int, int]]]


@pytest.mark.slow
def test_prep_bytes_do_not_depend_on_worker_count(
    prepare: Prepare, corpus: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    made = []
    for n_workers in (1, 2, 3):
        prepare(corpus, name=str(n_workers), n_workers=n_workers, val_split=0.1, shard_tokens=5_000)
        made.append(folder_bytes(tmp_path / str(n_workers)))
    assert made[0] == made[1] == made[2]
    assert not any(name.startswith(".") for name in made[0]), "no work is left in a finished folder"
    assert len([name for name in made[0] if name.startswith("train_")]) > 3


@pytest.mark.slow
def test_prep_holds_every_document_once(
    prepare: Prepare, corpus: Path, topics: list[str], tmp_path: Path, documents_in: DocumentsIn
) -> None:
    result = prepare(corpus, n_workers=2, val_split=0.2, shard_tokens=5_000)
    texts = [text for text, _, _ in documents_in(tmp_path / "out")]
    expected = {*topics, *(p for text in topics for p in text.split("\n\n") if p.strip())}
    has_parquet = (corpus / "z.parquet").exists()
    expected |= {text[::-1] for text in topics} if has_parquet else set()
    assert Counter(texts) == Counter(expected)
    manifest = result.manifest
    n = len(topics) * (3 if has_parquet else 2) + sum(len([p for p in t.split("\n\n") if p.strip()]) for t in topics)
    assert manifest.train.documents + manifest.validation.documents + manifest.duplicates == n
    assert manifest.validation.documents > 2


@pytest.mark.slow
def test_prep_documents_keep_their_origin(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("first file")
    (tmp_path / "c" / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "three"}\n')
    result = prepare(tmp_path / "c", val_split=0)
    origins = {text: unpack_origin(origin) for text, _, origin in documents_in(tmp_path / "out")}
    assert origins == {"first file": (0, 0), "one": (1, 1), "three": (1, 3)}
    assert result.manifest.drops == {"blank line": 1}
    for source, name in zip(result.manifest.sources, ("a.txt", "b.jsonl"), strict=True):
        path = tmp_path / "c" / name
        assert (source.path, source.bytes, source.sha256) == (str(path), path.stat().st_size, sha256_file(path))
    assert [source.documents for source in result.manifest.sources] == [1, 2]


@pytest.mark.slow
def test_prep_keeps_the_first_of_equal_documents(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn) -> None:
    """However far apart they stand, and whatever kind of file they stand in."""
    lines = [f"line {i % 40}" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "line 7"}) + "\n" + json.dumps({"text": "line x"}))
    sources = tmp_path / "a.txt", tmp_path / "b.jsonl"
    result = prepare(*sources, val_split=0, per_line=True, chunk_bytes=100, n_workers=2)
    found = {text: unpack_origin(origin) for text, _, origin in documents_in(tmp_path / "out")}
    assert found == {**{f"line {i}": (0, i + 1) for i in range(40)}, "line x": (1, 2)}
    assert result.manifest.duplicates == 161
    kept = prepare(*sources, name="kept", val_split=0, per_line=True, keep_duplicates=True)
    assert [text for text, _, _ in documents_in(tmp_path / "kept")] == [*lines, "line 7", "line x"]
    assert kept.manifest.duplicates == 0


def test_prep_filters_count_omitted_documents(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "ä" * n}) + "\n" for n in range(10)))
    result = prepare(tmp_path / "a.jsonl", val_split=0, min_chars=3, max_chars=6)
    assert [len(text) for text, _, _ in documents_in(tmp_path / "out")] == [3, 4, 5, 6]
    drops = {"blank document": 1, "fewer than 3 characters": 2, "more than 6 characters": 3}
    assert result.manifest.drops == drops


@pytest.mark.slow
def test_prep_held_out_depends_on_text_and_seed(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn) -> None:
    lines = [f"document number {i}" for i in range(2_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines[:1_500])))
    held_out = []
    for name, file, seed in (("a", "a.txt", 1), ("b", "b.txt", 1), ("c", "a.txt", 2)):
        prepare(tmp_path / file, name=name, per_line=True, val_split=0.1, seed=seed, chunk_bytes=9_000)
        held_out.append({text for text, _, _ in documents_in(tmp_path / name, "validation")})
    assert 140 < len(held_out[0]) < 260
    assert held_out[1] == held_out[0] & set(lines[:1_500])
    assert len(held_out[0] & held_out[2]) < 60


@pytest.mark.slow
@pytest.mark.parametrize("val_split", [0.0001, 0.9999])
def test_neither_side_is_empty(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, val_split: float) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    prepare(tmp_path / "a.txt", per_line=True, val_split=val_split)
    sizes = [len(documents_in(tmp_path / "out", side)) for side in ("train", "validation")]
    assert sorted(sizes) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_single_document_is_cut_in_two(prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, kind: str) -> None:
    text = "\n\n".join(f"Paragraph {i} has some words in it, ä and ö." for i in range(100))
    path = tmp_path / f"a.{kind}"
    content = (json.dumps({"text": text}) if kind == "jsonl" else text).encode()
    path.write_bytes(gzip.compress(content) if kind == "txt.gz" else content)
    prepare(path, val_split=0.1)
    (train,), (held_out,) = (documents_in(tmp_path / "out", side) for side in ("train", "validation"))
    assert train[0] + held_out[0] == text
    assert train[0].endswith("\n\n")
    assert 0.05 < len(held_out[0]) / len(text) < 0.15


@pytest.mark.slow
def test_prep_refuses_single_document_it_cannot_cut(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(("x", " \n x", "x\n")):
        (tmp_path / f"{number}.txt").write_text(text)
        with pytest.raises(CorpusError, match=r"too little text to hold out 0\.1"):
            prepare(tmp_path / f"{number}.txt", val_split=0.1, name=str(number))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"all of it is one document")))
    with pytest.raises(CorpusError, match="cannot be read twice"):
        prepare("-", val_split=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "line", "jsonl", "parquet", "crlf"])
def test_prep_long_document_tokens_are_format_independent(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Streamed in segments or at hand as a whole; segments go to several workers, and begin and end text once."""
    text = long_text()
    assert len(text.encode()) > 2 << 20
    if kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": ["short", text]}), tmp_path / "a.parquet")
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.jsonl" if kind == "jsonl" else "a.txt")
    end = "\r\n" if kind == "crlf" else "\n"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("short", text)), encoding="utf-8")
    elif kind in ("line", "crlf"):
        path.write_bytes(f"short{end}{text}{end}last{end}".encode())
    elif kind == "whole":
        path.write_text(text, encoding="utf-8")
    per_line = kind in ("line", "crlf")
    result = prepare(path, val_split=0, per_line=per_line, n_workers=2, chunk_bytes=300_000, shard_tokens=1_000)
    texts = [text for text, _, _ in documents_in(tmp_path / "out")]
    assert texts == {"whole": [text], "line": ["short", text, "last"], "crlf": ["short", text, "last"]}.get(
        kind, ["short", text]
    )
    # A document that is larger than a shard has one of its own.
    assert [shard.documents for shard in result.manifest.train.shards] == [1] * len(texts)
    (long,) = (shard for shard in result.manifest.train.shards if shard.tokens > 1_000)
    assert long.tokens == LONG_TOKENS.setdefault("n", long.tokens), "tokens depend on the text alone"


LONG_TOKENS: dict[str, int] = {}


@cache
def long_text() -> str:
    source = random.Random(5)
    words = ["".join(source.choices("abcdeäß日", k=source.randrange(1, 9))) for _ in range(5_000)]
    return " ".join(source.choices(words, k=500_000))


def test_standard_input_is_read(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    result = prepare("-", val_split=0, stdin_format="jsonl")
    assert [text for text, _, _ in documents_in(tmp_path / "out")] == ["one", "two"]
    assert result.manifest.sources[0].bytes == len(content)


@pytest.mark.slow
def test_prep_reads_a_url_like_its_file(
    prepare: Prepare, corpus: Path, tmp_path: Path, topics: list[str], folder_bytes: FolderBytes
) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in corpus.iterdir():
        memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    prepare(corpus, name="local", shard_tokens=5_000)
    for number, url in enumerate((f"file://{corpus}", "memory://corpus/*", "memory://corpus")):
        prepare(url, name=str(number), shard_tokens=5_000)
        local, remote = (folder_bytes(tmp_path / name) for name in ("local", str(number)))
        # The manifests differ in the names of the sources, and in nothing else.
        assert {**local, "manifest.json": ""} == {**remote, "manifest.json": ""}
    with pytest.raises(CorpusError, match="memory://nothing"):
        prepare("memory://nothing", name="none")
    with pytest.raises(CorpusError, match="nosuch://x"):
        prepare("nosuch://x", name="none")


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "tokenizer"])
def test_prep_rebuilds_a_damaged_finished_folder(
    prepare: Prepare, corpus: Path, tmp_path: Path, folder_bytes: FolderBytes, harm: str
) -> None:
    settings = {"val_split": 0.2, "shard_tokens": 5_000}
    first = prepare(corpus, **settings)
    before = folder_bytes(tmp_path / "out")
    name = first.manifest.tokenizer.file if harm == "tokenizer" else first.manifest.train.shards[-1].file
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1000])
    else:
        path.unlink()
    assert not prepare(corpus, **settings).was_done
    assert folder_bytes(tmp_path / "out") == before
    assert prepare(corpus, **settings).was_done


def test_prep_leaves_a_finished_folder_unchanged(
    prepare: Prepare, corpus: Path, tmp_path: Path, folder_bytes: FolderBytes, tokenizer_path: Path
) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    (copy / "a.txt").write_bytes((corpus / "00.txt").read_bytes())
    (copy / "b.txt").write_bytes((corpus / "01.txt").read_bytes())
    first = prepare(copy)
    before = folder_bytes(tmp_path / "out")
    (tmp_path / "out" / ".work").mkdir()  # killed just after the manifest was written
    again = prepare(copy, n_workers=2)
    assert again.was_done
    assert not first.was_done
    assert again.manifest == first.manifest
    assert folder_bytes(tmp_path / "out") == before
    with pytest.raises(ConfigError, match=r"min_characters: 1 then, 9 now"):
        prepare(copy, min_chars=9)
    with pytest.raises(ConfigError, match="part: 1/1 then, 1/2 now"):
        prepare(copy, part=(1, 2))
    content = (copy / "b.txt").read_bytes()
    (copy / "b.txt").write_bytes(content[::-1])
    with pytest.raises(ConfigError, match=r"b\.txt: its content changed"):
        prepare(copy)
    (copy / "b.txt").write_bytes(content)  # newer than the manifest, and the same
    assert prepare(copy).was_done
    (copy / "c.txt").write_text("more")
    with pytest.raises(ConfigError, match=r"c\.txt: not part of the corpus then"):
        prepare(copy)
    assert folder_bytes(tmp_path / "out") == before


def test_two_preparations_of_one_folder_are_one_too_many(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path / "out"), pytest.raises(StorageError, match=r"is using .*out; .* with --out"):
        prepare(corpus)


def fork_to_prepare(sources: list[Path], tokenizer: Path, out: Path, said: Path) -> int:
    """Prepare in a fork of this process, which has everything imported, and return its id; stderr goes to ``said``."""
    said.touch()
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(said, os.O_WRONLY), 2)
        settings = PrepSettings(val_split=0.1, shard_tokens=3_000)
        prepare_corpus(list(map(str, sources)), tokenizer, out, settings, n_workers=2, chunk_bytes=2000)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise
    finally:
        os._exit(0)


@pytest.mark.slow
def test_prep_resumed_after_kills_gives_equal_bytes(
    prepare: Prepare, corpus: Path, tokenizer_path: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    """Killed twenty times at random: while encoding, deduplicating, and between shards and manifest."""
    prepare(corpus, name="straight", val_split=0.1, shard_tokens=3_000, chunk_bytes=2000)
    expected = folder_bytes(tmp_path / "straight")
    source = random.Random(20)
    moments = Counter[str]()
    for kill in range(20):
        # Each preparation is killed while encoding, resumed, and killed again while writing shards.
        out = tmp_path / f"killed{kill // 2}"
        is_second = bool(kill % 2)
        n_pieces, n_shards = source.randrange(1, 12), source.randrange(12)
        began, said = time.time(), tmp_path / f"said{kill}.txt"
        child, ended = fork_to_prepare([corpus], tokenizer_path, out, said), (0, 0)
        while ended == (0, 0) and not (
            _n_new_shards(out, began) > n_shards if is_second else len(list(out.glob(".work/piece_*"))) >= n_pieces
        ):
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        assert said.read_text() == ""
        if ended[1]:
            moments["shards" if _n_new_shards(out, began) else "pieces"] += 1
        if is_second:
            prepare(corpus, name=out.name, val_split=0.1, shard_tokens=3_000, chunk_bytes=2000)
            assert folder_bytes(out) == expected
    assert min(moments["pieces"], moments["shards"]) >= 2, moments


def _n_new_shards(out: Path, began: float) -> int:
    return sum(path.stat().st_mtime > began for path in out.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_prep_resumes_after_signal(tmp_path: Path, signal_number: signal.Signals) -> None:
    """Standard input that stays open keeps the command at work for as long as the signal takes to come."""
    out = tmp_path / "out"
    tokenizer_path = fit_tokenizer(["any text"], "simple", 300).save(tmp_path / "tokenizer.json")  # the quickest
    arguments = [sys.executable, "-m", "psannlm", "prep", "-", "--per-line", "--tokenizer", str(tokenizer_path)]
    arguments += ["--out", str(out), "--workers", "1", "--json"]
    content = b"".join(b"the value of object %d is an object\n" % number for number in range(110_000))
    # A chunk is handed over when it is full, which the second block that is read makes it.
    begin = 2 * content
    assert len(begin) > 8 << 20
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(begin)
    process.stdin.flush()
    patience = time.monotonic() + 60
    while not list(out.glob(".work/piece_*")):
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal_number)
    said = process.communicate(content, timeout=60)[1].decode()
    assert process.returncode == 130
    assert "interrupted after" in said
    assert "run the same command to resume" in said
    assert "Traceback" not in said
    if signal_number == signal.SIGTERM:
        return  # once is enough
    again = subprocess.run(arguments, input=begin + content, capture_output=True, check=True)
    assert b"resuming the preparation" in again.stderr
    assert json.loads(again.stdout)["train"]["documents"] > 100_000


@pytest.mark.slow
def test_prep_killed_worker_error_is_one_line(
    prepare: Prepare, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_bytes: FolderBytes
) -> None:
    from psannlm.errors import WorkerError
    from psannlm.prep import pool

    original = pool._Worker.ask
    asked = []

    def ask(self: pool._Worker, chunk: object) -> dict[str, object]:
        asked.append(chunk)
        if len(asked) == 5:
            self.process.kill()
        return original(self, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(pool._Worker, "ask", ask)
    with pytest.raises(WorkerError, match=r"SIGKILL.*memory runs out.*run the same command to resume") as caught:
        prepare(corpus, n_workers=2)
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "out" / ".work").glob("piece_*"))) >= 3
    prepare(corpus, n_workers=2)
    prepare(corpus, name="straight")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")


def test_prep_refuses_work_of_other_settings(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_bytes((corpus / "00.txt").read_bytes())
    (tmp_path / "c" / "b.jsonl").write_text("not JSON\n")
    with pytest.raises(CorpusError, match=r"b\.jsonl:1: not JSON"):
        prepare(tmp_path / "c", chunk_bytes=300)
    assert list((tmp_path / "out" / ".work").glob("piece_*"))
    with pytest.raises(ConfigError, match=r"--min-chars: 1 then, 2 now"):
        prepare(tmp_path / "c", chunk_bytes=300, min_chars=2)
    (tmp_path / "c" / "b.jsonl").write_text('{"text": "repaired"}\n')
    with pytest.raises(ConfigError, match=r"b\.jsonl: 9 bytes then, 21 bytes now[\s\S]*to start from scratch"):
        prepare(tmp_path / "c", chunk_bytes=300)


@pytest.mark.slow
def test_prep_encodes_a_damaged_chunk_again(
    prepare: Prepare, corpus: Path, tmp_path: Path, folder_bytes: FolderBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psannlm.errors import PsannlmError

    prepare(corpus, name="straight")
    with monkeypatch.context() as patch:
        patch.setattr("psannlm.prep.output.write_manifest", lambda *_: (_ for _ in ()).throw(PsannlmError("stopped")))
        with pytest.raises(PsannlmError, match="stopped"):
            prepare(corpus)
    pieces = sorted((tmp_path / "out" / ".work").glob("piece_*"))
    for number, piece in enumerate(pieces[:6]):
        content = bytearray(piece.read_bytes())
        content[len(content) * number // 6] ^= 1
        piece.write_bytes(content[: len(content) - (number == 5)])
    pieces[7].unlink()
    (tmp_path / "out" / ".work" / ".psannlm-0123456789abcdef.tmp").mkdir()  # a kill before anything was written
    prepare(corpus)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")


@pytest.mark.slow
def test_prep_manifest_records_its_settings(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, val_split=0.25, seed=7, min_chars=4, max_chars=90_000, keep_duplicates=True, errors="replace")
    settings = read_manifest(tmp_path / "out").settings
    assert (settings.val_split, settings.seed, settings.min_characters, settings.max_characters) == (0.25, 7, 4, 90_000)
    assert (settings.dedupe, settings.errors, settings.per_line, settings.text_key) == (False, "replace", False, "text")
