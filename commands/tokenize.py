"""psannlm tokenize: fit a tokenizer on a corpus, or look at what one makes of a text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from psannlm.commands.options import JsonOption, figures_table, print_json, progress, results


def tokenize(
    corpus: Annotated[list[str] | None, typer.Argument(metavar="CORPUS...", help="Files, folders or globs.")] = None,
    backend: Annotated[str, typer.Option(help="auto, sentencepiece, tokenizers or simple.")] = "auto",
    vocab_size: Annotated[int, typer.Option(help="Entries at most.")] = 4096,
    per_line: Annotated[bool, typer.Option("--per-line", help="A document per line of a .txt file.")] = False,
    text_key: Annotated[str, typer.Option(help="Key of the text in .jsonl and .parquet files.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the fitted tokenizer.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A tokenizer file to look at instead of fitting one.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="With --model: text to encode.")] = None,
    from_stdin: Annotated[bool, typer.Option("--stdin", help="With --model: encode each line of stdin.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a tokenizer on a corpus, or show how one splits a text."""
    if (model is None) == (not corpus):
        raise typer.BadParameter("give a CORPUS to fit on, or --model to look at", param_hint="CORPUS")
    if model is None and (from_stdin or text is not None):
        raise typer.BadParameter("--text and --stdin look at a finished tokenizer: give --model", param_hint="--model")
    if model is not None and out is not None:
        raise typer.BadParameter("--model is only looked at; nothing is written", param_hint="--out")
    if model is None:
        _fit(corpus or [], backend, vocab_size, per_line, text_key, out, as_json)
    elif from_stdin == (text is not None):
        raise typer.BadParameter("--model needs --text TEXT or --stdin", param_hint="--text")
    else:
        # A line at a time, and cut where files are: str.splitlines would also cut at U+2028 and a dozen others.
        _show(model, (line.removesuffix("\n") for line in sys.stdin) if from_stdin else [text or ""], as_json)


def _fit(
    corpus: list[str], backend: str, vocab_size: int, per_line: bool, text_key: str, out: Path | None, as_json: bool
) -> None:
    from psannlm.config.data import PathSource
    from psannlm.data.fit import fit_with_card

    sources = [PathSource(path=path, per_line=per_line, text_key=text_key) for path in corpus]
    console = progress()
    with console.status("fitting"):
        card = fit_with_card(
            sources,
            backend=backend,
            vocab_size=vocab_size,
            out=out,
            notice=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )
    if as_json:
        print_json(card)
    else:
        results().print(figures_table("tokenizer", [(name.replace("_", " "), str(card[name])) for name in card]))


def _show(model: Path, lines: Iterable[str], as_json: bool) -> None:
    from psannlm.tokenizers.resolve import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows = []
    for line in lines:
        ids = tokenizer.encode(line)
        pieces = tokenizer.pieces(ids)
        if as_json:
            rows.append({"text": line, "ids": ids, "pieces": pieces})
        else:
            typer.echo(" ".join(f"{piece}:{token}" for piece, token in zip(pieces, ids, strict=True)))
    if as_json:
        print_json(rows)
