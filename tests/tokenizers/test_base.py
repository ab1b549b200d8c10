from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.errors import TokenizerError
from psannlm.tokenizers.base import PAD, SPECIALS, Tokenizer, printable, refuse_surrogates_in
from psannlm.tokenizers.resolve import load_tokenizer, tokenizer_from_bytes

SCALARS = st.characters(exclude_categories=("Cs",))
TRICKY = st.sampled_from(
    [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\0",
        "▁",
        "▅",
        "⁇",
        "\uf8f0",
        "0",
        "1",
        "</s>",
        "<0x0A>",
        "e\u0301",
        "\u200d",
        "👩",
        "\ufeff",
    ]
)
TEXTS = st.one_of(st.text(SCALARS), st.lists(st.one_of(TRICKY, SCALARS)).map("".join))

EDGES = [
    "",
    "\n",
    "\n\n\n",
    " ",
    "   ",
    "\t\t",
    "  both sides  ",
    "a\r\nb\rc\n",
    "▁",
    "▁▁ ▁a",
    " ▁",
    "\uf8f0",
    "\uf8f01",
    "\uf8f0▁0",
    "\uf8f00\uf8f0▁1",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "שלום עולם \u202eabc\u202c",
    "e\u0301\u0323 \u0301alone",
    "a\0b\0\0",
    "\ufeffstart",
    " ⁇ ▅ \ufffd",
    "\u2028\u2029\x85\x0b\x0c\xa0\u3000",
    "x" * 100_000,
    " " * 100_000,
    "▁" * 10_000,
]


@pytest.mark.parametrize("text", EDGES, ids=lambda text: ascii(text[:12]))
def test_tokenizer_roundtrip_of_edge_texts(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_every_scalar_value_survives_alone_and_among_others(tokenizer: Tokenizer) -> None:
    scalars = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    assert len(scalars) == 1_112_064
    joined = ["".join(scalars[i : i + 500]) for i in range(0, len(scalars), 500)]
    rows = tokenizer.encode_batch(joined)
    assert tokenizer.decode_batch(rows) == joined
    assert all(tokenizer.special_ids.isdisjoint(ids) for ids in rows)
    basic = [c for c in scalars if ord(c) < 0x3000 or 0xE000 <= ord(c) < 0x10400]
    for text, ids in zip(basic, tokenizer.encode_batch(basic), strict=True):
        assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_tokenizer_roundtrip_of_any_text_without_specials(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert all(type(i) is int for i in ids)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, max_size=8))
def test_a_batch_equals_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    each = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == each
    for threads in (0, 1):
        assert tokenizer.encode_batch(texts, threads) == each
        assert tokenizer.decode_batch([[1, *ids, 2] for ids in each], threads) == texts
        ids, lengths = tokenizer.encode_flat(texts, threads)
        assert lengths.tolist() == [len(one) for one in each]
        assert ids.tolist() == [i for one in each for i in one]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_decode_to_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    text = tokenizer.decode(ids)
    text.encode("utf-8")
    assert text == tokenizer.decode([i for i in ids if i not in tokenizer.special_ids])
    assert len(tokenizer.pieces(ids)) == len(ids)


def test_specials_are_0_to_3_and_give_no_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.decode(ids) == ""
    assert tokenizer.pieces(ids) == list(SPECIALS)
    assert tokenizer.decode([1, *tokenizer.encode("two words"), 2, 0, 0]) == "two words"


@pytest.mark.parametrize("text", [*SPECIALS, "".join(SPECIALS), "a</s> <s>b", "<0x41>", "<0x00>", "\0 </s> \0"])
def test_text_never_forges_a_special(tokenizer: Tokenizer, text: str) -> None:
    for each in (tokenizer, tokenizer_from_bytes(tokenizer.to_bytes())):
        for ids in (each.encode(text), *each.encode_batch([text, text])):
            assert each.special_ids.isdisjoint(ids)
            assert each.decode(ids) == text


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path, corpus) -> None:
    path = tokenizer.save(tmp_path / "folder" / "tokenizer.any")
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.to_bytes() == path.read_bytes() == tokenizer.to_bytes()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    texts = [*corpus, *EDGES]
    ids = tokenizer.encode_batch(texts)
    assert loaded.encode_batch(texts) == ids
    assert [loaded.decode(each) for each in ids] == texts
    assert loaded.special_ids == tokenizer.special_ids


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "long " * 100 + "\udc80"])
def test_a_lone_surrogate_is_refused_by_name(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(TokenizerError, match=r"^lone surrogate U\+D[89A-F].*not Unicode text"):
        tokenizer.encode(text)
    with pytest.raises(TokenizerError, match=r"^text 2: lone surrogate"):
        tokenizer.encode_batch(["fine", "é", text, "fine"])


def test_encode_flat_surrogates_in_adjacent_texts_raise(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"^text 0: lone surrogate"):
        tokenizer.encode_batch(["\ud83d", "\ude00"])


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {wrong} is outside the vocabulary"):
        tokenizer.decode([5, wrong])
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.pieces([wrong])


def test_broken_utf8_becomes_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001d11e")  # not in the corpus: four bytes
    assert len(ids) == 4
    assert set(tokenizer.decode(ids[:3])) == {"\ufffd"}
    assert tokenizer.decode([*ids[:2], *tokenizer.encode("ok")]).endswith("\ufffdok")


def test_pieces_can_be_printed(tokenizer: Tokenizer) -> None:
    for piece in tokenizer.pieces(tokenizer.encode("a\n\t \0\uf8f0 b")):
        assert piece.isprintable()
        assert piece
    assert "".join(tokenizer.pieces(tokenizer.encode("the"))) == "the"


def test_byte_pieces_differ_from_characters(tokenizer: Tokenizer) -> None:
    unseen = tokenizer.encode("\U0001d11e")
    assert tokenizer.byte_ids.issuperset(unseen)
    assert tokenizer.byte_ids.isdisjoint(tokenizer.encode("the lazy dog"))
    assert all(
        tokenizer.decode([i]) == "\ufffd" or len(tokenizer.decode([i]).encode()) == 1 for i in tokenizer.byte_ids
    )
    assert tokenizer.byte_ids.isdisjoint(tokenizer.special_ids)


def test_empty_batch(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_batch([]) == []
    assert tokenizer.decode_batch([[]]) == [""]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch([""]) == [[]]
    assert tokenizer.decode([]) == ""


def test_printable_escapes_invisible_characters_only() -> None:
    assert printable("▁é\n\0\uf8f0") == "▁é\\n\\x00\\uf8f0"


def test_surrogates_are_found_anywhere() -> None:
    refuse_surrogates_in(["a", "\U0001f600"])
    with pytest.raises(TokenizerError, match=r"text 1: lone surrogate U\+DC00 at character 3"):
        refuse_surrogates_in([PAD, "abc\udc00"])
