"""``psannlm tokenize``: fit a tokenizer on a corpus, or encode and decode text with an existing one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psannlm.commands.options import (
    ErrorModes,
    ErrorsOption,
    JsonOption,
    PerLineOption,
    TextKeyOption,
    figures_table,
    keep_record,
    live_line,
    print_json,
    quiet_pipe,
    require_existing,
    stderr_console,
    stdout_console,
    text_argument,
)
from psannlm.display import printable
from psannlm.runtime.streams import is_terminal

if TYPE_CHECKING:
    from psannlm.data.record_figures import TokenizerCard
    from psannlm.tokenizers.base import Tokenizer


CorpusArgument = Annotated[
    list[str] | None, typer.Argument(metavar="CORPUS...", help="Corpus to fit on: files, folders, globs or URLs.")
]
BackendOption = Annotated[str, typer.Option(help="Tokenizer library: auto, sentencepiece, tokenizers or simple.")]
ModelTypeOption = Annotated[str | None, typer.Option(help="Model type of sentencepiece: unigram (the default) or bpe.")]
SampleCharsOption = Annotated[
    int | None, typer.Option(min=1, help="Characters sampled from the corpus to fit on (default 8,000,000).")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="File of the fitted tokenizer (default tokenizer.model or .json).")
]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Existing tokenizer file to use instead of fitting one.")
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="With --model: encode each line of a file (gzip and zstd are unpacked; - is stdin).",
    ),
]
FromStdinOption = Annotated[bool, typer.Option("--stdin", help="With --model: encode each line of standard input.")]
IdsOnlyOption = Annotated[bool, typer.Option("--ids", help="With --model: print only ids, without their pieces.")]
DecodeOption = Annotated[
    bool,
    typer.Option("--decode", help="With --model: decode lines of ids to their exact text (default input: stdin)."),
]
JsonlOption = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help='With --model: convert lines {"text": ...} to {"ids": [...]}; default input: stdin.',
    ),
]


def tokenize(
    corpus: CorpusArgument = None,
    backend: BackendOption = "auto",
    model_type: ModelTypeOption = None,
    vocab_size: Annotated[int, typer.Option(help="Maximum vocabulary size.")] = 4096,
    sample_chars: SampleCharsOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the held-out text.")] = 1337,
    per_line: PerLineOption = False,
    text_key: TextKeyOption = "text",
    errors: ErrorsOption = "strict",
    out: OutOption = None,
    model: ModelOption = None,
    text: Annotated[str | None, typer.Option("--text", help="With --model: encode this text.")] = None,
    file: FileOption = None,
    from_stdin: FromStdinOption = False,
    ids_only: IdsOnlyOption = False,
    decode: DecodeOption = False,
    jsonl: JsonlOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a tokenizer on a corpus, or, with --model, encode and decode text."""
    if (model is None) == (not corpus):
        raise typer.BadParameter(
            "give either a CORPUS to fit on or an existing tokenizer with --model", param_hint="CORPUS"
        )
    if model is None:
        if from_stdin or decode or jsonl or ids_only or text is not None or file is not None:
            raise typer.BadParameter(
                "--text, --file, --stdin, --ids, --decode and --jsonl need an existing tokenizer: give --model",
                param_hint="--model",
            )
        card = _fit(corpus or [], per_line, text_key, errors, as_json, backend=backend, model_type=model_type,
                    vocab_size=vocab_size, sample_chars=sample_chars, seed=seed, out=out)  # fmt: skip
        table = figures_table("tokenizer", _card_rows(card))
        # tokenizer.model and tokenizer.json may be in one folder, so the whole name is used.
        keep_record(Path(f"{card.file}.record"), "tokenize", card.as_dict(), table)
        if as_json:
            print_json(card.as_dict())
        else:
            stdout_console().print(table)
        return
    if out is not None:
        raise typer.BadParameter("nothing is written with --model; leave --out away", param_hint="--out")
    n_inputs = from_stdin + (text is not None) + (file is not None)
    if n_inputs > 1 or not (n_inputs or decode or jsonl):
        raise typer.BadParameter("--model needs one of --text TEXT, --file PATH or --stdin", param_hint="--text")
    if as_json and (jsonl or ids_only):
        raise typer.BadParameter(
            "--json prints one document with ids and pieces; leave --jsonl and --ids away", param_hint="--json"
        )
    from psannlm.tokenizers.resolve import load_tokenizer
    from psannlm.tokenizers.stream import text_lines

    require_existing("--model", model, what="tokenizer")
    if file is not None:
        require_existing("--file", file)
    tokenizer = load_tokenizer(model)
    is_file = file is not None and str(file) != "-"
    name = "--text" if text is not None else str(file) if is_file else "stdin"
    with quiet_pipe():
        lines = text_lines(_lines(file, text), name, errors)
        if as_json:
            print_json(list(_rows(tokenizer, lines, decode)))
            return
        for answer in _answers(tokenizer, lines, decode, jsonl, ids_only, text_key, errors):
            # Control characters are escaped on a terminal; a file or pipe gets every byte.
            shown = printable(answer, keep="\n\t") if is_terminal(sys.stdout) else answer
            sys.stdout.buffer.write(shown.encode("utf-8"))
            if not is_file:
                sys.stdout.buffer.flush()  # the writer of the lines may wait for each answer


