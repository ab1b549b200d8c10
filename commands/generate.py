"""psannlm generate: text generation from prompts, streamed to stdout, or in a dialog on the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from psannlm.commands.options import (
    DEFAULT_RUNS,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    EmaOption,
    JsonOption,
    RunsOption,
    find_model_file,
    live_line,
    print_json,
    stderr_console,
    text_argument,
)
from psannlm.io.self_hash import hash_ahead
from psannlm.runtime.collection import pausing_collection
from psannlm.runtime.streams import is_terminal, print_error_line, write_output

if TYPE_CHECKING:
    from psannlm.generation.generate import Completion
    from psannlm.models.artifact import LoadedModel
    from psannlm.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; may be repeated.")
]
PromptsFileOption = Annotated[
    Path | None,
    typer.Option("--prompts-file", help="File with one prompt per line, which are decoded as a batch; - reads stdin."),
]
TemperatureOption = Annotated[
    float, typer.Option(help="Softmax temperature; 0 takes the most likely token (greedy decoding).")
]
TopKOption = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only. Default: from all.")]
TopPOption = Annotated[
    float,
    typer.Option(help="Sample from the most likely tokens that together reach this probability; 1 samples from all."),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        help="Sample from tokens whose probability is at least this fraction of the most likely token's, such as 0.05. "
        "Default: from all."
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End a completion before this text, which is not printed; may be repeated, up to four times. A line end "
        "in bash: --stop $'\\n'.",
    ),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="K",
        help="With --json: add each token's log probability in nats, and the K most likely tokens with theirs. "
        "Default: none.",
    ),
]
InteractiveOption = Annotated[
    bool,
    typer.Option(
        "--interactive",
        "-i",
        help="Read prompts from the terminal, line by line; Ctrl-C stops an answer, Ctrl-D ends the program.",
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        help="Factor by which tokens that occur already become less likely, such as 1.2. Default: no penalty."
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Seed of sampling; the same seed gives the same text. Default: a new seed each time."),
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile decoding, which takes up to a minute and then decodes several times faster. Default: compile "
        "for long texts only.",
    ),
]
SpeculateOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Draft tokens per step for speculative decoding, copied from the text so far; the output stays the same.",
    ),
]
ContextOption = Annotated[
    Literal["stop", "slide"],
    typer.Option(help="What to do when the context is full: stop, or drop the oldest half and continue (slide)."),
]


def generate(
    prompt: PromptOption = None,
    prompts_file: PromptsFileOption = None,
    interactive: InteractiveOption = False,
    checkpoint: CheckpointOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    ema: EmaOption = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate per prompt.")] = 128,
    stop: StopOption = None,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.9,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = "float32",
    compile: CompileOption = None,
    speculate: SpeculateOption = 0,
    context: ContextOption = "stop",
    logprobs: LogprobsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts with a trained model.

    A terminal is shown control characters as escapes; a file or pipe gets the text as it is.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log probabilities are part of the JSON output; add --json", param_hint="--logprobs")
    if interactive:
        _require_dialog(prompt or prompts_file, as_json)
    prompts = [*map(text_argument, prompt or []), *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if not prompts and not interactive:
        raise typer.BadParameter("give --prompt TEXT, --prompts-file FILE or --interactive", param_hint="--prompt")

    if checkpoint is not None and not ema:
        # While torch is loaded, which takes longer.
        hash_ahead(checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint)
    with pausing_collection():
        from psannlm.generation.engine import Engine
        from psannlm.generation.generate import choose_compiling
        from psannlm.generation.generate import generate as complete
        from psannlm.generation.logprobs import require_logprobs
        from psannlm.generation.requests import SamplingConfig
        from psannlm.generation.stop_texts import require_stop_texts

        sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed, min_p)
        stops = require_stop_texts(map(text_argument, stop or ()))
        require_logprobs(logprobs)
        path, loaded, tokenizer = _load(checkpoint, runs, ema, device, bool(compile))
        engine = Engine(
            loaded.model,
            dtype=dtype,
            compile=choose_compiling("auto" if compile is None else compile, max_new_tokens),
            in_place=True,
        )
    for notice in engine.notices:
        log.warning(notice)
    answer = partial(
        complete,
        engine,
        tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        speculate=speculate,
        context=context,
        stop=stops,
        logprobs=logprobs,
    )
    if interactive:
        _converse(answer, loaded.model.config.max_seq_len)
        return
    completions = _complete(answer, prompts, is_streamed=len(prompts) == 1 and not as_json)
    if as_json:
        rows = _rows(prompts, completions, tokenizer, has_stop=bool(stops))
        print_json({"checkpoint": str(path), "completions": rows})
    elif len(prompts) > 1:
        for number, (text, done) in enumerate(zip(prompts, completions, strict=True), start=1):
            _write(f"--- {number} of {len(prompts)}\n{text}{done.text}\n")
    _report_full(completions, loaded.model.config.max_seq_len)


def _require_dialog(prompts: object, as_json: bool) -> None:
    """Refuse --interactive beside prompts or JSON, and without a terminal to read from."""
    if prompts or as_json:
        other = "--json" if not prompts else "--prompt and --prompts-file"
        raise typer.BadParameter(f"it does not go with {other}; leave one out", param_hint="--interactive")
    if not is_terminal(sys.stdin):
        raise typer.BadParameter(
            "standard input is not a terminal; read prompts from it with --prompts-file -", param_hint="--interactive"
        )


def _load(
    checkpoint: Path | None, runs: Path, ema: bool, device: str, compile: bool
) -> tuple[Path, LoadedModel, Tokenizer]:
    """Return the model's path, the model on its device and its tokenizer. Raises ArtifactError without a tokenizer."""
    from psannlm.errors import ArtifactError
    from psannlm.kernels.compiler import require_compiler
    from psannlm.models.artifact import load_model
    from psannlm.runtime.device import pick_device

    if compile:
        require_compiler(pick_device(device), "--compile", "leave it out")
    path = find_model_file(checkpoint, runs, ema=ema)
    loaded = load_model(path)
    if loaded.tokenizer is None:
        raise ArtifactError(f"{path} has no tokenizer, which generation needs")
    loaded.model.to(pick_device(device))
    if checkpoint is None:
        log.info(f"using {path}")
    return path, loaded, loaded.tokenizer


