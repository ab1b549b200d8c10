"""The ``data`` section: corpus, tokenizer, validation split and training windows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from psannlm.config.base import Check, FileName, Flag, Real, Section, Text, Whole

TokenizerBackend = Literal["auto", "sentencepiece", "tokenizers", "simple"]


def _weight() -> Any:
    return Field(
        None,
        gt=0,
        description="share of each epoch's tokens, in proportion to the weights of the other sources; small sources "
        "are repeated; every source has a weight or none has: then each token is seen once per epoch",
    )


class PathSource(Section):
    """A file, folder, glob or URL of text, or a folder or URL prepared by ``psannlm prep``."""

    path: FileName = Field(
        description="file, folder, glob or URL, or the folder or URL that psannlm prep wrote, as the only source; "
        "relative to the working folder"
    )
    per_line: Flag = Field(False, description="read each line of a .txt file as a document; false: the whole file")
    text_key: Text = Field("text", description="key or column of the text in .jsonl and .parquet files")
    errors: Literal["strict", "replace"] = Field(
        "strict",
        description="at bytes that are not UTF-8 and lone surrogates: stop, or replace them by U+FFFD and count",
    )
    weight: Real | None = _weight()


class BuiltinSource(Section):
    """Text that is part of the Python installation."""

    builtin: Literal["python-reference"] = Field(
        description="built-in corpus; python-reference: the language reference in pydoc_data.topics"
    )
    weight: Real | None = _weight()


Source = PathSource | BuiltinSource


def _source_kind(value: object) -> str | None:
    """Return the kind of a source, so that errors mention only that kind."""
    if isinstance(value, BuiltinSource) or (isinstance(value, Mapping) and "builtin" in value):
        return "builtin"
    return "path" if isinstance(value, (PathSource, Mapping)) else None


_TaggedSource = Annotated[
    Annotated[PathSource, Tag("path")] | Annotated[BuiltinSource, Tag("builtin")], Discriminator(_source_kind)
]


class DataConfig(Section):
    """Corpus, tokenizer, split and packing."""

    sources: tuple[_TaggedSource, ...] = Field(
        (BuiltinSource(builtin="python-reference"),),
        description="corpus: list of paths, {path: ...} or {builtin: python-reference}; or one prepared folder, also "
        "at a URL",
    )
    tokenizer: TokenizerBackend = Field(
        "auto", description="tokenizer library; auto: first installed of sentencepiece, tokenizers, simple"
    )
    tokenizer_model_path: FileName | None = Field(
        None,
        description="existing tokenizer file, .model or .json; null: fit one on the corpus, or the prepared folder's",
    )
    vocab_size: Whole = Field(
        4096, ge=261, description="vocabulary size of a fitted tokenizer, including 256 bytes and 4 special tokens"
    )
    max_length: Whole = Field(256, ge=1, description="length of a training window in tokens")
    pack_sequences: Flag = Field(
        True, description="pack several documents into a window; false: one document per window"
    )
    isolate_documents: Flag = Field(
        False,
        description="keep the documents of a packed window apart, in training, validation and eval: attention and "
        "short convolutions do not reach over a border, and positions restart at each document",
    )
    val_split: Real = Field(
        0.0,
        ge=0,
        lt=1,
        description="approximate fraction of the documents held out for validation, chosen by a hash of the text and "
        "data.seed; 0 with a prepared folder",
    )
    seed: Whole = Field(
        1337,
        ge=0,
        description="seed of the validation split and of the tokenizer's sample; train.seed decides the order of "
        "training",
    )
    cache_dir: FileName | None = Field(
        None,
        description="folder for local copies of a prepared folder at a URL; null: $PSANNLM_CACHE_DIR, or "
        "~/.cache/psannlm",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_may_be_plain(cls, value: object) -> object:
        if isinstance(value, (str, os.PathLike, Mapping, PathSource, BuiltinSource)):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, (str, os.PathLike)) else item for item in value)
        return value

    def checks(self) -> list[Check]:
        if not self.sources:
            return [Check(("sources",), "no corpus; list files or folders, or {builtin: python-reference}")]
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if len(without) == len(self.sources):
            return []
        if len(self.sources) == 1:
            return [Check(("sources",), "a single source is all of every epoch; remove its weight")]
        missing = ", ".join(str(number + 1) for number in without)
        message = f"entry {missing} has no weight, and others have one; give every entry a weight, or none"
        return [Check(("sources",), message)] if without else []
