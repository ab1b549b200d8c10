"""Continuous batching against decoding alone: rows that come and go, prompts in parts, cancelled rows, full queues."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.generation.generate import Completion, complete_ids
from psannlm.generation.quantize import InferenceLinear, WeightDtype
from psannlm.generation.requests import SamplingConfig
from psannlm.kernels.compiler import has_compiler
from psannlm.models.transformer import Transformer
from psannlm.serving.messages import GenerationRequest
from psannlm.serving.scheduler import PREFILL_CHUNK_TOKENS

from .conftest import CONTEXT, Served

Serve = Callable[..., Served]
GREEDY = SamplingConfig(temperature=0.0)


def drawn_requests(seed: int, n: int) -> list[GenerationRequest]:
    """Requests of many lengths and settings; some stop at a text, some fill the context, some score their prompt."""
    draw = random.Random(seed)
    requests = []
    for number in range(n):
        length = draw.choice([1, 5, 31, 32, 33, 90, PREFILL_CHUNK_TOKENS, 200, 300, CONTEXT - 5])
        sampling = SamplingConfig(
            temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=draw.choice([None, 5, 40]),
            top_p=draw.choice([None, 0.9]),
            min_p=draw.choice([None, 0.02]),
            repetition_penalty=draw.choice([None, None, 1.3]),
            seed=number,
        )
        requests.append(
            GenerationRequest(
                [1, *(draw.randrange(4, 260) for _ in range(length - 1))],
                max_new_tokens=draw.choice([1, 3, 20, 40]),
                sampling=sampling,
                stop=draw.choice([(), (), ("e", "zz"), ("a",)]),
                n_top=draw.choice([None, None, 0, 3]),
                scores_prompt=draw.random() < 0.2,
                is_streamed=draw.random() < 0.8,
            )
        )
    return requests


def alone(engine: Engine, tokenizer: Any, request: GenerationRequest) -> Completion:
    """Return what ``psannlm generate`` gives for a request."""
    (done,) = complete_ids(
        engine,
        tokenizer,
        [request.prompt],
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
        logprobs=request.n_top,
    )
    return done


def assert_equal_to_alone(served: Served, name: str, done: Completion) -> None:
    last = served.last(name)
    assert served.ids(name) == done.ids
    assert served.text(name) == done.text
    assert (last.finish_reason, last.stop_text) == (done.finish_reason, done.stop_text)
    logprobs = [scored for update in served.updates[name] for scored in update.logprobs]
    assert logprobs == (done.logprobs or [])
    ends_with_token = done.finish_reason == "stop" and done.stop_text is None and done.logprobs is not None
    assert (last.end_logprob is not None) == ends_with_token


@pytest.mark.parametrize(("dtype", "speculate"), [("float32", 0), ("float32", 3), ("bfloat16", 0), ("int8", 0)])
def test_scheduler_gives_what_generate_gives(
    dtype: WeightDtype, speculate: int, model: Transformer, serve: Serve, byte_tokenizer: Any
) -> None:
    """To the last bit of every log probability, with rows that come, go and are cancelled at any step."""
    served = serve(engine=Engine(model, dtype=dtype), max_batch=5, speculate=speculate)
    requests = drawn_requests(seed=len(dtype), n=24)
    run_with_traffic(served, requests)
    for name in served.updates:
        assert_equal_to_alone(served, name, alone(served.scheduler.engine, byte_tokenizer, requests[int(name)]))


def run_with_traffic(served: Served, requests: list[GenerationRequest]) -> None:
    """Submit requests at any step, and cancel a few of them, which then have no updates."""
    draw = random.Random(1)
    left = list(enumerate(requests))
    cancelled = []
    while left or served.scheduler.has_work:
        while left and draw.random() < 0.4:
            number, request = left.pop()
            handle = served.submit(str(number), request)
            if number % 7 == 0:
                cancelled.append((str(number), handle))
        if cancelled and draw.random() < 0.1:
            name, handle = cancelled.pop()
            served.scheduler.cancel([handle])
            del served.updates[name]
        served.scheduler.step()
    assert len(served.updates) >= len(requests) - 4


@pytest.fixture
def product_sizes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Sizes of the products of matrices so far: for each of them a CPU keeps memory."""
    sizes: set[tuple[int, ...]] = set()
    forward = InferenceLinear.forward

    def noted(linear: InferenceLinear, x: Tensor) -> Tensor:
        sizes.add((linear.n_outputs, linear.n_inputs, x.numel() // linear.n_inputs))
        return forward(linear, x)

    monkeypatch.setattr(InferenceLinear, "forward", noted)
    return sizes


@pytest.mark.parametrize(("base", "speculate"), [("waveresnet", 0), ("transformer", 3)])
def test_scheduler_needs_only_sizes_of_its_warm_up(
    base: str,
    speculate: int,
    build_tiny: Callable[..., Transformer],
    serve: Serve,
    byte_tokenizer: Any,
    product_sizes: set[tuple[int, ...]],
) -> None:
    """Whatever joins, leaves and is scored: memory is flat under load."""
    engine = Engine(build_tiny(base=base, vocab_size=260, max_seq_len=CONTEXT))
    served = serve(engine=engine, max_batch=12, speculate=speculate)
    served.scheduler.warm_up(limit_s=math.inf)
    warm = set(product_sizes)
    product_sizes.clear()
    requests = drawn_requests(seed=5, n=60)
    run_with_traffic(served, requests[:24])
    for number, request in enumerate(requests[24:], start=24):
        served.submit(str(number), request)
    served.run()
    assert max(n_rows for *_, n_rows in product_sizes) > PREFILL_CHUNK_TOKENS
    assert product_sizes <= warm
    for name in served.updates:
        assert_equal_to_alone(served, name, alone(engine, byte_tokenizer, requests[int(name)]))


def test_scheduler_warm_up_ends_at_its_limit(serve: Serve, product_sizes: set[tuple[int, ...]]) -> None:
    serve(max_batch=12).scheduler.warm_up(limit_s=0.0)
    assert not product_sizes


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler for torch.compile")
@pytest.mark.filterwarnings("ignore")
def test_scheduler_compiled_steps_keep_tokens(
    build_tiny: Callable[..., Transformer], serve: Serve, byte_tokenizer: Any
) -> None:
    """The numbers are those of compiled passes, rounded otherwise, and the same whatever the other rows do."""
    model = build_tiny(n_layers=1, d_model=16, d_mlp=32, vocab_size=260, max_seq_len=CONTEXT, base="waveresnet")
    engine = Engine(model, compile=True)
    requests = [replace(request, n_top=None) for request in drawn_requests(seed=3, n=24)]
    runs = []
    for order in (1, -1):
        served = serve(engine=engine, max_batch=2)
        served.scheduler.warm_up()
        run_with_traffic(served, requests[::order])
        runs.append({name if order == 1 else str(23 - int(name)): served.ids(name) for name in served.updates})
    both = runs[0].keys() & runs[1].keys()
    assert [runs[0][name] for name in both] == [runs[1][name] for name in both]
    eager = Engine(model)
    equal = [ids == alone(eager, byte_tokenizer, requests[int(name)]).ids for name, ids in runs[0].items()]
    assert equal.count(True) >= len(equal) - 1


@pytest.mark.parametrize(
    ("settings", "n_rows", "is_streamed", "n_tokens"),
    [
        ({}, 4, True, [1] * 16),
        ({}, 5, True, [1, 2, 2, 2, 2, 2, 2, 2, 1]),
        ({}, 12, True, [1, 3, 3, 3, 3, 3]),
        ({}, 13, True, [1, 4, 4, 4, 3]),
        ({}, 20, True, [1, 4, 4, 4, 3]),
        ({"stream_interval": 1}, 16, True, [1] * 16),
        ({"stream_interval": 6}, 1, True, [1, 6, 6, 3]),
        ({}, 1, False, [1, 15]),
    ],
)
def test_scheduler_update_holds_tokens_of_its_interval(
    settings: dict[str, int], n_rows: int, is_streamed: bool, n_tokens: list[int], serve: Serve
) -> None:
    """The first token and the end wait for nothing."""
    served = serve(max_batch=20, **settings)
    request = GenerationRequest([1, 5], 16, GREEDY, n_top=1, is_streamed=is_streamed)
    for row in range(n_rows):
        served.submit(str(row), request)
    served.run()
    for updates in served.updates.values():
        assert [len(update.ids) for update in updates] == n_tokens
        assert [len(update.logprobs) for update in updates] == n_tokens
        assert [update.is_last for update in updates] == [False] * (len(n_tokens) - 1) + [True]


def test_scheduler_failure_comes_after_tokens(serve: Serve) -> None:
    """Tokens that wait for the rest of their event are passed on before the error."""
    served = serve(max_batch=16, stream_interval=6)
    for row in range(2):
        served.submit(str(row), GenerationRequest([1, 5], 16, GREEDY, is_streamed=True))
    for _ in range(3):
        served.scheduler.step()
    served.scheduler.fail_all(GenerationError("the server is ending"))
    for updates in served.updates.values():
        assert [len(update.ids) for update in updates] == [1, 3, 0]
        assert [str(update.error) for update in updates if update.is_last] == ["the server is ending"]
    assert not served.scheduler.has_work


def test_scheduler_chunked_prompt_scores_match_whole_prompt(serve: Serve) -> None:
    prompt = [1, *(4 + (7 * i) % 256 for i in range(299))]
    request = GenerationRequest(prompt, 1, GREEDY, n_top=2, scores_prompt=True)
    served = serve()
    served.submit("whole", request)
    served.run()
    scored = served.updates["whole"][0].prompt_logprobs
    assert scored is not None
    assert [logprob.token for logprob in scored] == prompt[1:]
    # A longer prompt scores its beginning alike.
    served.submit("half", GenerationRequest(prompt[:150], 0, GREEDY, n_top=2, scores_prompt=True))
    served.run()
    assert served.updates["half"][0].prompt_logprobs == scored[:149]
    assert served.last("half").finish_reason == "length"


def test_scheduler_long_prompt_stalls_others_one_chunk(serve: Serve) -> None:
    served = serve()
    served.submit("short", GenerationRequest([1, 9], 30, GREEDY))
    served.scheduler.step()
    served.submit("long", GenerationRequest([1, *[7] * 299], 5, GREEDY))
    for step in range(1, 4):
        before = len(served.ids("short"))
        served.scheduler.step()
        assert len(served.ids("short")) == before + 1
        assert bool(served.ids("long")) == (step * PREFILL_CHUNK_TOKENS >= 300)


def test_scheduler_cancelled_row_is_free_after_one_step(serve: Serve) -> None:
    served = serve(max_batch=2)
    handles = [served.submit(name, GenerationRequest([1, 5], 100, GREEDY)) for name in "abc"]
    for _ in range(3):
        served.scheduler.step()
    assert (served.scheduler.counters.n_running, served.scheduler.counters.n_waiting) == (2, 1)
    n_before = len(served.ids("a"))
    served.scheduler.cancel([handles[0]])
    served.scheduler.step()
    assert len(served.ids("a")) == n_before
    assert served.scheduler.counters.n_running == 1
    for _ in range(2):
        served.scheduler.step()
    assert served.ids("c")
    assert (served.scheduler.counters.n_running, served.scheduler.counters.n_waiting) == (2, 0)
    served.run()
    assert served.ids("b") == served.ids("c")


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [
        ([], 1, "no tokens"),
        ([260], 1, "outside the vocabulary of 260"),
        ([1] * CONTEXT, 1, f"context is {CONTEXT}"),
        ([1] * (CONTEXT + 1), 0, "context is"),
    ],
)
def test_scheduler_refuses_prompts_before_the_queue(prompt: list[int], n: int, message: str, serve: Serve) -> None:
    served = serve()
    with pytest.raises(GenerationError, match=message):
        served.submit("bad", GenerationRequest(prompt, n, GREEDY))
    assert not served.scheduler.has_work


def test_scheduler_short_prompt_waits_two_steps_for_company(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of half a pass or more, and any prompt where nothing decodes, does not wait."""
    served = serve(max_batch=8)
    passes: list[int] = []
    extend = served.scheduler.engine.extend
    monkeypatch.setattr(
        served.scheduler.engine, "extend", lambda parts, cache: passes.append(len(parts)) or extend(parts, cache)
    )

    def steps_until_computed(*names: str, length: int = 20) -> int:
        n_before = len(passes)
        for at in range(5):
            if at < len(names):
                served.submit(names[at], GenerationRequest([1, *[9 + at] * (length - 1)], 90, GREEDY))
            served.scheduler.step()
            if len(passes) > n_before:
                return at + 1
        raise AssertionError("never computed")

    assert steps_until_computed("first") == 1
    assert steps_until_computed("lone") == 3
    assert steps_until_computed("long", length=PREFILL_CHUNK_TOKENS // 2) == 1
    assert steps_until_computed("a", "b") == 3
    assert passes == [1, 1, 1, 2]


def test_scheduler_waiting_prompts_share_passes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts that wait together are computed together: many while few rows decode, few while many do."""
    served = serve(max_batch=16, stream_interval=1)
    passes: list[int] = []
    extend = served.scheduler.engine.extend

    def counted(parts: Any, cache: Any) -> Any:
        passes.append(len(parts))
        return extend(parts, cache)

    monkeypatch.setattr(served.scheduler.engine, "extend", counted)
    for number in range(12):
        served.submit(str(number), GenerationRequest([1, *[9 + number % 8] * 99], 5, GREEDY))
    served.scheduler.step()
    # Eight prompts of 128 padded tokens fill a pass for more than the rows that decode, two another one.
    assert passes == [8]
    assert [len(served.ids(str(number))) for number in range(12)] == [2] * 8 + [0] * 4
    served.scheduler.step()
    assert passes == [8, 2]
    assert [len(served.ids(str(number))) for number in range(12)] == [3] * 8 + [2] * 2 + [0] * 2
