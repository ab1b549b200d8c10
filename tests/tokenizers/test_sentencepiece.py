from __future__ import annotations

import io

import pytest
import sentencepiece

from psannlm.errors import TokenizerError
from psannlm.tokenizers.sentencepiece import SentencePieceTokenizer

PROSE = ["The quick brown fox jumps over the lazy dog, and then\n    the dog sleeps in the sun.\n" * 40]


def foreign(**options: object) -> bytes:
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 300,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 3,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE[0].splitlines()), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_models_made_elsewhere_encode_as_their_library_does(model_type: str) -> None:
    byte_fallback = model_type in ("unigram", "bpe")
    content = foreign(model_type=model_type, byte_fallback=byte_fallback)
    raw = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = SentencePieceTokenizer(content)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.to_bytes() == content
    texts = ["the fox  sleeps", "a ▁ mark", "</s>", "\uf8f0"]
    assert tokenizer.encode_batch(texts) == raw.encode(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode(tokenizer.encode("the fox sleeps")) == "the fox sleeps"
    assert {tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(tokenizer.encode("<s></s>"))


def test_padding_of_the_model_is_used() -> None:
    assert SentencePieceTokenizer(foreign(pad_id=3)).pad_id == 3


@pytest.mark.parametrize(
    ("option", "message"), [("bos_id", "begins a text, such as <s>"), ("eos_id", "ends a text, such as </s>")]
)
def test_a_missing_special_is_named(option: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(foreign(**{option: -1}))


def test_a_model_cut_short_anywhere_is_refused() -> None:
    content = SentencePieceTokenizer.fit(PROSE, 300).to_bytes()
    for length in range(len(content)):
        with pytest.raises(TokenizerError):
            SentencePieceTokenizer(content[:length])


def test_indentation_takes_few_pieces() -> None:
    tokenizer = SentencePieceTokenizer.fit(PROSE, 350)
    assert len(tokenizer.encode("\n    the dog")) <= 5


def test_sentencepiece_rare_characters_become_bytes() -> None:
    # Each of 5,000 characters would have to have a piece, and the library refuses that.
    tokenizer = SentencePieceTokenizer.fit(["".join(map(chr, range(0x4E00, 0x4E00 + 5000)))] * 2, 300)
    assert tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode("一丁丂龍")) == "一丁丂龍"


def test_sentences_with_reserved_characters_are_learned_from() -> None:
    # The library drops a sentence with ▅ whole, and one with NUL in part.
    for reserved in ("▅", "\0"):
        text = f"wonderful wonderfully wonderfulness {reserved} "
        tokenizer = SentencePieceTokenizer.fit([text * 50], 300)
        assert len(tokenizer.encode("wonderful")) <= 3


def test_the_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = SentencePieceTokenizer.fit(PROSE, 300)
    tokenizer.decode(tokenizer.encode("the\0 ▅"))
    for damaged in (b"", b"\x0a\x05hello"):
        sentencepiece.SetMinLogLevel(0)
        with pytest.raises(TokenizerError):
            SentencePieceTokenizer(damaged)
    assert capfd.readouterr() == ("", "")
