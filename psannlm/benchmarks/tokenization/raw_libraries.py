"""Direct calls of the raw tokenizer libraries, SentencePiece and Hugging Face tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psannlm.tokenizers.base import Tokenizer


def raw_encode(tokenizer: Tokenizer, threads: int = 0) -> Callable[[Sequence[str]], list[list[int]]] | None:
    """Return the batch encoding of the library that ``tokenizer`` wraps; None for a tokenizer of our own.

    Both libraries' results are converted to lists of ids, as their users need them.
    """
    if tokenizer.backend == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
        return lambda texts: processor.encode(list(texts), num_threads=threads or -1)
    if tokenizer.backend == "tokenizers":
        import tokenizers

        model = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode("utf-8"))
        return lambda texts: [row.ids for row in model.encode_batch_fast(texts, add_special_tokens=False)]
    return None


def raw_arrays(tokenizer: Tokenizer, threads: int = 0) -> Callable[[Sequence[str]], Sequence[Any]] | None:
    """Return the same encoding with an array of ids for each text; None if the library has none."""
    if tokenizer.backend != "sentencepiece":
        return None
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
    if not hasattr(processor, "EncodeAsNumpy"):  # before version 0.2.2
        return None
    return lambda texts: list(processor.encode(list(texts), out_type="numpy", num_threads=threads or -1))
