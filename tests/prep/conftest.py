"""A small corpus of all formats, and a fixture that prepares it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from psannlm.data.corpus.documents import builtin_documents
from psannlm.data.manifest import read_manifest
from psannlm.data.shard_file import open_shard
from psannlm.prep.job import PrepSettings
from psannlm.prep.pipeline import PrepResult, prepare_corpus
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer, load_tokenizer

Prepare = Callable[..., PrepResult]
FolderBytes = Callable[[Path], dict[str, str]]
DocumentsIn = Callable[..., list[tuple[str, int, int]]]


@pytest.fixture(scope="session")
def topics() -> list[str]:
    """A dozen texts of a few kilobytes, and some that ask for trouble."""
    texts = [document.text for document in builtin_documents()][:12]
    return [
        *texts,
        "naïve Ærøskøbing 日本語 ▁▁ \uf8f0",
        "line one\r\nline two\u2028still two",
        "x" * 50,
        "\0 NUL </s> \t",
    ]


@pytest.fixture(scope="session")
def tokenizer_path(topics: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_tokenizer(topics, "sentencepiece", 400).save(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="session")
def corpus(topics: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text in several kinds of file, so that most of them are there more than once."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(topics):
        (folder / f"{number:02d}.txt").write_bytes(text.encode("utf-8"))
    paragraphs = [paragraph for text in topics for paragraph in text.split("\n\n") if paragraph.strip()]
    lines = "".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)
    (folder / "paragraphs.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(folder / "topics.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in topics))
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": [text[::-1] for text in topics], "n": list(range(len(topics)))})
        pyarrow.parquet.write_table(table, folder / "z.parquet")
    return folder


@pytest.fixture
def prepare(tokenizer_path: Path, tmp_path: Path) -> Prepare:
    """Prepare sources into ``tmp_path/name`` with small chunks; keywords are those of ``PrepSettings``."""

    def run(
        *sources: Path | str,
        name: str = "out",
        n_workers: int = 1,
        part: tuple[int, int] | None = None,
        chunk_bytes: int = 5_000,
        tokenizer: Path = tokenizer_path,
        **settings: object,
    ) -> PrepResult:
        return prepare_corpus(
            [str(source) for source in sources],
            tokenizer,
            tmp_path / name,
            PrepSettings(**settings),  # type: ignore[arg-type]
            n_workers=n_workers,
            part=part,
            chunk_bytes=chunk_bytes,
        )

    return run


@pytest.fixture(scope="session")
def folder_bytes() -> FolderBytes:
    """Return the hash of every file in a folder, hidden ones and folders within it among them."""

    def read(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in folder.rglob("*")
        }

    return read


def _documents(folder: Path, side: str) -> Iterator[tuple[str, int, int]]:
    manifest = read_manifest(folder)
    tokenizer: Tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    for entry in getattr(manifest, side).shards:
        shard = open_shard(folder / entry.file, entry, manifest.tokenizer.fingerprint)
        starts = shard.starts(0, shard.n_documents + 1)
        for number, hashed in enumerate(shard.hashes(0, shard.n_documents)):
            ids = shard.tokens(int(starts[number]), int(starts[number + 1]))
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not np.isin(ids[1:-1], list(tokenizer.special_ids)).any()
            text = tokenizer.decode(ids[1:-1].tolist())
            assert hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest() == hashed.tobytes()
            n_bytes = int(shard.n_bytes(number, number + 1)[0])
            assert n_bytes == len(text.encode("utf-8"))
            yield text, n_bytes, int(shard.origins(number, number + 1)[0])


@pytest.fixture(scope="session")
def documents_in() -> DocumentsIn:
    """Return (text, bytes, origin) of every document of one side, or of both, decoded from its tokens."""

    def read(folder: Path, side: str | None = None) -> list[tuple[str, int, int]]:
        sides = ("train", "validation") if side is None else (side,)
        return [document for each in sides for document in _documents(folder, each)]

    return read
