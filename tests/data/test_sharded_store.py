"""Windows over shards equal windows over memory, for any sizes of shards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data import shard_file, unpacked
from psannlm.data.framing import DocumentBatch, frame, pack_origin
from psannlm.data.loader import Loader, Position
from psannlm.data.memory_store import InMemoryTokens, store_from_ids
from psannlm.data.shard_file import open_shard, write_shard
from psannlm.data.sharded_store import ShardedTokens
from psannlm.data.windows import Windows
from psannlm.errors import ArtifactError

PAD, BOS, EOS = 0, 1, 2
PRINT = "ab" * 32


def in_memory(lengths: Sequence[int]) -> InMemoryTokens:
    chance = np.random.default_rng(len(lengths))
    # Specials among the ids: a tokenizer made elsewhere may use them as words.
    documents = [chance.integers(0, 50, n).tolist() for n in lengths]
    return store_from_ids(documents, 300, bos_id=BOS, eos_id=EOS, doc_bytes=[3 * n for n in lengths])


def in_shards(folder: Path, store: InMemoryTokens, sizes: Sequence[int]) -> ShardedTokens:
    """The same documents in shards of ``sizes`` documents, in turn."""
    shards, first = [], 0
    while first < store.n_documents or not shards:
        last = min(first + sizes[len(shards) % len(sizes)], store.n_documents)
        ids = [store.document(d) for d in range(first, last)]
        tokens, lengths = frame(
            np.concatenate([np.zeros(0, np.uint16), *ids]),
            np.array([len(i) for i in ids], dtype=np.int64),
            bos_id=BOS,
            eos_id=EOS,
            dtype=np.uint16,
        )
        origins = np.array([pack_origin(d % 2, d // 2) for d in range(first, last)], dtype=np.int64)
        n = last - first
        batch = DocumentBatch(tokens, lengths, store.doc_bytes[first:last], np.zeros((n, 16), np.uint8), origins)
        path = folder / f"train_{len(shards):05d}.safetensors"
        entry = write_shard(
            path, dtype=np.uint16, fingerprint=PRINT, n_tokens=len(tokens), n_documents=n, batches=[batch]
        )
        shards.append(open_shard(path, entry, PRINT))
        first = last
    return ShardedTokens(shards, ["a.txt", "b.jsonl"])


ragged = st.lists(st.integers(0, 30) | st.sampled_from([0, 1, 200]), max_size=14)


@pytest.mark.slow
@given(
    lengths=ragged,
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seq_len=st.integers(1, 40),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("pack", [True, False])
def test_windows_over_shards_are_windows_over_memory(
    pack: bool, lengths: list[int], sizes: list[int], seq_len: int, data: st.DataObject
) -> None:
    store = in_memory(lengths)
    with tempfile.TemporaryDirectory() as folder, patch.object(unpacked, "_BLOCK_DOCUMENTS", 3):
        shards = in_shards(Path(folder), store, sizes)
        assert (shards.n_tokens, shards.n_bytes, shards.n_documents) == (
            store.n_tokens,
            store.n_bytes,
            store.n_documents,
        )
        assert [a.tolist() for a in shards.length_counts()] == [a.tolist() for a in store.length_counts()]
        assert shards.starts(0, store.n_documents + 1).tolist() == store.offsets.tolist()
        one, other = (Windows(s, seq_len, pad_id=PAD, pack=pack) for s in (store, shards))
        assert len(one) == len(other)
        assert one.n_labels == other.n_labels
        wanted = data.draw(st.lists(st.integers(0, len(one) - 1), max_size=8)) if len(one) else []
        for indices in (range(len(one)), wanted):
            for a, b in zip(one.batch(indices), other.batch(indices), strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=14),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seq_len=st.integers(1, 12),
    pack=st.booleans(),
    world=st.integers(1, 4),
    other_world=st.integers(1, 4),
    workers=st.integers(1, 3),
    batch=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_epoch_has_every_token_once_in_any_setup(
    lengths: list[int],
    sizes: list[int],
    seq_len: int,
    pack: bool,
    world: int,
    other_world: int,
    workers: int,
    batch: int,
    data: st.DataObject,
) -> None:
    """Ranks x workers x the step at which the run was cut and went on with other ranks x shard sizes x T."""
    ends = np.cumsum([4, *lengths])
    numbered = [range(a, b) for a, b in pairwise(ends.tolist())]  # no id stands twice
    store = store_from_ids(numbered, 1 << 16, bos_id=BOS, eos_id=EOS)
    with tempfile.TemporaryDirectory() as folder:
        windows = Windows(in_shards(Path(folder), store, sizes), seq_len, pad_id=PAD, pack=pack)

        def epoch(world: int, position: Position, n_steps: int) -> tuple[list[int], Position]:
            counted: list[int] = []
            after = position
            for rank in range(world):
                loader = Loader(windows, batch, rank=rank, world_size=world, num_workers=workers)
                for step in islice(loader.steps(position), n_steps):
                    after = step.after
                    for part in step.micro_batches:
                        counted += part.labels[part.labels != IGNORE_INDEX].tolist()
            return counted, after

        per_epoch = -(-len(windows) // (batch * world))
        done = data.draw(st.integers(0, per_epoch))
        first, position = epoch(world, Position(), done)
        rest = []
        if position.epoch == 0:
            left = len(windows) - position.window
            rest, position = epoch(other_world, position, -(-left // (batch * other_world)))
        assert position == Position(1, 0)
        assert sorted(first + rest) == [EOS] * len(lengths) + list(range(4, int(ends[-1])))


@pytest.mark.slow
def test_many_documents_are_found_through_their_blocks(tmp_path: Path) -> None:
    """With the real sizes of blocks: more documents than are summed up at a time."""
    lengths = (
        np.random.default_rng(1).integers(0, 6, unpacked._BLOCK_DOCUMENTS * unpacked._BLOCKS_AT_ONCE + 700).tolist()
    )
    store = in_memory(lengths)
    shards = in_shards(tmp_path, store, [1000, len(lengths)])
    one, other = (Windows(s, 3, pad_id=PAD, pack=False) for s in (store, shards))
    for indices in (np.random.default_rng(2).integers(0, len(one), 500), [0, len(one) - 1]):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(indices), other.batch(indices), strict=True))
    # Against a third reckoning, without blocks or tables.
    first = np.concatenate([[0], np.cumsum((np.array(lengths) + 1 + 2) // 3)])
    assert len(one) == first[-1]
    document = 131_500
    ids = one.batch([int(first[document])])[0][0]
    assert ids.tolist()[: min(3, lengths[document] + 2)] == [BOS, *store.document(document), EOS][:3]


def test_windows_describe_their_source_line(tmp_path: Path) -> None:
    shards = in_shards(tmp_path, in_memory([3, 1, 1, 9]), [3, 1])
    packed, single = (Windows(shards, 12, pad_id=PAD, pack=pack) for pack in (True, False))
    assert packed.describe(0) == "window 0: from a.txt to b.jsonl:1 and 2 more between them"
    assert packed.describe(1) == "window 1: b.jsonl:1, tokens 1 to 10 of 11"
    assert single.describe(2) == "window 2: a.txt:1, tokens 0 to 2 of 3"


@pytest.mark.parametrize("pack", [True, False])
def test_no_flipped_bit_becomes_a_token(tmp_path: Path, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is flipped behind the header, a window is right or it raises."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 512)
    store = in_memory([int(n) for n in np.random.default_rng(0).integers(0, 40, 120)])
    shards = in_shards(tmp_path, store, [50])
    right = Windows(store, 16, pad_id=PAD, pack=pack)
    whole = right.batch(range(len(right)))
    path = shards.segments[1].path
    content = bytearray(path.read_bytes())
    said: set[str] = set()
    n_raised = 0
    for at in range(2048, len(content) - 32 * 20, 23):
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        content[at] ^= 1 << at % 8
        middle = open_shard(path, shards.segments[1].entry, PRINT)
        damaged = ShardedTokens([shards.segments[0], middle, shards.segments[2]], ["a", "b"])
        try:
            windows = Windows(damaged, 16, pad_id=PAD, pack=pack)
            assert len(windows) == len(right)
            found = windows.batch(range(len(right)))
        except ArtifactError as error:
            said.add(str(error).partition(" between")[0])
            n_raised += 1
            continue
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
    assert said == {f"{path} is damaged"}
    assert n_raised > 100
