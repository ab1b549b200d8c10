"""``psannlm prep``: a corpus of any size to a folder of token shards that training maps into memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from psannlm.commands.options import (
    ErrorsOption,
    JsonOption,
    LiveLine,
    PerLineOption,
    TextKeyOption,
    figures_table,
    keep_record,
    live_line,
    print_json,
    print_path,
    require_existing,
    stderr_console,
    stdout_console,
)
from psannlm.display import shell_command, yaml_scalar

if TYPE_CHECKING:
    from psannlm.prep.pipeline import PrepResult


_SHIPPED_CONFIG = "configs/waveresnet_cpu.yaml"


CorpusArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="CORPUS...", help="Files, folders, globs or URLs; - is standard input."),
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Tokenizer file, .model or .json, as psannlm tokenize writes it.")
]
ValSplitOption = Annotated[
    float, typer.Option(help="Fraction of the documents held out for validation; 0 holds out none.")
]
StdinFormatOption = Annotated[Literal["txt", "jsonl"], typer.Option("--format", help="Format of standard input.")]
MaxCharsOption = Annotated[
    int | None, typer.Option(help="Leave out documents of more characters; by default there is no limit.")
]
KeepDuplicatesOption = Annotated[
    bool,
    typer.Option(
        "--keep-duplicates", help="Keep documents whose text repeats an earlier one; by default they are left out."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        help="Number of encoding processes (default: one per core, within the memory); with --ray-address, the number "
        "of chunks that are encoded at once (default: one per core of the cluster)."
    ),
]
PartOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Prepare only the I-th of N parts of the corpus, to be joined with --merge."),
]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="Join prepared parts: CORPUS are the folders or URLs of all parts.")
]
OutOption = Annotated[
    str | None,
    typer.Option(
        "--out", metavar="FOLDER", help="Folder for the shards and the manifest, or a URL such as s3://bucket/shards."
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="FOLDER",
        help="Folder on a local disk for unfinished work while --out is a URL, and for copies of parts at URLs "
        "(default: $PSANNLM_CACHE_DIR, or ~/.cache/psannlm).",
    ),
]


EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine",
        help="What encodes the text: processes of this machine (local), or a Ray cluster. The shards are the same.",
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ray cluster for --engine ray, of which this machine is a node; by default one is started here for the "
        "time of the command.",
    ),
]
ReadOnOption = Annotated[
    Literal["driver", "workers"],
    typer.Option(
        help="With --engine ray, what reads the corpus: the machine of the command (driver), or the workers, all of "
        "which must see the same files or URLs."
    ),
]


def prep(
    corpus: CorpusArgument = None,
    tokenizer: TokenizerOption = None,
    out: OutOption = None,
    val_split: ValSplitOption = 0.01,
    seed: Annotated[int, typer.Option(help="Seed that decides which documents are held out.")] = 1337,
    shard_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a shard.")] = 100_000_000,
    workers: WorkersOption = None,
    per_line: PerLineOption = False,
    text_key: TextKeyOption = "text",
    stdin_format: StdinFormatOption = "txt",
    errors: ErrorsOption = "strict",
    min_chars: Annotated[int, typer.Option(help="Leave out documents of fewer characters.")] = 1,
    max_chars: MaxCharsOption = None,
    keep_duplicates: KeepDuplicatesOption = False,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
    read_on: ReadOnOption = "driver",
    part: PartOption = None,
    merge: MergeOption = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a corpus into token shards and a manifest, in bounded memory and on all cores.

    After an interruption the same command resumes. Printed token counts are of the tokens that a model learns to
    predict: those of the text and one end of text (EOS) per document, as train and eval count them.
    """
    if not corpus:
        raise typer.BadParameter("name files, folders, globs or URLs", param_hint="CORPUS")
    if out is None:
        raise typer.BadParameter("name the folder to make", param_hint="--out")
    with live_line(stderr_console()) as line:
        if merge:
            if engine != "local" or ray_address is not None or read_on != "driver":
                raise typer.BadParameter("--merge encodes nothing; leave out --engine", param_hint="--engine")
            result = _merge(corpus, out, cache_dir, line)
        else:
            if tokenizer is None:
                raise typer.BadParameter("name a tokenizer; psannlm tokenize makes one", param_hint="--tokenizer")
            require_existing("--tokenizer", tokenizer, what="tokenizer")
            from psannlm.commands.options import naming_options
            from psannlm.prep.job import PrepSettings
            from psannlm.prep.pipeline import prepare_corpus

            with naming_options(""):
                settings = PrepSettings(
                    text_key=text_key,
                    per_line=per_line,
                    stdin_format=stdin_format,
                    errors=errors,
                    min_chars=min_chars,
                    max_chars=max_chars,
                    val_split=val_split,
                    seed=seed,
                    shard_tokens=shard_tokens,
                    keep_duplicates=keep_duplicates,
                )
            result = prepare_corpus(
                corpus,
                tokenizer,
                out,
                settings,
                n_workers=workers,
                part=_part(part),
                on_progress=line.show,
                cache_dir=cache_dir,
                engine=engine,
                ray_address=ray_address,
                read_on=read_on,
            )
    if not result.was_done:
        keep_record(
            result.folder, "prep", result.as_dict(), _splits(result), figures_table("corpus", _corpus_rows(result))
        )
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)


