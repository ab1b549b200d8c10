"""The ``data`` section: where text comes from and how it becomes windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from psannlm.config.base import Check, FileName, Flag, Real, Section, Text, Whole

TokenizerBackend = Literal["auto", "sentencepiece", "tokenizers", "simple"]


class PathSource(Section):
    """A file, folder or glob of text, or a folder that ``psannlm prep`` made."""

    path: FileName = Field(
        description="file, folder, glob or URL, or alone a folder made by psannlm prep; relative paths start at the "
        "working folder"
    )
    per_line: Flag = Field(False, description="one document per line of a .txt file, instead of one per file")
    text_key: Text = Field("text", description="the key that holds the text in .jsonl and .parquet files")
    errors: Literal["strict", "replace"] = Field(
        "strict", description="bytes that are not UTF-8, and lone surrogates: stop, or put U+FFFD and count"
    )


class BuiltinSource(Section):
    """Text that comes with Python itself."""

    builtin: Literal["python-reference"] = Field(
        description="python-reference: the language reference in pydoc_data.topics"
    )


Source = PathSource | BuiltinSource


def _source_kind(value: object) -> str | None:
    """Tell which kind of source is meant, so that an error speaks of that kind alone."""
    if isinstance(value, BuiltinSource) or (isinstance(value, Mapping) and "builtin" in value):
        return "builtin"
    return "path" if isinstance(value, (PathSource, Mapping)) else None


_TaggedSource = Annotated[
    Annotated[PathSource, Tag("path")] | Annotated[BuiltinSource, Tag("builtin")], Discriminator(_source_kind)
]


class DataConfig(Section):
    """Corpus, tokenizer and packing."""

    sources: tuple[_TaggedSource, ...] = Field(
        (BuiltinSource(builtin="python-reference"),),
        description="list of paths, {path: ...} or {builtin: python-reference}; or one prepared folder",
    )
    tokenizer: TokenizerBackend = Field("auto", description="auto takes the first of sentencepiece, tokenizers, simple")
    tokenizer_model_path: FileName | None = Field(
        None, description="a .model or .json made earlier; null: fit one on the corpus, or use the prepared folder's"
    )
    vocab_size: Whole = Field(
        4096, ge=261, description="entries of a fitted tokenizer (256 bytes and 4 specials among them)"
    )
    max_length: Whole = Field(256, ge=1, description="window: tokens that the model sees at once in training")
    pack_sequences: Flag = Field(
        True, description="join documents into full windows; false: a window holds one document"
    )
    val_split: Real = Field(
        0.0, ge=0, lt=1, description="share of the documents held out for validation; 0 with a prepared folder"
    )
    seed: Whole = Field(
        1337,
        ge=0,
        description="decides which documents are held out and the tokenizer's sample; the order of training is "
        "train.seed's",
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
            return [Check(("sources",), "no corpus given; list files or folders, or {builtin: python-reference}")]
        return []
