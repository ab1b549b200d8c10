"""Requests of ``/v1/completions``: the fields of a body, validated, as sequences to generate."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from psannlm.errors import GenerationError, TokenizerError, nearest
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.row_text import encode_prompt
from psannlm.generation.stop_texts import require_stop_texts
from psannlm.serving.errors import RequestError
from psannlm.serving.limits import DEFAULT_MAX_TOKENS, MAX_CHOICES, MAX_LOGPROBS, MAX_N
from psannlm.serving.messages import GenerationRequest
from psannlm.tokenizers.base import Tokenizer

_N_SEEDS = 2**63


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """Body of a completion request. A field that is null has its default; ``model`` may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] = []
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int) -> SamplingConfig:
        """Return how the tokens of a choice are chosen; with a seed, choice i of a prompt has the seed + i."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % _N_SEEDS,
            min_p=self.min_p,
        )


# Fields of OpenAI's that clients send with the value that changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None,),
}
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "min_p")


def parse_completion(body: bytes, model: str, max_tokens: int) -> CompletionRequest:
    """Return the request in a body.

    Args:
        model: name of the model that is served.
        max_tokens: most new tokens of a sequence.

    Raises:
        RequestError: the body is not JSON, or a field is unknown or refused.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the body is not a JSON object")
    fields = {name: value for name, value in content.items() if value is not None}
    for name, values in _NEUTRAL.items():
        if name in fields:
            value = fields.pop(name)
            if isinstance(value, bool) or value not in values:
                raise RequestError(400, f"{name} is not supported; leave it out", param=name, code="unsupported")
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error) from error
    if request.model not in (None, model):
        message = f"the model {request.model!r:.100} is not served here; use {model!r}"
        raise RequestError(404, message, param="model", code="model_not_found")
    if "max_tokens" not in request.model_fields_set:
        request = request.model_copy(update={"max_tokens": min(DEFAULT_MAX_TOKENS, max_tokens)})
    _check_values(request, max_tokens)
    return request


def _field_error(error: ValidationError) -> RequestError:
    """Return the first problem of a body, with the field it is in."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    shown = f"{name:.100}"
    if problem["type"] == "missing":
        return RequestError(400, f"{shown} is missing", param=name, code="missing")
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        known = nearest(name, CompletionRequest.model_fields) if len(name) < 100 else ""
        return RequestError(
            400, f"{shown} is not a field of this server{known}", param=name[:100], code="unknown_field"
        )
    expected = {
        "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
        "stop": "a string or a list of strings",
        "stream_options": 'an object such as {"include_usage": true}',
        "logprobs": f"a whole number of 0 to {MAX_LOGPROBS}: the number of likely tokens to return with each",
    }.get(name)
    reason = f"is not {expected}" if expected else f"is refused: {problem['msg']}"
    return RequestError(400, f"{shown} {reason}", param=name, code="invalid_value")


def _check_values(request: CompletionRequest, max_tokens: int) -> None:
    """Raise RequestError for values that are out of range, or that exclude each other."""

    def refuse(param: str, message: str) -> RequestError:
        return RequestError(400, message, param=param, code="invalid_value")

    for name in _SAMPLING_FIELDS:
        value = getattr(request, name)
        if value is not None:
            try:
                SamplingConfig(**{"top_p": None, name: value})
            except GenerationError as error:
                raise refuse(name, str(error)) from error
    try:
        require_stop_texts(request.stop)
    except GenerationError as error:
        raise refuse("stop", str(error)) from error
    if request.max_tokens > max_tokens:
        raise refuse(
            "max_tokens",
            f"max_tokens {request.max_tokens} exceeds this server's limit of {max_tokens}"
            "; ask for fewer, or start it with a larger --max-tokens",
        )
    if request.max_tokens == 0 and not request.echo:
        raise refuse("max_tokens", "max_tokens 0 generates nothing; give 1 or more, or set echo to score the prompt")
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options", "stream_options are those of a streamed answer; set stream, or leave them out")


class Prompt:
    """One prompt of a request.

    Attributes:
        ids: its tokens, with the BOS token before a text.
        text: what ``echo`` returns.
        n_hidden: tokens at the beginning that the client did not send: 1 for the BOS token before a text.
    """

    def __init__(self, prompt: str | list[int], tokenizer: Tokenizer) -> None:
        if isinstance(prompt, str):
            self.ids, self.text, self.n_hidden = encode_prompt(tokenizer, prompt), prompt, 1
        else:
            self.ids, self.n_hidden = prompt, 0
            is_known = bool(prompt) and 0 <= min(prompt) <= max(prompt) < tokenizer.vocab_size
            self.text = tokenizer.decode(prompt) if is_known else ""


def read_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the prompts of a request.

    Raises:
        RequestError: there are none, or more choices than ``MAX_CHOICES``, or a text cannot be encoded.
    """
    given: Any = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) * request.n <= MAX_CHOICES:
        message = f"{len(given)} prompts with n {request.n} are not 1 to {MAX_CHOICES} choices; send fewer at a time"
        raise RequestError(400, message, param="prompt", code="invalid_value")
    try:
        return [Prompt(prompt, tokenizer) for prompt in given]
    except TokenizerError as error:
        raise RequestError(400, f"prompt: {error}", param="prompt", code="invalid_value") from error


def generation_requests(request: CompletionRequest, prompts: list[Prompt]) -> list[GenerationRequest]:
    """Return the sequences to generate, the choices of a prompt after each other."""
    return [
        GenerationRequest(
            prompt.ids,
            request.max_tokens,
            request.sampling(choice),
            require_stop_texts(request.stop),
            request.logprobs,
            scores_prompt=request.echo and request.logprobs is not None,
            is_streamed=request.stream,
        )
        for prompt in prompts
        for choice in range(request.n)
    ]