def _merge(corpus: list[str], out: str, cache_dir: Path | None, line: LiveLine) -> PrepResult:
    from psannlm.io.urls import is_remote
    from psannlm.prep.merge import merge_parts

    folders = [folder if is_remote(folder) else Path(folder) for folder in corpus]
    require_existing("CORPUS", *(each for each in folders if isinstance(each, Path)), what="prepared folder")
    return merge_parts(folders, out, on_progress=line.show, cache_dir=cache_dir)


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not I/N, such as 1/4", param_hint="--part")
    return int(index), int(of)


def _splits(result: PrepResult) -> Table:
    table = Table(title="prep", title_justify="left", title_style="bold")
    table.add_column("", style="cyan")
    for name in ("documents", "bytes", "tokens", "bytes per token", "shards"):
        table.add_column(name, justify="right")
    for name, split in (("train", result.manifest.train), ("validation", result.manifest.validation)):
        n_tokens = split.predicted_tokens
        per_token = f"{split.text_bytes / n_tokens:.2f}" if n_tokens else "-"
        figures = (f"{split.documents:,}", f"{split.text_bytes:,}", f"{n_tokens:,}")
        table.add_row(name, *figures, per_token, f"{len(split.shards):,}")
    return table


def _corpus_rows(result: PrepResult) -> list[tuple[str, str]]:
    manifest = result.manifest
    rows = [(f"left out: {reason}", f"{count:,}") for reason, count in manifest.drops.items()]
    rows.append(("duplicates left out", f"{manifest.duplicates:,}"))
    if not result.was_done:
        rate = f"{result.n_corpus_bytes / 1e6:,.1f} MB"
        if result.seconds:
            rate += f" in {result.seconds:,.1f} s, {result.n_corpus_bytes / 1e6 / result.seconds:,.1f} MB/s"
        rows.append(("read", rate))
    return [
        *rows,
        ("tokenizer", f"{manifest.tokenizer.backend}, fingerprint {manifest.tokenizer.fingerprint:.12}"),
        *_lost(manifest.lost_fraction),
        ("content", f"{manifest.content_sha256:.12}"),
        ("folder", str(result.folder)),
    ]


def _lost(fraction: float | None) -> list[tuple[str, str]]:
    if not fraction:
        return []
    return [("text lost by the tokenizer", f"{fraction:.2%} of the bytes checked: bits per byte are too low")]


def _show(result: PrepResult) -> None:
    if result.was_done:
        print_path(f"{result.folder} is prepared already; nothing to do")
    stdout_console().print(_splits(result))
    stdout_console().print(figures_table("corpus", _corpus_rows(result)))
    if result.manifest.part == "1/1":
        # In a clone the shipped configuration exists; elsewhere the user has to name one.
        config = _SHIPPED_CONFIG if Path(_SHIPPED_CONFIG).is_file() else "CONFIG"
        sources = f"data.sources=[{yaml_scalar(result.folder)}]"
        is_url = isinstance(result.folder, str)
        out = f"runs/{(Path(result.folder) if is_url else Path(result.folder).resolve()).name}"
        command = shell_command("psannlm", "train", config, "--set", sources, "--set", "data.val_split=0", "--out", out)
        note = "" if config != "CONFIG" else ", with your configuration file for CONFIG"
        print_path(f"next{note}: {command}", style="bold")
