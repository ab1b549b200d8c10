"""Text generation: prompts in, completions out, streamed in whole characters; samples of a model in training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from psannlm.errors import GenerationError
from psannlm.generation.batch_decode import BatchDecoder, ContextRule, context_limit
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.requests import FinishReason, SamplingConfig, TokenLogprob
from psannlm.generation.row_text import RowText, encode_prompt, forbidden_ids
from psannlm.generation.stop_texts import require_stop_texts
from psannlm.models.transformer import Transformer
from psannlm.runtime.progress import OnProgress, Progress
from psannlm.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

# Decoding steps from which compiling pays off on a CPU: half a minute once, against some milliseconds of each step.
COMPILE_BREAK_EVEN_STEPS = 8192
# Shorter contexts cannot slide.
_MIN_SLIDING_CONTEXT = 4


@dataclass(frozen=True)
class Completion:
    """Continuation of a prompt: token ids without the end of text, their text, and the finish reason.

    Attributes:
        ids: with a stop text, they include the tokens that spell it.
        text: with a stop text, it ends before it.
        finish_reason: ``stop`` (end of text or a stop text), ``length`` (``max_new_tokens``) or ``context`` (the
            context is full).
        stop_text: the stop text that ended the completion.
        logprobs: of each id, where they were asked for.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_text: str | None = None
    logprobs: list[TokenLogprob] | None = None


def _texts(prompts: object) -> list[str]:
    """Return the prompts as a list. Raises GenerationError for anything but strings, and for one string alone."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise GenerationError(f"prompts {prompts!r:.60} is not a list of strings")
    texts = list(prompts)
    for row, prompt in enumerate(texts):
        if not isinstance(prompt, str):
            raise GenerationError(f"prompt {row} is {type(prompt).__name__} {prompt!r:.60}; give a string")
    return texts


def choose_compiling(compile: bool | Literal["auto"], max_new_tokens: int) -> bool | Literal["auto"]:
    """Return the engine's ``compile``: ``auto`` stays ``auto`` from ``COMPILE_BREAK_EVEN_STEPS`` new tokens on.

    Raises:
        GenerationError: ``compile`` is not true, false or auto.
    """
    if compile == "auto":
        return (
            "auto"
            if isinstance(max_new_tokens, Integral) and int(max_new_tokens) >= COMPILE_BREAK_EVEN_STEPS
            else False
        )
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
    stop: str | Iterable[str] = (),
    logprobs: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> list[Completion]:
    """Continue all prompts in one batch; with a seed, a row's text is the same in any batch (batch-invariant).

    The model runs in evaluation mode, without dropout, and is not changed.

    Args:
        model: the model, or an :class:`Engine` of it, whose ``dtype`` and ``compile`` then apply.
        sampling: None uses the defaults of :class:`SamplingConfig`.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``int8``.
        compile: compile decoding with torch.compile; ``auto``: from ``COMPILE_BREAK_EVEN_STEPS`` new tokens on.
        speculate, context: see :class:`~psannlm.generation.batch_decode.BatchDecoder`.
        stop: up to ``MAX_STOP_TEXTS`` texts, before the first of which a completion ends, however its tokens are cut.
            The prompt is not searched.
        logprobs: how many of the most likely tokens to record with each new one, up to ``MAX_LOGPROBS``; None: record
            no log probabilities.
        on_text: called with (row, text) for text that later tokens cannot change, in whole characters. The parts of
            a row join to its completion's text.
        on_progress: called after each step but the last with the tokens so far, of all rows; the seconds left are those
            of the longest row.

    Raises:
        GenerationError: a prompt or setting is refused.
        DeviceError: ``compile`` is true, and the compiler is missing or broken.
    """
    prompts = _texts(prompts)
    stops = require_stop_texts(stop)
    if isinstance(model, Engine):
        engine = model
    else:
        engine = Engine(model, dtype=dtype, compile=choose_compiling(compile, max_new_tokens))
        for notice in engine.notices:
            log.warning(notice)
    return complete_ids(
        engine,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        speculate=speculate,
        context=context,
        stop=stops,
        logprobs=logprobs,
        on_text=on_text,
        on_progress=on_progress,
    )


def complete_ids(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    speculate: int = 0,
    context: ContextRule = "stop",
    stop: str | Iterable[str] = (),
    logprobs: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> list[Completion]:
    """Continue prompts given as ids, the BOS token included; otherwise :func:`generate`.

    ``sampling`` may hold settings for each prompt.
    """
    stops = require_stop_texts(stop)
    decoding = BatchDecoder(
        engine,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling or SamplingConfig(),
        eos_id=tokenizer.eos_id,
        forbidden_ids=forbidden_ids(tokenizer, engine.model.config.vocab_size or 0),
        speculate=speculate,
        context=context,
        logprobs=logprobs,
    )
    texts = [RowText(tokenizer, ids, stops) for ids in prompt_ids]
    n_tokens = n_steps = 0
    began = time.monotonic()
    for event in decoding:
        if on_progress is not None and len(decoding.generated[event.row]) > n_steps + 1:
            n_steps += 1
            elapsed_s = time.monotonic() - began
            # By steps and not by tokens: a step with fewer rows takes hardly less time.
            left_s = elapsed_s * (max(decoding.max_new) - n_steps) / n_steps
            on_progress(Progress("generating", n_tokens, None, "tokens", elapsed_s, left_s, is_bound=True))
        n_tokens += 1
        if on_text is None and not stops:
            continue
        part = texts[event.row].add(event.token)
        if on_text is not None and part:
            on_text(event.row, part)
        if texts[event.row].stop_text is not None:
            decoding.finish(event.row)
    return [_completion(decoding, number, text, on_text) for number, text in enumerate(texts)]


def _completion(
    decoding: BatchDecoder, number: int, text: RowText, on_text: Callable[[int, str], None] | None
) -> Completion:
    """Return the completion of a row that has ended, and pass on the text that was still held back."""
    ids = decoding.generated[number]
    n_returned = text.n_returned
    whole, stop_text = text.end(ids)
    if on_text is not None and len(whole) > n_returned:
        on_text(number, whole[n_returned:])
    reason = decoding.finish_reasons[number] if stop_text is None else "stop"
    logprobs = None if decoding.n_top is None else decoding.logprobs[number]
    return Completion(ids, whole, reason, stop_text, logprobs)


def draw_samples(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """Return a sample after each prompt, without the prompt: the same for the same weights, prompts and seed.

    Decoding uses the cache, uncompiled float32, and does not change the model or its training mode. A context too short
    for a prompt slides; one of fewer than four tokens gives empty texts.
    """
    limit = context_limit(model)
    if limit is not None and limit < _MIN_SLIDING_CONTEXT:
        return ["" for _ in prompts]
    sampling = SamplingConfig(seed=seed)
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        compile=False,
        context="slide",
    )
    return [completion.text for completion in completions]
