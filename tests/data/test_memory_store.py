"""In-memory token store: round trip of documents and the type of ids."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.data import memory_store
from psannlm.data.corpus.documents import Document
from psannlm.data.memory_store import encode_documents, store_from_ids, token_dtype
from psannlm.tokenizers.base import Tokenizer


@given(texts=st.lists(st.text(max_size=12), max_size=9), group=st.integers(1, 5))
def test_documents_come_back_whatever_the_groups(texts: list[str], group: int, byte_tokenizer: Tokenizer) -> None:
    documents = [Document(text, f"d{i}") for i, text in enumerate(texts)]
    with (
        patch.object(memory_store, "_GROUP_DOCUMENTS", group),
        patch.object(memory_store, "_GROUP_CHARACTERS", 3 * group),
    ):
        store = encode_documents(iter(documents), byte_tokenizer)
    assert [byte_tokenizer.decode(store.document(i).tolist()) for i in range(store.n_documents)] == texts
    assert store.names == tuple(document.name for document in documents)
    assert store.doc_bytes.tolist() == [len(text.encode()) for text in texts]
    assert store.n_bytes == store.n_tokens == sum(len(text.encode()) for text in texts)
    assert store.n_framed_tokens == store.n_tokens + 2 * len(texts)
    assert store.framed.dtype == np.uint16


def test_groups_are_bounded_by_characters_and_by_documents(byte_tokenizer: Tokenizer) -> None:
    sizes: list[list[int]] = []

    class Watched(type(byte_tokenizer)):  # type: ignore[misc]
        def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
            sizes.append([len(text) for text in texts])
            found: list[list[int]] = super().encode_batch(texts, threads)
            return found

    documents = [Document("x" * n, "d") for n in (1, 1, 1, 1, 9, 9, 1, 30, 1)]
    with patch.object(memory_store, "_GROUP_DOCUMENTS", 3), patch.object(memory_store, "_GROUP_CHARACTERS", 10):
        encode_documents(documents, Watched())
    assert sizes == [[1, 1, 1], [1, 9], [9, 1], [30], [1]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype
    store = store_from_ids([[vocab_size - 1, 0]], vocab_size, bos_id=1, eos_id=2)
    assert store.framed.dtype == dtype
    assert store.document(0).tolist() == [vocab_size - 1, 0]


def test_bytes_count_utf_8_not_characters() -> None:
    assert [Document(text, "d").n_bytes for text in ("", "wave", "é", "🌊")] == [0, 4, 2, 4]
