"""One small tokenizer of each backend, fitted once."""

from __future__ import annotations

import pytest

from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

BACKENDS = ("sentencepiece", "sentencepiece bpe", "tokenizers", "simple")

# Specials spelled out and escape characters, often enough that a careless trainer would learn them as pieces.
CORPUS = [
    "def fit(self, data):\n    for step in range(10):\n        loss = model(data)\n\treturn loss\r\n" * 20,
    "The </s> and <s> of <pad> or <unk> and <0x41> are text here. " * 50,
    "Ärger über naïve Æsthetik, 日本語の文章、 שלום עולם, emoji 👩‍👩‍👧 and ▁▁ marks \uf8f0\uf8f01. " * 20,
    "a lazy dog\0jumps ▅ over ⁇ the fox ⁇ " * 20,
]


@pytest.fixture(scope="session", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend, *model_type = request.param.split()
    return fit_tokenizer(CORPUS, backend, 400, model_type=model_type[0] if model_type else None)


@pytest.fixture
def corpus() -> list[str]:
    return CORPUS
