"""``prep`` and ``train`` give the same tokens and the same split as ``train`` alone."""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psannlm.config.data import DataConfig
from psannlm.data.prepare import PreparedData, load_corpus
from psannlm.data.split import SEGMENT_BYTES
from psannlm.data.stream import Stream
from psannlm.errors import CorpusError
from psannlm.prep.job import PrepSettings
from psannlm.prep.pipeline import prepare_corpus

WORDS = ["wave", " ", "\n", "\n\n", "日本語", "🌊", "é", "\r\n", "\u2028", "a", "sine rises,\nand falls "]
# Around the sizes at which chunks, segments and halves of segments end.
EDGES = [SEGMENT_BYTES // 2, SEGMENT_BYTES, 2 * SEGMENT_BYTES, 5_000, 4096]


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Return a text: short ones of anything, now and then one about as long as something inside may hold."""
    text = "".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30)))
    if draw(st.integers(0, 3)) == 0:
        n_bytes = draw(st.sampled_from(EDGES)) + draw(st.integers(-5, 5))
        content = (text.encode() * (n_bytes // len(text.encode()) + 1))[:n_bytes]
        text = content.decode("utf-8", "ignore")
    return text + draw(st.sampled_from(["", "\n", "x"]))


def pack(folder: Path, name: str, content: bytes, packing: str) -> None:
    if packing == ".gz":
        content = gzip.compress(content, 1)
    elif packing == ".zst":
        content = pytest.importorskip("zstandard").compress(content, 1)
    (folder / f"{name}{packing}").write_bytes(content)


def write(folder: Path, texts: list[str], kind: str, packing: str, *, ends: bool) -> None:
    """Write a corpus; ``ends``: the last line of a list of records has a newline."""
    if kind == ".txt":
        for number, text in enumerate(texts):
            pack(folder, f"{number:03d}.txt", text.encode(), packing)
    elif kind == ".jsonl":
        lines = "\n".join(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts))
        pack(folder, "all.jsonl", (lines + "\n" * ends).encode(), packing)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        column = arrow.array(texts, arrow.large_string() if ends else arrow.string())
        parquet.write_table(arrow.table({"text": column}), folder / "all.parquet", row_group_size=2)


def ids(stream: Stream | None) -> list[list[int]]:
    if stream is None:
        return []
    starts = stream.starts(0, stream.n_documents + 1) if len(stream.segments) == 1 else None
    assert starts is not None
    tokens = np.asarray(stream.segments[0].tokens(0, stream.n_framed_tokens))
    return [tokens[start:stop].tolist() for start, stop in itertools.pairwise(starts)]


def read(folder: Path, tokenizer: Path | None, val_split: float) -> PreparedData:
    data = DataConfig(
        sources=[str(folder)],
        tokenizer_model_path=None if tokenizer is None else str(tokenizer),
        val_split=val_split,
        max_length=8,
    )
    return load_corpus(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("corpora")


def agree(
    texts: list[str],
    kind: str,
    packing: str,
    ends: bool,
    val_split: float,
    chunk_bytes: int,
    tokenizer_path: Path,
    folders: Path,
) -> None:
    """Hold what ``prep`` makes of a corpus against what training makes of it alone."""
    folder = Path(tempfile.mkdtemp(dir=folders))
    (folder / "corpus").mkdir()
    write(folder / "corpus", texts, kind, packing, ends=ends)
    try:
        alone = read(folder / "corpus", tokenizer_path, val_split)
    except CorpusError:  # blank, or one document too short to be cut: refused on both ways
        with pytest.raises(CorpusError):
            prepare_corpus(
                [str(folder / "corpus")], tokenizer_path, folder / "out", PrepSettings(val_split=val_split), n_workers=1
            )
        return
    prepare_corpus(
        [str(folder / "corpus")],
        tokenizer_path,
        folder / "out",
        PrepSettings(val_split=val_split),
        n_workers=1,
        chunk_bytes=chunk_bytes,
    )
    prepared = read(folder / "out", None, 0.0)
    assert ids(prepared.train) == ids(alone.train)
    assert ids(prepared.val) == ids(alone.val)
    assert prepared.train.n_bytes == alone.train.n_bytes
    assert prepared.report.bytes == alone.report.bytes
    kept = [text for text in texts if text.strip()]
    n_val = 0 if alone.val is None else alone.val.n_bytes
    assert alone.train.n_bytes + n_val == sum(len(text.encode()) for text in kept)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(documents(), min_size=1, max_size=12, unique=True),
    kind=st.sampled_from([".txt", ".jsonl", ".parquet"]),
    packing=st.sampled_from(["", ".gz", ".zst"]),
    ends=st.booleans(),
    val_split=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
    chunk_bytes=st.sampled_from([5_000, SEGMENT_BYTES, 1 << 22]),
)
def test_prep_and_train_agree_on_every_corpus(
    texts: list[str],
    kind: str,
    packing: str,
    ends: bool,
    val_split: float,
    chunk_bytes: int,
    tokenizer_path: Path,
    folders: Path,
) -> None:
    agree(texts, kind, packing, ends, val_split, chunk_bytes, tokenizer_path, folders)


@pytest.mark.slow
@pytest.mark.parametrize("val_split", [0.0, 0.5])
@pytest.mark.parametrize("texts", [[" " * 6_000, "wave" * 2_000, "tide"], ["tide", " \n" * 9_000, "wave" * 2_000]])
def test_prep_chunk_of_blank_text_is_left_out(
    texts: list[str], val_split: float, tokenizer_path: Path, folders: Path
) -> None:
    agree(texts, ".txt", "", False, val_split, 5_000, tokenizer_path, folders)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("texts", [["waves" * 60_000], ["waves" * 60_000, "日本語" * 60_000, "short"]], ids=len)
def test_prep_and_train_cut_words_alike(texts: list[str], kind: str, tokenizer_path: Path, folders: Path) -> None:
    """Without white space segments are cut within words, and have other ids than the whole."""
    agree(texts, kind, "", True, 0.5, 5_000, tokenizer_path, folders)
