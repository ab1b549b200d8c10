"""Prompts as text in; their continuations as text out, streamed in whole characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from psannlm.errors import GenerationError
from psannlm.generation.batch_decode import ContextRule, Decoding, StopReason
from psannlm.generation.detokenize import TextStream
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.sampling import SamplingConfig
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

# Passes from which compiling them repays itself on a CPU: half a minute, against some milliseconds of each pass.
REPAYING_PASSES = 8192


@dataclass(frozen=True)
class Completion:
    """What followed a prompt: token ids (end of text left out), their text, and why it ends there.

    ``stopped_by`` is ``end_of_text``, ``length`` (max_new_tokens reached) or ``context`` (no room for more).
    """

    ids: list[int]
    text: str
    stopped_by: StopReason


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt, led by the beginning-of-text that every training document starts with."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def continuation_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Return the text that ``new_ids`` add to that of ``prompt_ids``.

    The two decoded as a whole are the text of the prompt followed by this. Decoded alone, the new ids would lose the
    space before their first word with every tokenizer that drops the one before the first token (SentencePiece's
    ``add_dummy_prefix``).
    """
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *new_ids])
    # A decoder that cleans up may alter the prompt's last characters: what follows the part that stays is new.
    if whole.startswith(before):
        return whole[len(before) :]
    return whole[next((i for i, (old, new) in enumerate(zip(before, whole, strict=False)) if old != new), len(whole)) :]


def _texts(prompts: object) -> list[str]:
    """Return the prompts as a list. Raises GenerationError for anything but strings; one alone is no list of them."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise GenerationError(f"prompts {prompts!r:.60} is not a list of strings")
    texts = list(prompts)
    for row, prompt in enumerate(texts):
        if not isinstance(prompt, str):
            raise GenerationError(f"prompt {row} is {type(prompt).__name__} {prompt!r:.60}; give a string")
    return texts


def choose_compiling(compile: bool | Literal["auto"], max_new_tokens: int) -> bool | Literal["auto"]:
    """Return what an engine is to do about compiling; ``auto`` stays so from ``REPAYING_PASSES`` new tokens on.

    Raises:
        GenerationError: ``compile`` is none of true, false and auto.
    """
    if compile == "auto":
        return "auto" if isinstance(max_new_tokens, Integral) and int(max_new_tokens) >= REPAYING_PASSES else False
    if not isinstance(compile, bool):
        raise GenerationError(f"compile {compile!r:.40} is not true, false or auto")
    return compile


def generate(
    model: Transformer | Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig | None = None,
    dtype: WeightDtype = "float32",
    compile: bool | Literal["auto"] = "auto",
    speculate: int = 0,
    context: ContextRule = "stop",
    on_text: Callable[[int, str], None] | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_notice: Callable[[str], None] = lambda notice: None,
) -> list[Completion]:
    """Continue each prompt, all in one batch; with a seed, a row's text is the same alone and in company.

    The model runs as in evaluation, without dropout, and is left as it was.

    Args:
        model: or an engine that was made of it before; ``dtype`` and ``compile`` are the engine's then.
        sampling: None uses the defaults of :class:`SamplingConfig`.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``int8``.
        compile: put decoding through torch.compile; ``auto`` does so from ``REPAYING_PASSES`` new tokens on.
        speculate, context: see :class:`~psannlm.generation.batch_decode.Decoding`.
        on_text: called with (row, text) as text becomes certain: never a part of a character. The parts of a row
            join to its completion's text.
        on_progress: called after each step but the last with (tokens so far, steps so far, steps at most); a step adds
            a token to every row that has not ended, or more where guesses were right.
        on_notice: told what was asked for and is had in another way.

    Raises:
        GenerationError: a prompt or setting cannot be honoured.
        DeviceError: ``compile`` is true, and the compiler is missing or broken.
    """
    prompts = _texts(prompts)
    if isinstance(model, Engine):
        engine = model
    else:
        engine = Engine(model, dtype=dtype, compile=choose_compiling(compile, max_new_tokens))
    for notice in engine.notices:
        on_notice(notice)
    special = tokenizer.special_ids - {tokenizer.eos_id}
    unused = range(tokenizer.vocab_size, engine.model.config.vocab_size or 0)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    decoding = Decoding(
        engine,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling or SamplingConfig(),
        eos_id=tokenizer.eos_id,
        forbidden_ids=[*sorted(special), *unused],
        speculate=speculate,
        context=context,
    )
    streams = [TextStream(tokenizer, ids) for ids in prompt_ids] if on_text is not None else []
    n_tokens = n_steps = 0
    for event in decoding:
        if on_progress is not None and len(decoding.generated[event.row]) > n_steps + 1:
            n_steps += 1
            on_progress(n_tokens, n_steps, max(decoding.room))
        n_tokens += 1
        if on_text is not None and (part := streams[event.row].add(event.token)):
            on_text(event.row, part)
    completions = []
    for row, (ids, reason) in enumerate(zip(decoding.generated, decoding.stopped_by, strict=True)):
        text = continuation_text(tokenizer, prompt_ids[row], ids)
        if on_text is not None and len(text) > streams[row].length:
            on_text(row, text[streams[row].length :])
        completions.append(Completion(ids, text, reason))
    return completions
