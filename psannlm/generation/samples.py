"""A model in the middle of its training and a few prompts to the texts it would write now, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from psannlm.generation.batch_decode import context_limit
from psannlm.generation.generate import generate
from psannlm.generation.sampling import SamplingConfig
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

# Shorter contexts cannot slide.
_LEAST_CONTEXT = 4


def draw_samples(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """Return what follows each prompt, the prompt left out: the same for the same weights, prompts and seed.

    The prompts are continued with the cache, plain and in float32, and the model is left as it was, in training mode
    too. A context too short for a prompt slides; one of fewer than four tokens gives empty texts.
    """
    limit = context_limit(model)
    if limit is not None and limit < _LEAST_CONTEXT:
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
