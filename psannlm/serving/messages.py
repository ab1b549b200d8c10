"""What the HTTP process asks of the engine's process and gets from it, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psannlm.errors import GenerationError
from psannlm.generation.requests import FinishReason, SamplingConfig, TokenLogprob, check_prompts


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        prompt: ids, the BOS token included.
        max_new_tokens: most new tokens; 0 only scores the prompt.
        sampling: how a token is chosen.
        stop: texts before the first of which the text ends.
        n_top: how many of the most likely tokens to record with each token; None: record no log probabilities.
        scores_prompt: record the log probabilities of the prompt's tokens too.
        is_streamed: whether updates are wanted between the first token and the end.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingConfig
    stop: tuple[str, ...] = ()
    n_top: int | None = None
    scores_prompt: bool = False
    is_streamed: bool = True


@dataclass
class Update:
    """What one or more steps have added to a sequence.

    Attributes:
        text: new text, in whole characters.
        ids: new tokens; with a stop text they include those that spell it.
        offsets: of each new token, the characters of the completion before it.
        logprobs: of each new token, where they are recorded.
        end_logprob: of the end-of-text token that ended the sequence, where they are recorded.
        prompt_logprobs: of the prompt's tokens from the second on, once they are all known.
        finish_reason: set in the last update.
        stop_text: the stop text that ended the sequence.
        error: why the sequence ended without a result.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_text: str | None = None
    end_logprob: TokenLogprob | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class RequestLimits:
    """What a sequence must keep to.

    Attributes:
        vocab_size: of the model.
        context: most tokens of a sequence, prompt included: the slots of a row.
        is_endless: whether the model itself has no limit (ALiBi), so that only the slots count.
    """

    vocab_size: int
    context: int
    is_endless: bool = False

    def check(self, request: GenerationRequest) -> None:
        """Raise GenerationError for a prompt that is empty, has an unknown id, or is too long."""
        # Space for one new token at least; what does not fit behind it ends the sequence, as in `psannlm generate`.
        limit = self.context + (request.max_new_tokens == 0)
        check_prompts([request.prompt], self.vocab_size, limit, remedy="shorten the prompt")
        n_tokens = len(request.prompt) + request.max_new_tokens
        if self.is_endless and n_tokens > self.context:
            raise GenerationError(
                f"the prompt has {len(request.prompt)} tokens, {n_tokens} with the new ones, and the server has space "
                f"for {self.context} in each row; shorten the prompt, or ask for fewer tokens"
            )


@dataclass(frozen=True)
class Counters:
    """Figures of the engine: sequences that wait and that are computed, tokens generated and of prompts so far."""

    n_waiting: int = 0
    n_running: int = 0
    n_generated: int = 0
    n_prompt_tokens: int = 0
