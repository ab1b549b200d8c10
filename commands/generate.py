"""psannlm generate: text generation from prompts, streamed to stdout."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from psannlm.commands.options import (
    DEFAULT_RUNS,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    RunsOption,
    find_model_file,
    live_line,
    print_json,
    stderr_console,
    text_argument,
)
from psannlm.display import printable
from psannlm.runtime.streams import write_output

if TYPE_CHECKING:
    from psannlm.generation.generate import Completion

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
    checkpoint: CheckpointOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate per prompt.")] = 128,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.9,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = "float32",
    compile: CompileOption = None,
    speculate: SpeculateOption = 0,
    context: ContextOption = "stop",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts with a trained model.

    A terminal is shown control characters as escapes; a file or pipe gets the text as it is.
    """
    prompts = [*map(text_argument, prompt or []), *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if not prompts:
        raise typer.BadParameter("give --prompt TEXT or --prompts-file FILE", param_hint="--prompt")

    from psannlm.errors import ArtifactError
    from psannlm.generation.generate import generate as complete
    from psannlm.generation.sampling import SamplingConfig
    from psannlm.models.artifact import load_model
    from psannlm.runtime.device import pick_device, require_compiler

    sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed)
    if compile:
        require_compiler(pick_device(device), "--compile", "leave it out")
    path = find_model_file(checkpoint, runs)
    loaded = load_model(path)
    if loaded.tokenizer is None:
        raise ArtifactError(f"{path} has no tokenizer, which generation needs")
    loaded.model.to(pick_device(device))
    if checkpoint is None:
        _say(f"using {path}")

    is_streamed = len(prompts) == 1 and not as_json
    # The prompt is written together with the first text after it: one that is refused is not text to show.
    unwritten = prompts[:1] if is_streamed else []

    def stream(text: str) -> None:
        _write("".join([*unwritten, text]))
        unwritten.clear()

    began = time.monotonic()

    with live_line(stderr_console()) if len(prompts) > 1 else nullcontext() as line:
        completions = complete(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            dtype=dtype,
            compile="auto" if compile is None else compile,
            speculate=speculate,
            context=context,
            on_notice=_say,
            on_text=(lambda _, text: stream(text)) if is_streamed else None,
            on_progress=None
            if line is None
            else (lambda *figures: line.show(_progress_text(time.monotonic() - began, *figures))),
        )
    if as_json:
        print_json({"checkpoint": str(path), "completions": _rows(prompts, completions)})
    elif is_streamed:
        stream("\n")
    else:
        for number, (text, done) in enumerate(zip(prompts, completions, strict=True), start=1):
            _write(f"--- {number} of {len(prompts)}\n{text}{done.text}\n")
    if n_full := sum(done.finish_reason == "context" for done in completions):
        which = "" if len(prompts) == 1 else f" for {n_full} of {len(prompts)} prompts"
        _say(f"stopped early{which}: the model's context of {loaded.model.config.max_seq_len} tokens is full")


def _progress_text(elapsed_s: float, n_tokens: int, n_steps: int, most_steps: int) -> str:
    # By steps and not by tokens: a step with fewer rows takes hardly less time.
    left = timedelta(seconds=math.ceil(elapsed_s * (most_steps - n_steps) / n_steps))
    return f"generating: {n_tokens:,} tokens, {n_tokens / elapsed_s:,.1f} tokens/s, at most {left} left"


def _rows(prompts: Sequence[str], completions: Sequence[Completion]) -> list[dict[str, object]]:
    """Return the completions as ``--json`` prints them."""
    return [
        {
            "prompt": text,
            "completion": done.text,
            "tokens": len(done.ids),
            "finish_reason": done.finish_reason,
            # Deprecated, with the value it had before `finish_reason`.
            "stopped_by": "end_of_text" if done.finish_reason == "stop" else done.finish_reason,
        }
        for text, done in zip(prompts, completions, strict=True)
    ]


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


def _say(text: str) -> None:
    stderr_console().print(Text(printable(text, keep="\n")), style="dim", soft_wrap=True)


def _write(text: str) -> None:
    write_output(text)
    sys.stdout.flush()