def _complete(answer: Callable[..., list[Completion]], prompts: list[str], *, is_streamed: bool) -> list[Completion]:
    """Return the completions, with progress for several prompts, and streamed to stdout where asked."""
    # The prompt is written together with the first text after it: one that is refused is not text to show.
    unwritten = prompts[:1] if is_streamed else []

    def stream(text: str) -> None:
        _write("".join([*unwritten, text]))
        unwritten.clear()

    with live_line(stderr_console()) if len(prompts) > 1 else nullcontext() as line:
        completions = answer(
            prompts,
            on_text=(lambda _, text: stream(text)) if is_streamed else None,
            on_progress=None if line is None else line.show,
        )
    if is_streamed:
        stream("\n")
    return completions


def _converse(answer: Callable[..., list[Completion]], max_seq_len: int | None) -> None:
    """Answer lines from the terminal until it ends (Ctrl-D); Ctrl-C stops an answer, or discards a line."""
    from psannlm.errors import GenerationError, TokenizerError

    # Line editing, and the lines entered before; without it input() still reads lines.
    with suppress(ImportError):
        import readline  # noqa: F401
    log.info("Each line is a prompt of its own. Ctrl-C stops an answer, Ctrl-D ends the program.")
    while True:
        try:
            prompt = text_argument(input("> "))
            if not prompt.strip():
                continue
            completions = answer([prompt], on_text=lambda _, text: _write(text))
            _write("\n")
            _report_full(completions, max_seq_len)
        except KeyboardInterrupt:
            _write("\n")
        except EOFError:
            _write("\n")
            return
        except (GenerationError, TokenizerError) as error:
            print_error_line(f"error: {error}")


def _report_full(completions: Sequence[Completion], max_seq_len: int | None) -> None:
    if n_full := sum(done.finish_reason == "context" for done in completions):
        which = "" if len(completions) == 1 else f" for {n_full} of {len(completions)} prompts"
        log.warning(f"stopped early{which}: the model's context of {max_seq_len} tokens is full")


def _rows(
    prompts: Sequence[str], completions: Sequence[Completion], tokenizer: Tokenizer, *, has_stop: bool
) -> list[dict[str, object]]:
    """Return the completions as ``--json`` prints them."""
    rows = []
    for text, done in zip(prompts, completions, strict=True):
        row: dict[str, object] = {
            "prompt": text,
            "completion": done.text,
            "tokens": len(done.ids),
            "finish_reason": done.finish_reason,
            # Deprecated, with the value it had before `finish_reason`.
            "stopped_by": "end_of_text" if done.finish_reason == "stop" and not done.stop_text else done.finish_reason,
        }
        if has_stop:
            row["stop_text"] = done.stop_text
        if done.logprobs is not None:
            row["logprobs"] = _logprob_rows(text, done, tokenizer)
        rows.append(row)
    return rows


def _logprob_rows(prompt: str, done: Completion, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Return the log probabilities of a completion's tokens; the text of each is what it adds to the token before."""
    from psannlm.generation.row_text import continuation_text, encode_prompt

    before = encode_prompt(tokenizer, prompt)[-1]
    rows = []
    for scored in done.logprobs or ():
        rows.append(
            {
                "id": scored.token,
                "text": continuation_text(tokenizer, [before], [scored.token]),
                "logprob": scored.logprob,
                "top": [
                    {"id": token, "text": continuation_text(tokenizer, [before], [token]), "logprob": logprob}
                    for token, logprob in scored.top
                ],
            }
        )
        before = scored.token
    return rows


def _read_prompts(path: Path) -> list[str]:
    """Return the lines of a file, or of stdin for ``-``, without the blank ones."""
    from psannlm.data.corpus.reading import read_lines
    from psannlm.errors import CorpusError
    from psannlm.io.limits import MAX_PROMPTS_BYTES

    prompts = []
    n_bytes = 0
    for line in read_lines(str(path)):
        n_bytes += len(line)
        if n_bytes > MAX_PROMPTS_BYTES:
            raise CorpusError(f"{path}: more than {MAX_PROMPTS_BYTES >> 20} MiB of prompts; split the file")
        if line.strip():
            prompts.append(line.removesuffix("\n").removesuffix("\r"))
    if not prompts:
        raise typer.BadParameter(f"{path} holds no prompt: every line is blank", param_hint="--prompts-file")
    return prompts


def _write(text: str) -> None:
    write_output(text)
    sys.stdout.flush()
