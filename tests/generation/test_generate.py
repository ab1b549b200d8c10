"""Text generation: valid ids, streaming in whole characters, seeds, progress and notices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.generation.generate import COMPILE_BREAK_EVEN_STEPS, Completion, choose_compiling, generate
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.row_text import encode_prompt
from psannlm.models.transformer import Transformer
from psannlm.runtime.progress import Progress
from psannlm.tokenizers.base import Tokenizer

Build = Callable[..., Transformer]
Lead = Callable[[Engine, Callable[[int], int]], Any]
GREEDY = SamplingConfig(temperature=0.0)


def build_for(tokenizer: Tokenizer, build_tiny: Build, **settings: Any) -> Transformer:
    return build_tiny(**{"vocab_size": tokenizer.vocab_size, "max_seq_len": 200, **settings})


def test_generate_emits_no_special_or_unused_ids(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny, vocab_size=byte_tokenizer.vocab_size + 300)
    sampling = SamplingConfig(temperature=30.0, top_p=None, seed=0)
    completions = generate(model, byte_tokenizer, ["a", "bc"], max_new_tokens=60, sampling=sampling)
    ids = {token for completion in completions for token in completion.ids}
    assert min(ids) >= 4
    assert max(ids) < byte_tokenizer.vocab_size
    assert [completion.text for completion in completions] == [byte_tokenizer.decode(c.ids) for c in completions]


def test_generate_prompt_starts_with_bos(byte_tokenizer: Tokenizer) -> None:
    assert encode_prompt(byte_tokenizer, "a") == [byte_tokenizer.bos_id, 4 + ord("a")]
    assert encode_prompt(byte_tokenizer, "") == [byte_tokenizer.bos_id]


def speller(tokenizer: Tokenizer, start: str, content: bytes, build_tiny: Build, lead: Lead) -> Engine:
    """An engine that writes ``content``, in which no byte occurs twice, after ``start``, and then ends."""
    engine = Engine(build_for(tokenizer, build_tiny))
    chain = [tokenizer.encode(start)[-1], *(byte + 4 for byte in content), tokenizer.eos_id]
    lead(engine, dict(pairwise(chain)).__getitem__)
    return engine


def streamed(
    model: Transformer | Engine, tokenizer: Tokenizer, prompts: list[str], n: int, **more: Any
) -> tuple[list[Completion], list[list[str]]]:
    pieces: list[list[str]] = [[] for _ in prompts]
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=n,
        sampling=GREEDY,
        on_text=lambda row, text: pieces[row].append(text),
        **more,
    )
    return completions, pieces


def test_generate_streams_whole_characters(byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead) -> None:
    text = "né€ 😀."
    model = speller(byte_tokenizer, "a", text.encode(), build_tiny, lead)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], 50)
    assert pieces == list(text)
    assert (completion.text, completion.finish_reason) == (text, "stop")


@pytest.mark.parametrize("n", range(1, 12))
def test_generate_streams_cut_character_last(n: int, byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead) -> None:
    content = "né€ 😀.".encode()
    model = speller(byte_tokenizer, "a", content, build_tiny, lead)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], n)
    assert "".join(pieces) == completion.text == content[:n].decode("utf-8", errors="replace")
    assert not any("�" in piece for piece in pieces[:-1])
    assert all(pieces)


def test_generate_streams_invalid_utf8_bytes(byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead) -> None:
    content = b"x\xe2\x82y\xff\xfez\xf0"
    model = speller(byte_tokenizer, "a", content, build_tiny, lead)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], 50)
    assert "".join(pieces) == completion.text == "x�y��z�"


def test_generate_streams_rows_separately(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    completions, pieces = streamed(model, byte_tokenizer, ["a", "the", "", "é"], 30)
    assert ["".join(row) for row in pieces] == [completion.text for completion in completions]
    assert completions == streamed(model, byte_tokenizer, ["a", "the", "", "é"], 30)[0]


@pytest.mark.slow
def test_generate_seed_determines_text(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)

    def texts(seed: int | None, prompts: list[str], temperature: float = 1.0) -> list[str]:
        sampling = SamplingConfig(temperature=temperature, top_p=None, seed=seed)
        return [c.text for c in generate(model, byte_tokenizer, prompts, max_new_tokens=30, sampling=sampling)]

    torch.manual_seed(0)
    one = texts(7, ["a"])
    torch.manual_seed(1)
    assert texts(7, ["a"]) == one
    assert texts(8, ["a"]) != one
    # Company changes nothing, and the same prompt gets the same text.
    assert texts(7, ["the", "a", "a"])[1:] == one * 2
    assert texts(None, ["a"]) != texts(None, ["a"])
    # Without a seed, rows that ask for the same do not get the same.
    assert len(set(texts(None, ["a"] * 4))) == 4
    assert texts(7, ["a"], temperature=0.0) == texts(8, ["a"], temperature=0.0) == texts(None, ["a"], temperature=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_generate_disables_dropout_and_keeps_mode(training: bool, byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny, dropout=0.5).train(training)
    plain = build_for(byte_tokenizer, build_tiny)
    assert generate(model, byte_tokenizer, ["a"], max_new_tokens=20, sampling=GREEDY) == generate(
        plain, byte_tokenizer, ["a"], max_new_tokens=20, sampling=GREEDY
    )
    assert model.training is training

    def fail(row: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, byte_tokenizer, ["a"], max_new_tokens=20, sampling=GREEDY, on_text=fail)
    assert model.training is training


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("abc", "prompts 'abc' is not a list"),
        (3, "prompts 3 is not a list"),
        (None, "prompts None is not a list"),
        (["a", 3], "prompt 1 is int 3; give a string"),
        ([b"a"], "prompt 0 is bytes b'a'; give a string"),
        ([None], "prompt 0 is NoneType None; give a string"),
    ],
)
def test_generate_non_string_prompts_raise(
    prompts: Any, said: str, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
    with pytest.raises(GenerationError, match=said):
        generate(build_for(byte_tokenizer, build_tiny), byte_tokenizer, prompts, max_new_tokens=1)


def test_generate_accepts_numpy_numbers(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    plain, numpys = SamplingConfig(seed=5, top_k=9), SamplingConfig(seed=np.int64(5), top_k=np.int64(9))
    [one] = generate(model, byte_tokenizer, ["a"], max_new_tokens=3, sampling=plain)
    assert generate(model, byte_tokenizer, np.array(["a"]), max_new_tokens=np.int64(3), sampling=numpys) == [one]


@pytest.fixture
def _step_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each step that reports progress."""
    ticks = count()
    monkeypatch.setattr("psannlm.generation.generate.time", SimpleNamespace(monotonic=lambda: next(ticks)))


