"""The engine against repeated full forward passes; rows that keep to themselves, end for a reason, and stream whole
characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from psannlm.config.model import BaseName, PositionKind
from psannlm.errors import GenerationError
from psannlm.generation.engine import Decoding, context_limit, encode_prompt, generate
from psannlm.generation.sampling import SamplingConfig, next_tokens
from psannlm.models.cache import DecodeState
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

Build = Callable[..., Transformer]
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.2, seed=11)
RAGGED = [[1, 5, 9], [1], [1, 2, 3, 4, 5, 6, 7], [1, 16], [1, 9, 9, 2, 8]]


def decode(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: SamplingConfig = GREEDY, n: int = 10, **more: Any
) -> Decoding:
    """Return a decoding that has run to its end."""
    decoding = Decoding(model, prompts, max_new_tokens=n, sampling=sampling, **{"eos_id": None, **more})
    for _ in decoding:
        pass
    return decoding


@torch.no_grad()
def decode_naively(model: Transformer, prompt: list[int], sampling: SamplingConfig, n: int) -> list[int]:
    """The same without a cache: the whole text anew for each token, one row alone."""
    ids = list(prompt)
    generator = torch.Generator().manual_seed(sampling.seed or 0)
    for _ in range(n):
        logits = model.logits(model.hidden_states(torch.tensor([ids]))[:, -1])
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        uniforms = torch.rand(1, generator=generator) if sampling.temperature else None
        ids.append(int(next_tokens(logits, sampling, uniforms, seen)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("base", get_args(BaseName))
@pytest.mark.parametrize("position", get_args(PositionKind))
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ragged_batch_equals_each_row_alone_without_a_cache(
    base: str, position: str, sampling: SamplingConfig, build_tiny: Build
) -> None:
    model = build_tiny(base=base, positional_encoding=position, n_kv_heads=1)
    together = decode(model, RAGGED, sampling)
    for row, prompt in enumerate(RAGGED):
        naive = decode_naively(model, prompt, sampling, 10)
        assert together.generated[row] == naive
        assert decode(model, [prompt], sampling).generated == [naive]
    assert len({tuple(ids) for ids in together.generated}) > 1
    assert together.stopped_by == ["length"] * 5


class Chain:
    """Makes a model say what follows each token, and keeps count of the rows of every forward pass.

    The real model runs underneath, so the cache fills and shrinks as it would.
    """

    def __init__(self, model: Transformer, following: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.batch_sizes: list[int] = []
        real = model.hidden_states

        def hidden_states(input_ids: Tensor, state: DecodeState, n_new: Sequence[int] | None = None) -> Tensor:
            self.batch_sizes.append(len(input_ids))
            real(input_ids, state, n_new)
            return input_ids.unsqueeze(-1).float()

        def logits(hidden: Tensor) -> Tensor:
            out = torch.zeros(len(hidden), model.config.vocab_size or 0)
            for row, token in enumerate(hidden.flatten().tolist()):
                out[row, following(int(token))] = 100.0
            return out

        monkeypatch.setattr(model, "hidden_states", hidden_states)
        monkeypatch.setattr(model, "logits", logits)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(seed=1)], ids=["greedy", "sampled"])
def test_a_finished_row_stays_finished_and_leaves_the_batch(
    sampling: SamplingConfig, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny()
    chain = Chain(model, lambda token: token + 1, monkeypatch)
    decoding = Decoding(model, [[1, 12], [1, 3, 9], [1, 15], [10]], max_new_tokens=5, sampling=sampling, eos_id=16)
    events = [(event.row, event.token) for event in decoding]
    assert decoding.generated == [[13, 14, 15], [10, 11, 12, 13, 14], [], [11, 12, 13, 14, 15]]
    assert decoding.stopped_by == ["end_of_text", "length", "end_of_text", "length"]
    # Row 2 never enters decoding, row 0 is left out once it has ended, and nothing is computed after the last token.
    assert chain.batch_sizes == [4, 3, 3, 3, 2]
    assert events == [
        *[(0, 13), (1, 10), (3, 11)],
        *[(0, 14), (1, 11), (3, 12)],
        *[(0, 15), (1, 12), (3, 13)],
        *[(1, 13), (3, 14)],
        *[(1, 14), (3, 15)],
    ]


def test_rows_that_leave_do_not_disturb_the_others(build_tiny: Build) -> None:
    model = build_tiny()
    alone = [decode(model, [prompt], SAMPLED, 12).generated[0] for prompt in RAGGED]
    # An end of text that some rows meet early, others late or never.
    eos = next(token for token in range(17) if 1 < sum(token in ids for ids in alone) < 5)
    together = decode(model, RAGGED, SAMPLED, 12, eos_id=eos)
    for row, ids in enumerate(alone):
        cut = ids.index(eos) if eos in ids else len(ids)
        assert together.generated[row] == ids[:cut]
        assert together.stopped_by[row] == ("end_of_text" if eos in ids else "length")


@pytest.mark.parametrize("n", [1, 2, 7])
def test_length_is_what_was_asked(n: int, build_tiny: Build) -> None:
    decoding = decode(build_tiny(), RAGGED, n=n)
    assert [len(ids) for ids in decoding.generated] == [n] * 5
    assert decoding.stopped_by == ["length"] * 5


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_the_context_ends_a_row(position: str, build_tiny: Build) -> None:
    model = build_tiny(positional_encoding=position, max_seq_len=9)
    decoding = decode(model, RAGGED, n=6)
    # A context of nine: three leave room for the six asked for, seven for two.
    assert [len(ids) for ids in decoding.generated] == [6, 6, 2, 6, 4]
    assert decoding.stopped_by == ["length", "length", "context", "length", "context"]
    assert decoding.generated[2] == decode_naively(model, RAGGED[2], GREEDY, 2)
    assert context_limit(model) == 9


def test_alibi_goes_past_the_trained_length(build_tiny: Build) -> None:
    model = build_tiny(positional_encoding="alibi", max_seq_len=4)
    assert context_limit(model) is None
    prompt = [1, 2, 3, 4, 5, 6, 7]
    decoding = decode(model, [prompt], n=20)
    assert decoding.stopped_by == ["length"]
    assert decoding.generated == [decode_naively(model, prompt, GREEDY, 20)]


@pytest.mark.parametrize("length", [9, 10, 30])
def test_a_prompt_that_fills_the_context_names_both_numbers(length: int, build_tiny: Build) -> None:
    with pytest.raises(GenerationError, match=rf"prompt 1 has {length} tokens.* context is 9"):
        decode(build_tiny(max_seq_len=9), [[1], [2] * length])
    assert len(decode(build_tiny(max_seq_len=9), [[2] * 8]).generated[0]) == 1


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 holds no token"),
        ([[1], [17]], {}, "prompt 1 has an id outside the vocabulary of 17"),
        ([[-1]], {}, "prompt 0 has an id outside"),
        ([[1]], {"n": 0}, "max_new_tokens 0"),
        ([[1]], {"n": -5}, "max_new_tokens -5"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    prompts: list[list[int]], more: dict[str, Any], message: str, build_tiny: Build
) -> None:
    with pytest.raises(GenerationError, match=message):
        decode(build_tiny(), prompts, **more)


def test_forbidden_ids_are_never_taken(build_tiny: Build) -> None:
    model = build_tiny()
    forbidden = [*range(8), *range(10, 17)]
    for sampling in (GREEDY, SamplingConfig(temperature=50.0, top_p=None, repetition_penalty=1e-6, seed=0)):
        decoding = decode(model, [[1, 5], [3]], sampling, 20, forbidden_ids=forbidden)
        assert {token for ids in decoding.generated for token in ids} <= {8, 9}


def build_for(tokenizer: Tokenizer, build_tiny: Build, **settings: Any) -> Transformer:
    return build_tiny(**{"vocab_size": tokenizer.vocab_size, "max_seq_len": 200, **settings})


def test_text_holds_no_special_and_no_id_without_text(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny, vocab_size=byte_tokenizer.vocab_size + 300)
    sampling = SamplingConfig(temperature=30.0, top_p=None, seed=0)
    completions = generate(model, byte_tokenizer, ["a", "bc"], max_new_tokens=60, sampling=sampling)
    ids = {token for completion in completions for token in completion.ids}
    assert min(ids) >= 4
    assert max(ids) < byte_tokenizer.vocab_size
    assert [completion.text for completion in completions] == [byte_tokenizer.decode(c.ids) for c in completions]


def test_a_prompt_starts_as_a_document_does(byte_tokenizer: Tokenizer) -> None:
    assert encode_prompt(byte_tokenizer, "a") == [byte_tokenizer.bos_id, 4 + ord("a")]
    assert encode_prompt(byte_tokenizer, "") == [byte_tokenizer.bos_id]


def spell(
    model: Transformer, tokenizer: Tokenizer, start: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the model write ``content``, in which no byte stands twice, after ``start``, and then end."""
    chain = [tokenizer.encode(start)[-1], *(byte + 4 for byte in content), tokenizer.eos_id]
    following = dict(pairwise(chain))
    Chain(model, following.__getitem__, monkeypatch)


