"""The completions API through the client of OpenAI's own library, against a server on a loopback port."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from psannlm.generation.engine import Engine
from psannlm.generation.generate import Completion, generate
from psannlm.generation.requests import SamplingConfig
from psannlm.serving.scheduler import Scheduler

openai = pytest.importorskip("openai")
httpx2: Any = pytest.importorskip("httpx2")

SETTINGS: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 0.8, "top_p": 0.95, "seed": 7}
PROMPTS = [f"{number} tides of the sea " * (1 + number % 5) for number in range(17)]


def alone(engine: Engine, tokenizer: Any, prompt: str, **more: Any) -> Completion:
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=7)
    return generate(engine, tokenizer, [prompt], max_new_tokens=30, sampling=sampling, **more)[0]


def test_seeded_request_among_16_equals_generate(
    client: Any, running: Any, engine: Engine, byte_tokenizer: Any
) -> None:
    """Streamed and not, while others come and go."""

    def ask(number: int) -> str:
        if number % 2:
            return str(client.completions.create(prompt=PROMPTS[number], **SETTINGS).choices[0].text)
        stream = client.completions.create(prompt=PROMPTS[number], stream=True, **SETTINGS)
        return "".join(part.choices[0].text for part in stream)

    with ThreadPoolExecutor(17) as pool:
        texts = list(pool.map(ask, range(17)))
    assert texts == [alone(engine, byte_tokenizer, prompt).text for prompt in PROMPTS]


def test_streamed_answer_equals_whole_answer(client: Any) -> None:
    asked = {**SETTINGS, "prompt": ["The sea", "A clock"], "n": 2, "logprobs": 3, "echo": True, "stop": ["e", "zz"]}
    whole = client.completions.create(**asked)
    stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    *parts, last = list(stream)
    assert last.usage == whole.usage
    assert not last.choices
    assert len({choice.text for choice in whole.choices}) == 4
    for choice in whole.choices:
        of_choice = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(part.text for part in of_choice) == choice.text
        assert [part.finish_reason for part in of_choice[:-1]] == [None] * (len(of_choice) - 1)
        assert of_choice[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for part in of_choice for value in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_choice_of_several_has_the_seed_plus_its_number(client: Any) -> None:
    several = client.completions.create(prompt="The sea", n=3, **SETTINGS).choices
    for number, choice in enumerate(several):
        single = client.completions.create(prompt="The sea", **{**SETTINGS, "seed": 7 + number}).choices[0]
        assert choice.text == single.text
        assert choice.index == number


def test_token_ids_and_text_are_the_same_prompt(client: Any, byte_tokenizer: Any) -> None:
    ids = [byte_tokenizer.bos_id, *byte_tokenizer.encode("The sea")]
    of_text = client.completions.create(prompt="The sea", **SETTINGS)
    assert client.completions.create(prompt=ids, **SETTINGS).choices[0].text == of_text.choices[0].text
    both = client.completions.create(prompt=[ids, ids], **SETTINGS)
    assert [choice.text for choice in both.choices] == [of_text.choices[0].text] * 2
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_echoed_prompt_is_scored_without_new_tokens(client: Any, engine: Engine, byte_tokenizer: Any) -> None:
    asked = {"model": "tiny", "prompt": "The sea", "max_tokens": 0, "logprobs": 1, "echo": True}
    (choice,) = client.completions.create(**asked).choices
    assert choice.text == "The sea"
    assert choice.logprobs.tokens == list("The sea")
    assert choice.logprobs.text_offset == list(range(7))
    ids = [byte_tokenizer.bos_id, *byte_tokenizer.encode("The sea")]
    logits = engine.model.logits(engine.extend([ids], engine.new_cache(1, 64)))[0].log_softmax(-1)
    expected = [float(logits[at, token]) for at, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    # Given as ids, the first has nothing before it.
    (of_ids,) = client.completions.create(**{**asked, "prompt": ids}).choices
    assert of_ids.logprobs.token_logprobs[0] is None
    assert of_ids.logprobs.top_logprobs[0] is None
    assert of_ids.logprobs.token_logprobs[1:] == choice.logprobs.token_logprobs


def test_stop_text_ends_the_choice_before_it(client: Any, engine: Engine, byte_tokenizer: Any) -> None:
    unstopped = alone(engine, byte_tokenizer, "The sea").text
    stop = unstopped[10:12]
    done = alone(engine, byte_tokenizer, "The sea", stop=stop)
    asked = {**SETTINGS, "prompt": "The sea", "stop": stop, "logprobs": 0}
    (choice,) = client.completions.create(**asked).choices
    assert (choice.text, choice.finish_reason) == (done.text, "stop")
    assert all(offset < len(done.text) for offset in choice.logprobs.text_offset)


def test_model_may_be_left_out(client: Any, running: Any) -> None:
    asked = {key: value for key, value in SETTINGS.items() if key != "model"}
    done = httpx2.post(f"{running.url}/v1/completions", json={**asked, "prompt": "The sea"}).json()
    assert done["model"] == "tiny"
    assert done["choices"][0]["text"] == client.completions.create(prompt="The sea", **SETTINGS).choices[0].text


def test_models_list_the_one_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model is 'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"model": "gpt-4"}, "model", "not served here; use 'tiny'"),
        ({"temperature": -1}, "temperature", "temperature -1"),
        ({"top_p": 2}, "top_p", "not in"),
        ({"max_tokens": 101}, "max_tokens", "limit of 100"),
        ({"max_tokens": 0}, "max_tokens", "generates nothing"),
        ({"logprobs": 6}, "logprobs", "not a whole number of 0 to 5"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop", "5 stop texts are too many"),
        ({"seed": -1}, "seed", "seed -1"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": [[5, 260]]}, "prompt", "outside the vocabulary"),
        ({"prompt": "x" * 400}, "prompt", "context is 400"),
        ({"prompt": 3}, "prompt", "a list of token ids"),
        ({"best_of": 3}, "best_of", "best_of is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"extra_body": {"top_kk": 4}}, "top_kk", "did you mean 'top_k'"),
        ({"extra_body": {"top_k": 0}}, "top_k", "top_k 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
    ],
)
def test_refused_field_is_named(client: Any, changed: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.completions.create(**{**SETTINGS, "prompt": "The sea", **changed})
    assert refused.value.body["param"] == param
    assert refused.value.status_code == (404 if param == "model" else 400)


def test_chat_is_refused_with_the_reason(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="base models"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])


def test_ids_of_the_model_alone_are_refused(
    build_tiny: Callable[..., Any], byte_tokenizer: Any, start_server: Callable[..., Any]
) -> None:
    """A model may have more ids than its tokenizer; one can be the likeliest, and none is text."""
    model = build_tiny(vocab_size=300, max_seq_len=100, base="waveresnet", n_kv_heads=1, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight[270:] *= 50
    server = start_server(Scheduler(Engine(model), byte_tokenizer, max_batch=2))
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="outside the vocabulary of 260"):
                client.completions.create(model="tiny", prompt=[275], max_tokens=1)
            answer = client.completions.create(model="tiny", prompt="The sea", max_tokens=4, logprobs=5)
            names = {name for top in answer.choices[0].logprobs.top_logprobs for name in top}
            assert any(name in {f"<{number}>" for number in range(270, 300)} for name in names)
            assert client.completions.create(model="tiny", prompt="The sea", max_tokens=4).choices
    finally:
        server.stop()


def test_default_of_max_tokens_keeps_to_the_limit(
    engine: Engine, byte_tokenizer: Any, start_server: Callable[..., Any]
) -> None:
    server = start_server(Scheduler(engine, byte_tokenizer, max_batch=2), max_tokens=8)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model="tiny", prompt="The sea").usage.completion_tokens <= 8
            with pytest.raises(openai.BadRequestError, match="max_tokens 9"):
                client.completions.create(model="tiny", prompt="The sea", max_tokens=9)
    finally:
        server.stop()