@pytest.mark.usefixtures("_step_clock")
def test_generate_progress_left_is_an_upper_bound(byte_tokenizer: Tokenizer, build_tiny: Build, lead: Lead) -> None:
    """A prompt of z ends immediately, one of v after 4 tokens, and one of a at its limit of 7."""
    v, z = (byte_tokenizer.encode(letter)[0] for letter in "vz")
    model = Engine(build_for(byte_tokenizer, build_tiny))
    lead(model, lambda token: byte_tokenizer.eos_id if token >= z else token + 1)
    seen: list[Progress] = []
    texts = generate(
        model,
        byte_tokenizer,
        ["a", "v", "z"],
        max_new_tokens=7,
        sampling=GREEDY,
        on_progress=seen.append,
    )
    assert [len(done.ids) for done in texts] == [7, z - v, 0]
    # Of 7 steps of a second, 6 are left after the first.
    assert [(at.done, at.left_s) for at in seen] == [(2, 6), (4, 5), (6, 4), (8, 3), (9, 2), (10, 1)]
    seen.clear()
    generate(model, byte_tokenizer, ["v", "z"], max_new_tokens=7, sampling=GREEDY, on_progress=seen.append)
    assert [(at.done, at.left_s) for at in seen] == [(1, 6), (2, 5), (3, 4)]


