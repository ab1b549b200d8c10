"""Settings of ``psannlm prep``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from psannlm.data.corpus.files import STDIN
from psannlm.data.manifest import ManifestSettings
from psannlm.errors import ConfigError, Problem, nearest

ERROR_MODES = ("strict", "replace")
FORMATS = ("txt", "jsonl")
SHARD_TOKENS = 100_000_000
# The remedy in errors about bytes that are not UTF-8.
REPLACE_OPTION = "--errors replace"
REPLACE_ADVICE = f"; {REPLACE_OPTION} replaces them by U+FFFD"

__all__ = ["ERROR_MODES", "FORMATS", "REPLACE_ADVICE", "REPLACE_OPTION", "SHARD_TOKENS", "STDIN", "PrepSettings"]


@dataclass(frozen=True)
class PrepSettings:
    """How a corpus is read, filtered, split and cut into shards.

    ``errors``: handling of bytes that are not UTF-8: ``strict`` stops, ``replace`` replaces them by U+FFFD and counts.
    ``min_chars``, ``max_chars``: shorter and longer documents are left out and counted; None sets no upper limit.
    ``val_split``: fraction of the documents held out, chosen by their text and ``seed``. ``stdin_format``: of ``-``.

    Raises:
        ConfigError: a value is out of its range; names every such value.
    """

    text_key: str = "text"
    per_line: bool = False
    stdin_format: str = "txt"
    errors: str = "strict"
    min_chars: int = 1
    max_chars: int | None = None
    val_split: float = 0.01
    seed: int = 1337
    shard_tokens: int = SHARD_TOKENS
    keep_duplicates: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name, known in (("errors", ERROR_MODES), ("stdin_format", FORMATS)):
            value = getattr(self, name)
            if value not in known:
                problems.append(Problem(name, f"{value!r} is not one of {', '.join(known)}{nearest(value, known)}"))
        if self.min_chars < 0:
            problems.append(Problem("min_chars", f"{self.min_chars} is less than 0"))
        if self.max_chars is not None and self.max_chars < max(1, self.min_chars):
            problems.append(Problem("max_chars", f"{self.max_chars} is less than min_chars, or than 1"))
        if not 0 <= self.val_split < 1:
            problems.append(Problem("val_split", f"{self.val_split} is not in [0, 1)"))
        if self.seed < 0:
            problems.append(Problem("seed", f"{self.seed} is less than 0"))
        if self.shard_tokens < 1:
            problems.append(Problem("shard_tokens", f"{self.shard_tokens} is less than 1"))
        if problems:
            raise ConfigError(problems)

    def for_manifest(self) -> ManifestSettings:
        """Return the settings as they are stored in a manifest; ``stdin_format`` is not."""
        return ManifestSettings(
            val_split=self.val_split,
            seed=self.seed,
            min_characters=self.min_chars,
            max_characters=self.max_chars,
            dedupe=not self.keep_duplicates,
            text_key=self.text_key,
            per_line=self.per_line,
            errors=self.errors,
            shard_tokens=self.shard_tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name, as they are stored in a plan."""
        return asdict(self)
