"""Survey of a corpus and of the machine: how much text there is, and what trains on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psannlm.config.data import BuiltinSource, DataConfig, PathSource, Source
from psannlm.config.run import section_from_kwargs
from psannlm.data.corpus.documents import ReadReport, read_documents
from psannlm.data.corpus.files import JSON_LINES_SUFFIXES, file_bytes, find_all, split_suffix
from psannlm.data.manifest import Manifest
from psannlm.data.prepared import find_prepared
from psannlm.errors import CorpusError
from psannlm.runtime.cores import usable_cores

# Text that is read to judge a corpus: enough for the sizes of documents, and a second's work.
SAMPLE_BYTES = 8 << 20
# A validation part of a tenth of less is a few sentences, on which no loss means anything.
LEAST_BYTES = 1_000
_SEGMENT_BYTES = 1 << 20
# Of English prose, gzip, zstd and Parquet store about a third.
_EXPANSION = 3
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


@dataclass(frozen=True)
class TextSurvey:
    """What a corpus holds.

    Attributes:
        n_bytes: of text in UTF-8, training and validation together.
        is_estimate: the figures are scaled up from the first ``SAMPLE_BYTES``.
        has_plain_text: some file is read as one document, where ``per_line`` would make one of each line.
        manifest: of a prepared folder, which brings its tokenizer and its validation part; else None.
    """

    sources: tuple[Source, ...]
    n_bytes: int
    n_documents: int
    is_estimate: bool
    has_plain_text: bool
    manifest: Manifest | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether the corpus is the one that comes with Python."""
        return any(isinstance(source, BuiltinSource) for source in self.sources)


@dataclass(frozen=True)
class Machine:
    """What trains: cores, and a GPU where one was asked for.

    Attributes:
        has_bf16: the device multiplies bfloat16 in hardware; None: unknown.
        gpu: name of the GPU; None: no GPU was asked for, or none is there.
        gpu_bytes: its memory.
    """

    n_cores: int
    has_bf16: bool | None
    gpu: str | None = None
    gpu_bytes: int | None = None


def survey_text(sources: Sequence[Source]) -> TextSurvey:
    """Look up all files of a corpus and read the first of its text.

    Raises:
        CorpusError: a path is missing, the text cannot be read, or there is too little of it.
        ConfigError: a prepared folder is named beside other sources.
        ArtifactError: a prepared folder is damaged.
    """
    prepared = find_prepared(sources)
    if prepared is not None:
        return _survey_prepared(tuple(sources), prepared.read_manifest())
    report = ReadReport()
    is_cut_short = False
    whole_files: set[str] = set()
    for document in read_documents(sources, report, segment_bytes=_SEGMENT_BYTES):
        if _is_whole_file(document.name):
            # A long file comes in several segments of one name.
            whole_files.add(document.name)
        if report.bytes >= SAMPLE_BYTES:
            is_cut_short = True
            break
    n_bytes, n_documents, n_whole = report.bytes, report.documents, len(whole_files)
    if is_cut_short:
        estimate, n_plain_files = _estimate(sources)
        n_bytes = max(n_bytes, estimate)
        # Of plain text each file is a document; records of other files come as often as in the sample.
        n_documents = max(n_whole, n_plain_files) + round((report.documents - n_whole) * n_bytes / report.bytes)
    if n_bytes < LEAST_BYTES:
        raise CorpusError(
            f"the corpus holds {n_bytes:,} bytes of text, too little to train on and to validate with; name text of "
            f"at least {LEAST_BYTES:,} bytes"
        )
    has_plain_text = n_whole > 0 and not any(isinstance(source, BuiltinSource) for source in sources)
    return TextSurvey(tuple(sources), n_bytes, n_documents, is_cut_short, has_plain_text)


def _estimate(sources: Sequence[Source]) -> tuple[int, int]:
    """Return about how many bytes of text the files of a corpus hold, judged by size and kind, and the plain files."""
    patterns = [source.path for source in sources if isinstance(source, PathSource)]
    n_bytes = n_plain = 0
    for path in [path for files in find_all(patterns, lambda reason, name: None) for path in files]:
        kind, packed = split_suffix(path)
        n_bytes += file_bytes(path) * (_EXPANSION if packed or kind == ".parquet" else 1)
        n_plain += kind not in (*JSON_LINES_SUFFIXES, ".parquet")
    return n_bytes, n_plain


def _is_whole_file(name: str) -> bool:
    kind, _ = split_suffix(name)
    # A document that is a whole file has the file's name; "a.jsonl:3" and "a.parquet:3" end in a number.
    return not re.search(r":[0-9]+$", name) and kind not in (*JSON_LINES_SUFFIXES, ".parquet")


def _survey_prepared(sources: tuple[Source, ...], manifest: Manifest) -> TextSurvey:
    if not manifest.validation.documents:
        raise CorpusError(
            "the prepared folder holds no validation part, without which neither the best checkpoint nor a comparison "
            "can be chosen; prepare it again with psannlm prep --val-split 0.01"
        )
    n_bytes = manifest.train.text_bytes + manifest.validation.text_bytes
    n_documents = manifest.train.documents + manifest.validation.documents
    return TextSurvey(sources, n_bytes, n_documents, False, False, manifest)


def survey_machine(*, with_gpu: bool) -> Machine:
    """Return what this machine trains with; torch is imported only ``with_gpu``."""
    if with_gpu:
        import torch

        from psannlm.runtime.device import computes_in_bf16, gpu_memory_bytes, pick_device

        device = pick_device("auto")
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            return Machine(usable_cores(), computes_in_bf16(device), name, gpu_memory_bytes(device))
    return Machine(usable_cores(), None if with_gpu else cpu_has_bf16())


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Return whether the CPU multiplies bfloat16 in hardware, as Linux lists its features; None elsewhere."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # x86 calls the list "flags", ARM "Features".
    lists = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return bool(_BF16_FLAGS & set(lists[0].split())) if lists else None


def sources_of(paths: Sequence[str], *, text_key: str = "text", errors: str = "strict") -> tuple[Source, ...]:
    """Return the sources that paths name, with what is set for all of them; without paths, the built-in text.

    Raises:
        ConfigError: a value is refused as ``data.sources`` refuses it.
        CorpusError: a path is empty.
    """
    if not paths:
        return DataConfig().sources
    if "" in paths:
        raise CorpusError("an empty path names no text; name a file, a folder, a glob or a URL")
    set_for_all = {"text_key": text_key, "errors": errors}
    return tuple(section_from_kwargs(PathSource, "data", {"path": path, **set_for_all}) for path in paths)