def _lines(file: Path | None, text: str | None) -> Iterator[bytes]:
    """Yield lines as bytes, cut only at \\n: Python's text mode would change other line ends."""
    from psannlm.data.corpus.files import STDIN
    from psannlm.data.corpus.reading import bounded_lines, opened, shown_name
    from psannlm.errors import TokenizerError

    if text is not None:
        try:
            yield text_argument(text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError("--text is not UTF-8; convert it, or use --file") from error
        return
    path = STDIN if file is None else str(file)
    with opened(path, waits=False) as source:
        yield from bounded_lines(source, shown_name(path))


def _answers(
    tokenizer: Tokenizer,
    lines: Iterable[str],
    decode: bool,
    jsonl: bool,
    ids_only: bool,
    text_key: str,
    errors: str,
) -> Iterator[str]:
    from psannlm.tokenizers import stream

    if jsonl and decode:
        return (line + "\n" for line in stream.decoded_json(tokenizer, lines, text_key))
    if jsonl:
        return (line + "\n" for line in stream.encoded_json(tokenizer, lines, text_key, errors))
    if decode:
        return stream.decoded_lines(tokenizer, lines)
    rows = stream.encoded_lines(tokenizer, lines)
    return ((" ".join(map(str, ids)) if ids_only else stream.shown(tokenizer, ids)) + "\n" for ids in rows)


def _rows(tokenizer: Tokenizer, lines: Iterable[str], decode: bool) -> Iterator[dict[str, Any]]:
    from psannlm.tokenizers.stream import parsed_ids

    for line in lines:
        ids = parsed_ids(line) if decode else tokenizer.encode(line)
        yield {"text": tokenizer.decode(ids) if decode else line, "ids": ids, "pieces": tokenizer.pieces(ids)}


def _fit(
    corpus: list[str], per_line: bool, text_key: str, errors: ErrorModes, as_json: bool, **options: Any
) -> TokenizerCard:
    from psannlm.config.data import PathSource
    from psannlm.data.tokenizer_training import fit_with_card

    if options["sample_chars"] is None:
        del options["sample_chars"]
    with live_line(stderr_console()) as line:
        return fit_with_card(
            [PathSource(path=path, per_line=per_line, text_key=text_key, errors=errors) for path in corpus],
            replace_option="--errors replace",
            on_progress=line.show,
            **options,
        )


def _card_rows(card: TokenizerCard) -> list[tuple[str, str]]:
    """Return the figures of the card as rows of a table."""
    from psannlm.tokenizers.base import printable as spelled

    kind = f"{card.backend}, {card.model_type}" if card.model_type else card.backend
    pieces = "  ".join(spelled(piece).replace(" ", "▁") for piece in card.longest_pieces)
    return [
        ("file", card.file),
        ("kind", kind),
        ("vocabulary", f"{card.vocab_size:,} of {card.vocab_size_asked:,} requested"),
        ("fitted on", f"{card.fitted_on_chars:,} characters of a corpus of {card.corpus_bytes:,} bytes"),
        ("held-out text", f"{card.held_out_bytes:,} bytes in {card.held_out_tokens:,} tokens"),
        ("bytes per token", f"{card.held_out_bytes_per_token:.3f}"),
        ("byte fallback", f"{card.held_out_byte_fallback_share:.3%} of the tokens"),
        ("round trip", "exact" if card.held_out_is_lossless else "NOT exact: text is lost"),
        ("longest pieces", pieces),
        ("fingerprint", card.fingerprint),
        ("card", str(card.card)),
    ]
