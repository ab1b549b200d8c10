"""Loading of a corpus: the validation split, the tokenizer and reported figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from psannlm.config.constants import IGNORE_INDEX
from psannlm.config.data import DataConfig
from psannlm.data import prepare as prepare_module
from psannlm.data.corpus.documents import Document
from psannlm.data.order import shuffled
from psannlm.data.prepare import load_corpus, load_documents, shared_text, split_documents
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.char import CharTokenizer


def numbered(n: int) -> list[Document]:
    return [Document(f"document {i} of the corpus", f"text {i + 1}") for i in range(n)]


@given(n=st.integers(2, 60), share=st.floats(0.001, 0.999), seed=st.integers(0, 50))
def test_the_split_parts_the_documents_and_never_takes_all(n: int, share: float, seed: int) -> None:
    documents = numbered(n)
    train, val = split_documents(documents, share, seed)
    assert sorted([*train, *val], key=documents.index) == documents
    assert train == sorted(train, key=documents.index)
    assert val == sorted(val, key=documents.index)
    assert train
    assert val


@given(n=st.integers(4, 60), seed=st.integers(0, 50), share=st.sampled_from([0.1, 0.5]))
def test_split_is_stable_when_corpus_grows(n: int, seed: int, share: float) -> None:
    documents = numbered(n)
    train, val = (set(side) for side in split_documents(documents[::2], share, seed))
    more_train, more_val = (set(side) for side in split_documents(documents[::-1], share, seed))
    # One document may have been put on a side only because that would have been empty.
    assert len(train & more_val) + len(val & more_train) <= 1
    assert not train & more_val or len(train) == 1
    assert not val & more_train or len(val) == 1


def test_split_holds_out_requested_fraction() -> None:
    for share in (0.01, 0.1, 0.5):
        n_out = len(split_documents(numbered(20_000), share, 1337)[1])
        assert abs(n_out - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_split_equal_documents_stay_together() -> None:
    documents = [Document(d.text, f"{d.name} again") for d in numbered(40)] + numbered(40)
    train, val = ({d.text for d in side} for side in split_documents(documents, 0.3, 1337))
    assert len(train) + len(val) == 40


@given(n=st.integers(2, 60), share=st.floats(0.001, 0.999), seed=st.integers(0, 50))
def test_runs_of_former_versions_keep_their_held_out_documents(n: int, share: float, seed: int) -> None:
    documents = numbered(n)
    train, val = split_documents(documents, share, seed, preparation=1)
    n_out = min(max(1, round(share * n)), n - 1)
    assert val == [documents[i] for i in sorted(shuffled(n, seed, "validation split")[:n_out])]
    assert train == [d for d in documents if d not in val]


def test_other_seeds_hold_out_other_documents() -> None:
    assert len({tuple(d.name for d in split_documents(numbered(40), 0.1, seed)[1]) for seed in range(10)}) == 10


def test_split_zero_holds_out_nothing() -> None:
    assert split_documents(numbered(3), 0.0, 1) == (numbered(3), [])


@given(text=st.text(min_size=1, max_size=300), share=st.floats(0.01, 0.99))
def test_split_single_document_halves_make_up_text(text: str, share: float) -> None:
    try:
        (first,), (last,) = split_documents([Document(text, "d")], share, 1)
    except CorpusError:
        assume(False)
    assert first.text + last.text == text
    assert first.text.strip()
    assert last.text.strip()
    assert (first.name, last.name) == ("d [first part]", "d [last part]")


@pytest.mark.parametrize(("mark", "share"), [("\n\n", 0.1), ("\n", 0.1), (" ", 0.3), (" ", 0.7), ("", 0.1)])
def test_cut_is_between_paragraphs_lines_or_words(mark: str, share: float) -> None:
    text = ("waves rise" + mark) * 400
    (first,), (last,) = split_documents([Document(text, "d")], share, 1)
    assert first.text.endswith(mark)
    assert first.text.endswith("waves rise" + mark) or mark in ("", " ")
    assert abs(len(last.text) / len(text) - share) < 0.03


def test_cut_prefers_paragraph_end_to_nearer_line_end() -> None:
    text = "rise\nand fall\n\n" * 400
    for share in (0.103, 0.107, 0.111):
        (first,), _ = split_documents([Document(text, "d")], share, 1)
        assert first.text.endswith("fall\n\n")


@pytest.mark.parametrize("text", ["a", "ab  ", "      a"])
def test_a_document_too_short_to_cut_is_an_error(text: str) -> None:
    with pytest.raises(CorpusError, match="val_split"):
        split_documents([Document(text, "d")], 0.1, 1)


def test_the_tokenizer_never_sees_held_out_text(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer) -> None:
    seen: list[str] = []

    def fit(texts, backend, vocab_size, *, seed):  # type: ignore[no-untyped-def]
        seen.extend(texts)
        assert (backend, vocab_size, seed) == ("simple", 300, 7)
        return byte_tokenizer

    monkeypatch.setattr(prepare_module, "fit_tokenizer", fit)
    config = DataConfig(tokenizer="simple", vocab_size=300, val_split=0.25, seed=7, max_length=8)
    data = load_documents(numbered(20), config)
    assert data.val is not None
    assert data.val.names == tuple(d.name for d in split_documents(numbered(20), 0.25, 7)[1])
    assert set(data.train.names).isdisjoint(data.val.names)
    by_name = {document.name: document.text for document in numbered(20)}
    assert seen == [by_name[name] for name in data.train.names]


def test_load_corpus_uses_given_tokenizer_file(
    monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare_module, "fit_tokenizer", None)
    monkeypatch.setattr(
        prepare_module, "load_tokenizer", lambda path: byte_tokenizer if path.name == "t.json" else None
    )
    config = DataConfig(tokenizer_model_path=str(tmp_path / "t.json"), max_length=8)
    assert load_documents(numbered(3), config).tokenizer is byte_tokenizer


def test_load_corpus_tokenizer_backend_mismatch_raises(tmp_path: Path) -> None:
    path = str(CharTokenizer("é").save(tmp_path / "t.json"))
    for named in ("auto", "simple"):
        config = DataConfig(tokenizer=named, tokenizer_model_path=path, max_length=8)
        assert load_documents(numbered(3), config).tokenizer.backend == "simple"
    with pytest.raises(ConfigError, match=r"sentencepiece is configured.*t\.json is a file of simple"):
        load_documents(numbered(3), DataConfig(tokenizer="sentencepiece", tokenizer_model_path=path))


def test_load_documents_keeps_texts_and_reports_figures(
    byte_tokenizer: Tokenizer, logged: pytest.LogCaptureFixture
) -> None:
    documents = [*numbered(12), Document(" \n", "blank")]
    data = load_documents(documents, DataConfig(val_split=0.25, max_length=8), byte_tokenizer)
    assert data.val is not None
    stores = (data.train, data.val)
    back = {
        store.names[i]: byte_tokenizer.decode(store.document(i).tolist())
        for store in stores
        for i in range(len(store.names))
    }
    assert back == {document.name: document.text for document in numbered(12)}
    assert data.report.drops == {"blank document": 1}
    joined = "\n".join(logged.messages)
    n_bytes, n_documents = data.train.n_bytes, data.train.n_documents
    assert f"{n_bytes:,} bytes, {n_bytes + n_documents:,} tokens (" in joined, "a byte is a token, a document one more"
    for figure in (
        "12 documents",
        data.report.sha256,
        "blank document x 1 (blank)",
        "bytes, 260 entries",
    ):
        assert figure in joined
    assert f"validation: {len(split_documents(numbered(12), 0.25, 1337)[1])} document" in joined
    assert "0.0% of its text" in joined


def test_load_corpus_from_files(tiny_corpus: Path) -> None:
    source = {"path": str(tiny_corpus), "per_line": True}
    config = DataConfig.model_validate({"sources": [source], "tokenizer": "simple", "max_length": 32, "val_split": 0.1})
    data = load_corpus(config)
    assert data.val is not None
    assert data.train.n_documents + data.val.n_documents == 12
    lines = tiny_corpus.read_text(encoding="utf-8").splitlines()
    for store in (data.train, data.val):
        for index, name in enumerate(store.names):
            line = lines[int(name.rsplit(":", 1)[1]) - 1]
            assert data.tokenizer.decode(store.document(index).tolist()) == line
            assert store.doc_bytes[index] == len(line.encode())


def test_load_corpus_shorter_than_window_gives_notice(
    byte_tokenizer: Tokenizer, logged: pytest.LogCaptureFixture
) -> None:
    data = load_documents([Document("x" * 8, "d")], DataConfig(max_length=10), byte_tokenizer)
    assert [line for line in logged.messages if "its 10 tokens" in line and "padded to data.max_length 10" in line]
    input_ids, labels = Windows(data.train, 10, pad_id=byte_tokenizer.pad_id).batch([0])
    assert labels[0].tolist() == [*input_ids[0, 1:9].tolist(), byte_tokenizer.eos_id, IGNORE_INDEX]
    logged.clear()
    load_documents([Document("x" * 8, "d")], DataConfig(max_length=9), byte_tokenizer)
    assert not [line for line in logged.messages if "padded" in line]


def test_no_documents_are_an_error(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(CorpusError, match="no text"):
        load_documents([], DataConfig(), byte_tokenizer)


LONG = "A paragraph that is long enough to say that it was seen before, word for word."
OTHER = "Another paragraph, long enough too, which stands nowhere but in this one document."


def test_shared_text_counts_bytes_of_repeated_paragraphs() -> None:
    train = [Document(f"intro\n\n  {LONG.replace(' ', '  ')}\r\n \r\nsame", "t"), Document("x", "u")]
    share = len(LONG) / (2 * len(LONG) + len(OTHER) + len("same"))
    held_out = [Document(f"{LONG}\n\n{OTHER}", "v"), Document(f"same\n \n{LONG.replace(' ', chr(10))}\n", "w")]
    assert shared_text(held_out, train) == pytest.approx(2 * share)
    assert shared_text(held_out, [Document(LONG[:-1] + "\n\nsame", "t")]) == 0
    assert shared_text([Document(LONG, "v")], train * 3) == 1
    assert shared_text([], train) == 0


def test_overlap_is_reported_only_with_validation(byte_tokenizer: Tokenizer, logged: pytest.LogCaptureFixture) -> None:
    documents = [Document(LONG, f"d{i}") for i in range(4)]
    apart = load_documents(documents, DataConfig(max_length=8), byte_tokenizer)
    assert (apart.val, apart.val_overlap) == (None, None)
    data = load_documents(documents, DataConfig(max_length=8, val_split=0.25), byte_tokenizer)
    assert data.val_overlap == 1
    assert "100.0% of its text occurs verbatim in the training text" in logged.messages[-1]
