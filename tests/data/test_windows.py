"""Training windows: every token is a label exactly once, packed and unpacked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.dataset import LMDataset
from psannlm.data.memory_store import InMemoryTokens, store_from_ids
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError

PAD, BOS, EOS = 0, 1, 2
FIRST_ID = 4


def numbered(lengths: list[int]) -> InMemoryTokens:
    """Documents of these lengths in which no id stands twice, so that a label tells where it comes from."""
    ends = np.cumsum([FIRST_ID, *lengths])
    return store_from_ids([range(a, b) for a, b in pairwise(ends)], 1 << 20, bos_id=BOS, eos_id=EOS)


def windows_of(lengths: list[int], seq_len: int, pack: bool) -> LMDataset:
    return LMDataset(numbered(lengths), seq_len, pad_id=PAD, pack=pack)


def reference_windows(lengths: list[int], seq_len: int, pack: bool) -> list[tuple[list[int], list[int]]]:
    """The same windows from lists, in the plainest way there is."""
    framed = [[BOS, *map(int, ids), EOS] for ids in (numbered(lengths).document(d) for d in range(len(lengths)))]
    streams = [[i for document in framed for i in document]] if pack else framed
    found = []
    for stream in streams:
        for start in range(0, len(stream) - 1, seq_len):
            ids = stream[start : start + seq_len + 1]
            inputs, labels = ids[:seq_len], [IGNORE_INDEX if i == BOS else i for i in ids[1:]]
            inputs += [PAD] * (seq_len - len(inputs))
            found.append((inputs, labels + [IGNORE_INDEX] * (seq_len - len(labels))))
    return found


ragged = st.lists(st.integers(0, 30) | st.sampled_from([0, 1]), min_size=1, max_size=12)


def assert_each_label_once(lengths: list[int], seq_len: int, pack: bool) -> None:
    windows = windows_of(lengths, seq_len, pack)
    counted: list[int] = []
    for index in range(len(windows)):
        _, labels = windows[index]
        counted.extend(labels[labels != IGNORE_INDEX].tolist())
    n_tokens = sum(lengths)
    assert sorted(counted) == [EOS] * len(lengths) + list(range(FIRST_ID, FIRST_ID + n_tokens))
    assert windows.n_labels == len(counted) == n_tokens + len(lengths)


@given(lengths=ragged, seq_len=st.integers(1, 40), pack=st.booleans())
def test_windows_have_every_token_as_label_once(lengths: list[int], seq_len: int, pack: bool) -> None:
    assert_each_label_once(lengths, seq_len, pack)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seq_len", [1, 2, 8])
@pytest.mark.parametrize("framed", ["T-1", "T", "T+1", "T+2", "2T", "2T+1", "2T+2"])
def test_nothing_is_lost_around_a_whole_number_of_windows(framed: str, seq_len: int, pack: bool) -> None:
    times, plus = {"T-1": (1, -1), "T": (1, 0), "T+1": (1, 1), "T+2": (1, 2)}.get(framed, (2, int(framed[2:] or 0)))
    n_framed = max(2, times * seq_len + plus)
    assert_each_label_once([n_framed - 2], seq_len, pack)
    assert len(windows_of([n_framed - 2], seq_len, pack)) == -(-(n_framed - 1) // seq_len)


@given(lengths=ragged, seq_len=st.integers(1, 40), pack=st.booleans())
def test_windows_equal_those_made_from_lists(lengths: list[int], seq_len: int, pack: bool) -> None:
    windows = windows_of(lengths, seq_len, pack)
    made = [(ids.tolist(), labels.tolist()) for ids, labels in map(windows.__getitem__, range(len(windows)))]
    assert made == reference_windows(lengths, seq_len, pack)


@given(lengths=ragged, seq_len=st.integers(1, 40), pack=st.booleans(), data=st.data())
def test_windows_batch_keeps_requested_order(lengths: list[int], seq_len: int, pack: bool, data: st.DataObject) -> None:
    windows = windows_of(lengths, seq_len, pack)
    wanted = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=6))
    input_ids, labels = windows.batch(wanted)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids.shape == labels.shape == (len(wanted), seq_len)
    assert input_ids.is_contiguous()
    assert labels.is_contiguous()
    for row, index in enumerate(wanted):
        ids, marks = windows[index]
        assert (input_ids[row].tolist(), labels[row].tolist()) == (ids.tolist(), marks.tolist())


@pytest.mark.slow
@given(lengths=ragged, seq_len=st.integers(1, 40))
def test_unpacked_windows_hold_one_document(lengths: list[int], seq_len: int) -> None:
    windows = windows_of(lengths, seq_len, pack=False)
    ends = np.cumsum([FIRST_ID, *lengths])
    for index in range(len(windows)):
        ids = np.concatenate(windows[index])
        text = ids[ids >= FIRST_ID]
        assert len(set(np.searchsorted(ends, text, side="right"))) <= 1
        assert (windows[index][0] == BOS).sum() <= 1


@pytest.mark.parametrize("pack", [True, False])
def test_windows_mask_padding_that_has_the_eos_id(pack: bool) -> None:
    windows = LMDataset(numbered([3, 5]), 4, pad_id=EOS, pack=pack)
    labels = np.concatenate([windows[i][1] for i in range(len(windows))])
    assert (labels == EOS).sum() == 2


def test_ids_above_the_narrow_type_survive() -> None:
    ids = [70_000, 65_535, 65_536]
    windows = LMDataset(store_from_ids([ids], 70_001, bos_id=BOS, eos_id=EOS), 8, pad_id=PAD)
    assert windows[0][1][:3].tolist() == ids


def test_windows_read_a_memory_map_without_loading_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = numbered([9, 0, 14])
    store.framed.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=store.framed.dtype, mode="r")
    on_disk = InMemoryTokens(mapped, store.offsets, store.names, store.doc_bytes)
    for pack in (True, False):
        one, other = (Windows(s, 4, pad_id=PAD, pack=pack) for s in (store, on_disk))
        assert torch.equal(one.batch(range(len(one)))[0], other.batch(range(len(other)))[0])
    assert on_disk.framed is mapped


@pytest.mark.parametrize("pack", [True, False])
def test_windows_index_out_of_range_raises(pack: bool) -> None:
    windows = windows_of([5, 5], 4, pack)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError, match=f"window {index} of {len(windows)}"):
            windows.batch([0, index])


@pytest.mark.parametrize("pack", [True, False])
def test_an_empty_store_has_no_windows(pack: bool) -> None:
    assert len(windows_of([], 4, pack)) == 0


def test_a_window_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length"):
        windows_of([5], 0, pack=True)


def test_windows_describe_their_documents() -> None:
    packed, apart = (windows_of([3, 1, 1, 9], 12, pack) for pack in (True, False))
    assert packed.describe(0) == "window 0: from text 1 to text 4 and 2 more between them"
    assert packed.describe(1) == "window 1: text 4, tokens 1 to 10 of 11"
    assert apart.describe(2) == "window 2: text 3, tokens 0 to 2 of 3"


@given(ragged, st.integers(1, 20))
def test_document_positions_restart_at_borders_of_inputs(lengths: list[int], seq_len: int) -> None:
    windows = LMDataset(numbered(lengths), seq_len, pad_id=PAD, isolate_documents=True)
    for index in range(len(windows)):
        input_ids, _ = windows[index]
        expected, has_border = [], False
        for place, token in enumerate(input_ids.tolist()):
            begins = token == BOS and place > 0
            has_border |= begins
            expected.append(0 if begins or place == 0 else expected[-1] + 1)
        found = windows.document_positions([index])
        assert (None if found is None else found[0].tolist()) == (expected if has_border else None)


def test_document_positions_need_isolation_and_packing() -> None:
    for changes in ({"isolate_documents": False}, {"isolate_documents": True, "pack": False}):
        windows = LMDataset(numbered([3, 4]), 20, pad_id=PAD, **changes)  # type: ignore[arg-type]
        assert windows.document_positions(range(len(windows))) is None
