"""LMDataset: items, indices, DataLoader and pickling."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from psannlm.config.data import DataConfig, PathSource
from psannlm.data.dataset import LMDataset
from psannlm.data.memory_store import store_from_ids
from psannlm.data.prepare import load_corpus
from psannlm.errors import ConfigError
from psannlm.tokenizers.char import CharTokenizer


@pytest.fixture
def dataset() -> LMDataset:
    # 1 and 2 frame two documents of 11 and 4 ids: 19 ids in windows of 4 inputs.
    return LMDataset(store_from_ids([range(4, 15), range(20, 24)], 300, bos_id=1, eos_id=2), 4, pad_id=0)


def test_an_item_is_inputs_and_the_tokens_after_them(dataset: LMDataset) -> None:
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 5
    inputs, labels = dataset[2]
    assert isinstance(inputs, Tensor)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.tolist() == [11, 12, 13, 14]
    assert labels.tolist() == [12, 13, 14, 2]
    # No label where a document begins, and none for padding.
    assert [part.tolist() for part in dataset[3]] == [[2, 1, 20, 21], [-100, 20, 21, 22]]
    assert [part.tolist() for part in dataset[4]] == [[22, 23, 2, 0], [23, 2, -100, -100]]
    assert repr(dataset) == "<LMDataset of 5 windows of 4 tokens>"


def test_indices_count_from_both_ends_and_stop_there(dataset: LMDataset) -> None:
    for index in range(5):
        for same in (index - 5, np.int64(index), torch.tensor(index)):
            assert all(torch.equal(a, b) for a, b in zip(dataset[same], dataset[index], strict=True))
    for outside in (5, -6, 10**12):
        with pytest.raises(IndexError, match="of 5"):
            _ = dataset[outside]
    for wrong in (slice(2), 1.0, "1"):
        with pytest.raises(TypeError):
            _ = dataset[wrong]  # type: ignore[index]
    assert len(list(dataset)) == 5  # type: ignore[call-overload]


def test_a_window_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        LMDataset(store_from_ids([[4]], 300, bos_id=1, eos_id=2), 0, pad_id=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_every_window_once(dataset: LMDataset, workers: int) -> None:
    batches = list(DataLoader(dataset, batch_size=2, num_workers=workers))
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(2, 4), (2, 4), (1, 4)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for index in range(5):
        assert torch.equal(inputs[index], dataset[index][0])
        assert torch.equal(labels[index], dataset[index][1])
    shuffled = DataLoader(dataset, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([inputs for inputs, _ in shuffled]).tolist()
    assert sorted(rows) == sorted(inputs.tolist())
    both = ConcatDataset([dataset, Subset(dataset, [0, -1])])
    assert [inputs.tolist() for inputs, _ in DataLoader(both, batch_size=None)][5:] == [
        dataset[0][0].tolist(),
        dataset[4][0].tolist(),
    ]
    (last,) = Subset(dataset, [-1]).__getitems__([0])
    assert last[0].tolist() == dataset[4][0].tolist()


def test_a_pickled_dataset_is_the_same(
    dataset: LMDataset, tmp_path: Path, tiny_texts: list[str], prepare_folder: Callable[..., Path]
) -> None:
    tokenizer = CharTokenizer.fit(tiny_texts, 300)
    folder = prepare_folder(tmp_path, tokenizer, tiny_texts)
    config = DataConfig(sources=(PathSource(path=str(folder)),), max_length=16)
    on_disk = load_corpus(config)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "text_sha256": on_disk.report.sha256}
    sharded = LMDataset(on_disk.train, 16, pad_id=tokenizer.pad_id, **settings)
    for one in (dataset, sharded):
        twin = pickle.loads(pickle.dumps(one))
        assert len(twin) == len(one)
        for index in (0, len(one) - 1):
            assert all(torch.equal(a, b) for a, b in zip(twin[index], one[index], strict=True))
    # Shards are named, not carried; and the tokenizer comes along.
    assert twin.tokenizer.fingerprint == tokenizer.fingerprint
    assert len(pickle.dumps(on_disk.train)) < 10_000