def streamed(model: Transformer, tokenizer: Tokenizer, prompts: list[str], n: int) -> tuple[list[Any], list[list[str]]]:
    pieces: list[list[str]] = [[] for _ in prompts]
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=n,
        sampling=GREEDY,
        on_text=lambda row, text: pieces[row].append(text),
    )
    return completions, pieces


def test_pieces_are_whole_characters_and_join_to_the_text(
    byte_tokenizer: Tokenizer, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    text = "né€ 😀."
    spell(model, byte_tokenizer, "a", text.encode(), monkeypatch)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], 50)
    assert pieces == list(text)
    assert (completion.text, completion.stopped_by) == (text, "end_of_text")


@pytest.mark.parametrize("n", range(1, 12))
def test_a_character_cut_by_the_length_comes_last(
    n: int, byte_tokenizer: Tokenizer, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    content = "né€ 😀.".encode()
    spell(model, byte_tokenizer, "a", content, monkeypatch)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], n)
    assert "".join(pieces) == completion.text == content[:n].decode("utf-8", errors="replace")
    assert not any("�" in piece for piece in pieces[:-1])
    assert all(pieces)


def test_bytes_that_are_no_text_still_join(
    byte_tokenizer: Tokenizer, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    content = b"x\xe2\x82y\xff\xfez\xf0"
    spell(model, byte_tokenizer, "a", content, monkeypatch)
    (completion,), (pieces,) = streamed(model, byte_tokenizer, ["a"], 50)
    assert "".join(pieces) == completion.text == "x�y��z�"


def test_streams_of_a_batch_keep_apart(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    completions, pieces = streamed(model, byte_tokenizer, ["a", "the", "", "é"], 30)
    assert ["".join(row) for row in pieces] == [completion.text for completion in completions]
    assert completions == streamed(model, byte_tokenizer, ["a", "the", "", "é"], 30)[0]


def test_seed_decides_the_text(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
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


def test_sampling_leaves_the_global_generator_alone(build_tiny: Build) -> None:
    before = torch.get_rng_state()
    decode(build_tiny(), [[1]], SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_no_dropout_and_the_mode_is_left_as_it_was(
    training: bool, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
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


def test_a_model_whose_weights_are_damaged_says_so(build_tiny: Build) -> None:
    model = build_tiny()
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        decode(model, [[1, 5]])


@pytest.mark.parametrize("n", [2.5, "3", None, True])
def test_a_number_of_tokens_that_is_none_is_refused(n: Any, build_tiny: Build) -> None:
    with pytest.raises(GenerationError, match=r"^max_new_tokens .* is not a whole number$"):
        decode(build_tiny(), [[1]], n=n)


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
def test_prompts_that_are_no_strings_are_refused(
    prompts: Any, said: str, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
    with pytest.raises(GenerationError, match=said):
        generate(build_for(byte_tokenizer, build_tiny), byte_tokenizer, prompts, max_new_tokens=1)


def test_numbers_of_numpy_are_taken(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    model = build_for(byte_tokenizer, build_tiny)
    plain, numpys = SamplingConfig(seed=5, top_k=9), SamplingConfig(seed=np.int64(5), top_k=np.int64(9))
    [one] = generate(model, byte_tokenizer, ["a"], max_new_tokens=3, sampling=plain)
    assert generate(model, byte_tokenizer, np.array(["a"]), max_new_tokens=np.int64(3), sampling=numpys) == [one]


def test_progress_counts_whole_steps_and_promises_no_fewer_than_come(
    byte_tokenizer: Tokenizer, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of z ends at once, one of v after 4 tokens, and one of a goes on to its limit of 7."""
    v, z = (byte_tokenizer.encode(letter)[0] for letter in "vz")
    model = build_for(byte_tokenizer, build_tiny)
    Chain(model, lambda token: byte_tokenizer.eos_id if token >= z else token + 1, monkeypatch)
    seen: list[tuple[int, int, int]] = []
    texts = generate(
        model,
        byte_tokenizer,
        ["a", "v", "z"],
        max_new_tokens=7,
        sampling=GREEDY,
        on_progress=lambda *figures: seen.append(figures),
    )
    assert [len(done.ids) for done in texts] == [7, z - v, 0]
    assert seen == [(2, 1, 7), (4, 2, 7), (6, 3, 7), (8, 4, 7), (9, 5, 7), (10, 6, 7)]
    seen.clear()
    generate(
        model, byte_tokenizer, ["v", "z"], max_new_tokens=7, sampling=GREEDY, on_progress=lambda *f: seen.append(f)
    )
    assert seen == [(1, 1, 7), (2, 2, 7), (3, 3, 7)]
