"""What is asked of generation and what it answers, without torch: sampling settings, log probabilities, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from psannlm.errors import GenerationError

# Why a row ended: its text or an end-of-text token, the number of new tokens, or the model's context.
FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 chooses the most likely token (greedy), where only the penalty still applies.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p; None keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred; None: no penalty.
        seed: of every row, so that a row's text does not depend on the batch; None: a random seed for each row.
        min_p: keep the tokens whose probability, after the temperature, is at least this fraction of the most likely
            token's; None keeps all.

    Raises:
        GenerationError: a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.9
    repetition_penalty: float | None = None
    seed: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature)
        for name in ("top_p", "repetition_penalty", "min_p"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), is_whole=True)
        # Written so that a NaN fails each of them.
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature {self.temperature} is not a number of 0 or more; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k {self.top_k} keeps no token; use 1 or more, or leave it out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty < float("inf"):
            raise GenerationError(f"repetition_penalty {self.repetition_penalty} is not above 0; 1 is no penalty")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise GenerationError(f"min_p {self.min_p} is not in [0, 1]; 0 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed {self.seed} is not in 0 .. 2**63 - 1")


def require_number(name: str, value: object, *, is_whole: bool = False) -> None:
    """Raise GenerationError unless ``value``, of the argument ``name``, is a number; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
        raise GenerationError(f"{name} {value!r:.60} is not a {'whole ' if is_whole else ''}number")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability in the model's own distribution.

    That distribution is the softmax of the logits before temperature, repetition penalty and truncation, over the whole
    vocabulary, special tokens included.

    Attributes:
        token: id of the chosen token.
        logprob: in nats, at most 0.
        top: (id, logprob) of the most likely tokens, the most likely first, whether or not the chosen one is among
            them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def check_prompts(
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    limit: int | None,
    remedy: str = "shorten the prompt, let the context slide, or train with a larger data.max_length",
) -> None:
    """Raise GenerationError unless every prompt has ids of the vocabulary and leaves space for a new token.

    ``remedy`` says what to do about a prompt that is too long.
    """
    if not prompts:
        raise GenerationError("there is no prompt; give one or more")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise GenerationError(f"prompt {row} has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise GenerationError(f"prompt {row} has an id outside the vocabulary of {vocab_size}")
        if limit is not None and len(prompt) >= limit:
            raise GenerationError(
                f"prompt {row} has {len(prompt)} tokens, and the model's context is {limit}, new tokens included; "
                f"{remedy}"
            )
