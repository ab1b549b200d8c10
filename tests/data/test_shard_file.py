"""Shard files: round trip and detection of damage."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from psannlm.data import shard_file
from psannlm.data.framing import DocumentBatch, frame, pack_origin, text_hash, unpack_origin
from psannlm.data.shard_file import BLOCK_BYTES, Shard, ShardEntry, open_shard, write_shard
from psannlm.errors import ArtifactError

BOS, EOS = 1, 2
ARRAYS = ("starts", "n_bytes", "origins", "hashes", "tokens")
PRINT = "ab" * 32
FIELDS = ("lengths", "n_bytes", "hashes", "origins")


def batch_of(documents: Sequence[Sequence[int]], first: int = 0, dtype: type = np.uint16) -> DocumentBatch:
    ids = np.concatenate([np.asarray(d, dtype=np.int64) for d in documents] or [np.zeros(0, np.int64)])
    lengths = np.asarray([len(d) for d in documents], dtype=np.int64)
    tokens, framed = frame(ids, lengths, bos_id=BOS, eos_id=EOS, dtype=dtype)
    return DocumentBatch(
        tokens,
        framed,
        lengths * 3,
        np.frombuffer(b"".join(text_hash(str(list(d)).encode()) for d in documents), np.uint8).reshape(-1, 16),
        np.asarray([pack_origin(0, first + i + 1) for i in range(len(documents))], dtype=np.int64),
    )


def write(path: Path, documents: Sequence[Sequence[int]], batch: int = 7, dtype: type = np.uint16) -> ShardEntry:
    def batches() -> Iterator[DocumentBatch]:
        for start in range(0, len(documents), batch):
            yield batch_of(documents[start : start + batch], start, dtype)

    n_tokens = sum(len(d) + 2 for d in documents)
    return write_shard(
        path, dtype=dtype, fingerprint=PRINT, n_tokens=n_tokens, n_documents=len(documents), batches=batches()
    )


def some_documents(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 60_000) for _ in range(source.randrange(longest))] for _ in range(n)]


def read_all(shard: Shard) -> None:
    shard.tokens(0, shard.n_framed_tokens)
    shard.starts(0, shard.n_documents + 1)
    shard.n_bytes(0, shard.n_documents)
    shard.origins(0, shard.n_documents)
    shard.hashes(0, shard.n_documents)
    shard.length_counts()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_shard_roundtrip(tmp_path: Path, dtype: type, n: int) -> None:
    documents = some_documents(n, 30)
    path = tmp_path / "train_00000.safetensors"
    entry = write(path, documents, dtype=dtype)
    shard = open_shard(path, entry, PRINT)
    whole = batch_of(documents, dtype=dtype)
    assert shard.dtype == dtype
    assert shard.tokens(0, shard.n_framed_tokens).tolist() == whole.tokens.tolist()
    assert np.diff(shard.starts(0, n + 1)).tolist() == whole.lengths.tolist()
    assert shard.starts(0, 1).tolist() == [0]
    assert shard.n_bytes(0, n).tolist() == whole.n_bytes.tolist()
    assert shard.hashes(0, n).tolist() == whole.hashes.tolist()
    assert [unpack_origin(o) for o in shard.origins(0, n).tolist()] == [(0, i + 1) for i in range(n)]
    assert entry == ShardEntry(
        path.name,
        len(whole.tokens),
        n,
        int(whole.n_bytes.sum()),
        path.stat().st_size,
        entry.header_and_sums_sha256,
    )


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    documents = some_documents(40, 30)
    entry = write(tmp_path / "s", documents)
    shard = open_shard(tmp_path / "s", entry, PRINT)
    with safe_open(tmp_path / "s", framework="np") as file:
        assert set(file.keys()) == {*ARRAYS, "lengths", "length_counts", "block_sha256"}
        for name in ARRAYS:
            n = {"tokens": shard.n_framed_tokens, "starts": 41}.get(name, 40)
            assert file.get_tensor(name).tolist() == getattr(shard, name)(0, n).tolist()
        lengths = sorted({len(d) + 2 for d in documents})
        assert file.get_tensor("lengths").tolist() == shard.length_counts()[0].tolist() == lengths
        assert file.get_tensor("length_counts").tolist() == shard.length_counts()[1].tolist()
        assert int(file.get_tensor("length_counts").sum()) == 40
        assert file.metadata()["tokenizer_fingerprint"] == PRINT


def test_how_documents_are_batched_leaves_no_trace(tmp_path: Path) -> None:
    documents = some_documents(40, 30)
    entries = {dataclasses.replace(write(tmp_path / str(n), documents, n), file="") for n in (1, 7, 40)}
    assert len(entries) == 1
    assert len({(tmp_path / str(n)).read_bytes() for n in (1, 7, 40)}) == 1


def test_a_document_may_come_in_several_batches(tmp_path: Path) -> None:
    """One that is longer than memory ends in a later batch than it begins in."""
    documents = some_documents(9, 30, seed=1)
    write(tmp_path / "whole", documents)
    whole = batch_of(documents)
    ends = np.cumsum(whole.lengths)

    def batches() -> Iterator[DocumentBatch]:
        for start in range(0, len(whole.tokens), 11):
            stop = min(start + 11, len(whole.tokens))
            here = (ends > start) & (ends <= stop)
            fields = (getattr(whole, name)[here] for name in FIELDS)
            yield DocumentBatch(whole.tokens[start:stop], *fields)

    sizes = {"n_tokens": len(whole.tokens), "n_documents": len(documents)}
    write_shard(tmp_path / "cut", dtype=np.uint16, fingerprint=PRINT, batches=batches(), **sizes)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    early = dataclasses.replace(whole, tokens=whole.tokens[: len(whole.tokens) // 2])
    rest = DocumentBatch(whole.tokens[len(early.tokens) :], *(getattr(batch_of([]), n) for n in FIELDS))
    with pytest.raises(ValueError, match="documents end at token"):
        write_shard(tmp_path / "bad", dtype=np.uint16, fingerprint=PRINT, batches=[early, rest], **sizes)


def test_every_size_has_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 96)
    for n in range(1, 2000, 17):
        entry = write(tmp_path / "s", [range(n)])
        open_shard(tmp_path / "s", entry, PRINT).verify()


def test_write_shard_wrong_sizes_leave_no_file(tmp_path: Path) -> None:
    batch = batch_of([[5, 6], [7]])
    for n_tokens, n_documents in ((7, 1), (6, 2), (8, 2), (7, 3)):
        with pytest.raises(ValueError, match="the batches"):
            write_shard(
                tmp_path / "s",
                dtype=np.uint16,
                fingerprint=PRINT,
                n_tokens=n_tokens,
                n_documents=n_documents,
                batches=[batch],
            )
    assert list(tmp_path.iterdir()) == []


def test_shard_bit_flips_are_detected_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 1 << 14)
    path = tmp_path / "s"
    entry = write(path, some_documents(1500, 250), batch=500)
    content = bytearray(path.read_bytes())
    assert len(content) > 20 * (1 << 14)
    chance = random.Random(7)
    for _ in range(1000):
        at, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"s (is|was|has|holds|records)"):
            read_all(open_shard(path, entry, PRINT))
        content[at] ^= bit
    path.write_bytes(content)
    read_all(open_shard(path, entry, PRINT))


def test_shard_checks_only_blocks_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "s"
    entry = write(path, [np.arange(BLOCK_BYTES * 2) % 50_000])  # type: ignore[list-item]
    content = bytearray(path.read_bytes())
    content[3 * BLOCK_BYTES] ^= 1
    path.write_bytes(content)
    shard = open_shard(path, entry, PRINT)
    assert shard.tokens(0, 100).tolist() == [BOS, *range(99)]
    with pytest.raises(ArtifactError, match=f"damaged between bytes {3 * BLOCK_BYTES:,} and"):
        shard.tokens(BLOCK_BYTES, 2 * BLOCK_BYTES)
    with pytest.raises(ArtifactError, match="damaged"):
        shard.verify()


def test_every_length_but_the_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    entry = write(path, some_documents(5, 20))
    content = path.read_bytes()
    for length in (*range(16), *range(16, 2048, 97), *range(2048, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"cut short|damaged|no safetensors"):
            open_shard(path, entry, PRINT)
    path.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="1 bytes too long"):
        open_shard(path, entry, PRINT)


def test_open_shard_missing_swapped_or_foreign_raises(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    documents = some_documents(20, 30)
    entry = write(one, documents)
    twin = write(other, [[i + 1 for i in d] for d in documents])
    assert (twin.tokens, twin.file_bytes) == (entry.tokens, entry.file_bytes)
    with pytest.raises(ArtifactError, match="one is damaged, or is another shard than the manifest names"):
        open_shard(one, twin, PRINT)
    longer = write(other, some_documents(21, 30))
    with pytest.raises(ArtifactError, match="one is another shard than the manifest names, which has 21 documents"):
        open_shard(one, longer, PRINT)
    with pytest.raises(ArtifactError, match=f"'{PRINT}', the folder's '{'cd' * 32}'. Restore it"):
        open_shard(one, entry, "cd" * 32)
    one.unlink()
    with pytest.raises(ArtifactError, match=r"one is missing.*psannlm prep again"):
        open_shard(one, entry, PRINT)


def test_shard_arbitrary_headers_raise_artifact_error(tmp_path: Path) -> None:
    """Thousands of broken headers: each an ArtifactError, and nothing allocated that the file does not hold."""
    path = tmp_path / "s"
    entry = write(path, some_documents(3, 20))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    chance = random.Random(3)
    values = [None, -1, 1 << 62, 1 << 80, 1e308, "x", [], {}, [0], [0, 1 << 60], True, "U64"]
    for _ in range(1000):
        broken = json.loads(json.dumps(fields))
        name = chance.choice(list(broken))
        if chance.random() < 0.3:
            broken[name] = chance.choice(values)
        else:
            broken[name][chance.choice(list(broken[name]))] = chance.choice(values)
        text = json.dumps(broken).encode()
        claimed = len(text) if chance.random() < 0.9 else chance.randrange(1 << 63)
        path.write_bytes(struct.pack("<Q", claimed) + text + content[8 + length :])
        with pytest.raises(ArtifactError):
            open_shard(path, entry, PRINT)


@pytest.mark.slow
def test_shard_documents_at_verifies_its_blocks(tmp_path: Path) -> None:
    """The binary search may step on a damaged block; what it answers is right, or it raises."""
    path = tmp_path / "s"
    documents = some_documents(100_000, 3)
    entry = write(path, documents, batch=5000)
    places = np.random.default_rng(0).integers(0, entry.tokens, 200)
    right = np.repeat(np.arange(len(documents)), [len(d) + 2 for d in documents])[places]
    assert open_shard(path, entry, PRINT).documents_at(places).tolist() == right.tolist()
    content = bytearray(path.read_bytes())
    chance = random.Random(1)
    said: set[str] = set()
    for _ in range(40):
        at, bit = 2048 + chance.randrange(8 * len(documents)), 1 << chance.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        shard = open_shard(path, entry, PRINT)
        for place, document in zip(places.tolist(), right.tolist(), strict=True):
            try:
                assert shard.documents_at(np.array([place])).tolist() == [document]
            except ArtifactError as error:
                said.add(str(error).partition(" between")[0])
        content[at] ^= bit
    assert said == {f"{path} is damaged"}


def test_shard_with_overlapping_documents_raises(tmp_path: Path) -> None:
    """Sums vouch for bytes, not for whoever wrote them: a search that cannot be shown to be right is an error."""
    path = tmp_path / "s"
    shard = open_shard(path, write(path, some_documents(50, 9)), PRINT)
    shard.verify()
    shard._starts = np.full_like(shard._starts, shard.n_framed_tokens)
    with pytest.raises(ArtifactError, match=r"s is inconsistent"):
        shard.documents_at(np.array([3]))


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_00000.safetensors"
    documents = some_documents(3, 30)
    entry = write(path, documents, dtype=np.uint32)
    largest = int(batch_of(documents, dtype=np.uint32).tokens.max())
    read_all(open_shard(path, entry, PRINT, largest + 1))
    with pytest.raises(ArtifactError, match=f"token id {largest:,}"):
        read_all(open_shard(path, entry, PRINT, largest))


@pytest.mark.parametrize("largest", [1 << 31, (1 << 32) - 1])
def test_shard_ids_at_dtype_maximum_raise(tmp_path: Path, largest: int) -> None:
    batch = batch_of(some_documents(3, 30), dtype=np.uint32)
    batch.tokens[7] = largest
    path = tmp_path / "train_00000.safetensors"
    entry = write_shard(
        path,
        dtype=np.uint32,
        fingerprint=PRINT,
        n_tokens=len(batch.tokens),
        n_documents=len(batch.lengths),
        batches=[batch],
    )
    with pytest.raises(ArtifactError, match=f"token id {largest:,}, and its tokenizer has 300 ids"):
        read_all(open_shard(path, entry, PRINT, 300))