@pytest.mark.usefixtures("_step_clock")
@pytest.mark.parametrize("speculate", [1, 4, 15])
def test_generate_speculation_keeps_stream_and_progress_bound(
    speculate: int, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    prompts = ["abcabcabcabc", "the", "", "éé"]
    seen: list[Progress] = []
    plain = streamed(model, byte_tokenizer, prompts, 40)
    found = streamed(
        model,
        byte_tokenizer,
        prompts,
        40,
        speculate=speculate,
        on_progress=seen.append,
    )
    assert found == plain
    assert seen[0].left_s == 39
    for before, after in pairwise(seen):
        assert before.done < after.done
        assert before.left_s > after.left_s >= 0
    assert seen[-1].done < sum(len(completion.ids) for completion in found[0])


def test_generate_accepts_an_existing_engine(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    for dtype in ("float32", "bfloat16", "int8"):
        engine = Engine(model, dtype=dtype)
        once = generate(engine, byte_tokenizer, ["a", "bcd"], max_new_tokens=20, sampling=GREEDY)
        assert generate(engine, byte_tokenizer, ["a", "bcd"], max_new_tokens=20, sampling=GREEDY) == once
        assert generate(model, byte_tokenizer, ["a", "bcd"], max_new_tokens=20, sampling=GREEDY, dtype=dtype) == once


def test_generate_sliding_context_continues_past_limit(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny, max_seq_len=16)
    prompts = ["abc", "x" * 10]
    stopped = generate(model, byte_tokenizer, prompts, max_new_tokens=40, sampling=GREEDY)
    assert [done.finish_reason for done in stopped] == ["context"] * 2
    slid = generate(model, byte_tokenizer, [*prompts, "y" * 50], max_new_tokens=40, sampling=GREEDY, context="slide")
    assert {done.finish_reason for done in slid} <= {"length", "stop"}
    assert max(len(done.ids) for done in slid) == 40
    for short, long in zip(stopped, slid, strict=False):
        assert long.ids[: len(short.ids)] == short.ids
    with pytest.raises(GenerationError, match="prompt 0 has 51 tokens, and the model's context is 16"):
        generate(model, byte_tokenizer, ["y" * 50], max_new_tokens=40)


def test_generate_auto_compile_starts_at_break_even() -> None:
    assert choose_compiling(True, 1) is True
    assert choose_compiling(False, 10**9) is False
    for n, wanted in (
        (1, False),
        (COMPILE_BREAK_EVEN_STEPS - 1, False),
        (COMPILE_BREAK_EVEN_STEPS, "auto"),
        (np.int64(10**6), "auto"),
    ):
        assert choose_compiling("auto", n) == wanted
    for wrong in ("yes", 1, 0, None, "AUTO"):
        with pytest.raises(GenerationError, match=f"compile {wrong!r} is not true, false or auto"):
            choose_compiling(wrong, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("compile", "least", "wanted"), [("auto", 6, False), ("auto", 5, True), (False, 5, False)])
def test_generate_logs_engine_notices(
    compile: Any,
    least: int,
    wanted: bool,
    byte_tokenizer: Tokenizer,
    build_tiny: Build,
    monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("psannlm.generation.engine.compiler_fault", lambda device: "a C++ compiler (install g++)")
    monkeypatch.setattr("psannlm.generation.generate.COMPILE_BREAK_EVEN_STEPS", least)
    n = 5
    model = build_for(byte_tokenizer, build_tiny)
    found = generate(model, byte_tokenizer, ["a"], max_new_tokens=n, sampling=GREEDY, compile=compile)
    assert found == generate(model, byte_tokenizer, ["a"], max_new_tokens=n, sampling=GREEDY, compile=False)
    assert [("C++ compiler" in notice) for notice in logged.messages] == [True] * wanted


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is not one of float32, bfloat16, int8"),
        ({"compile": "maybe"}, "compile 'maybe' is not true, false or auto"),
        ({"context": "slid"}, "context 'slid' is not one of stop, slide .did you mean 'slide'"),
        ({"speculate": 16}, "speculate 16 is not in 0 .. 15"),
        ({"speculate": -1}, "speculate -1 is not in 0 .. 15"),
        ({"speculate": 1.5}, "speculate 1.5 is not a whole number"),
        ({"speculate": True}, "speculate True is not a whole number"),
    ],
    ids=str,
)
def test_generate_unknown_setting_raises(
    setting: dict[str, Any], said: str, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
    with pytest.raises(GenerationError, match=said):
        generate(build_for(byte_tokenizer, build_tiny), byte_tokenizer, ["a"], max_new_tokens=1, **setting)


@pytest.mark.parametrize(("n_prompts", "n_new"), [(1, 10**15), (10**5, 10), (50_000, 10**9)])
def test_generate_beyond_memory_raises_before_work(
    n_prompts: int, n_new: int, byte_tokenizer: Tokenizer, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    model.config = model.config.model_copy(update={"max_seq_len": None if n_new > 10 else 64})
    monkeypatch.setattr("psannlm.io.limits._physical_bytes", lambda: 10**8)
    monkeypatch.setattr(Engine, "prefill", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(GenerationError, match=r"need [\d,.]+ GB, and this machine has 0\.1 GB; lower max_new_tokens"):
        generate(model, byte_tokenizer, ["ab"] * n_prompts, max_new_tokens=n_new, compile=False)
