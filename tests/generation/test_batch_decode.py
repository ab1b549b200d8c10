"""Batched decoding against repeated full forward passes: batch invariance, speculation, full and sliding contexts."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.config.model import BaseName, PositionKind
from psannlm.errors import GenerationError
from psannlm.generation import rows as rows_module
from psannlm.generation.batch_decode import BatchDecoder, context_limit
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.requests import SamplingConfig
from psannlm.models.transformer import Transformer

REPOSITORY = Path(__file__).resolve().parents[2]
Build = Callable[..., Transformer]
Decode = Callable[..., BatchDecoder]
Naively = Callable[..., list[int]]
Lead = Callable[[Engine, Callable[[int], int]], Any]
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.2, seed=11)
RAGGED = [[1, 5, 9], [1], [1, 2, 3, 4, 5, 6, 7], [1, 16], [1, 9, 9, 2, 8]]
BASES, POSITIONS, DTYPES = get_args(BaseName), get_args(PositionKind), get_args(WeightDtype)


def pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """All pairs of values of three settings, in as few combinations as that takes: no code depends on all three."""
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


@pytest.mark.parametrize(("base", "position", "sampling"), pairs(BASES, POSITIONS, [GREEDY, SAMPLED]))
def test_decoding_ragged_batch_matches_uncached_rows(
    base: str, position: str, sampling: SamplingConfig, build_tiny: Build, decode: Decode, decode_naively: Naively
) -> None:
    model = build_tiny(base=base, positional_encoding=position, n_kv_heads=1)
    together = decode(model, RAGGED, sampling)
    for row, prompt in enumerate(RAGGED):
        naive = decode_naively(model, prompt, sampling, 10)
        assert together.generated[row] == naive
        assert decode(model, [prompt], sampling).generated == [naive]
    assert len({tuple(ids) for ids in together.generated}) > 1
    assert together.finish_reasons == ["length"] * 5


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(seed=1)], ids=["greedy", "sampled"])
def test_decoding_finished_row_leaves_the_batch(sampling: SamplingConfig, build_tiny: Build, lead: Lead) -> None:
    engine = Engine(build_tiny())
    chain = lead(engine, lambda token: token + 1)
    decoding = BatchDecoder(engine, [[1, 12], [1, 3, 9], [1, 15], [10]], max_new_tokens=5, sampling=sampling, eos_id=16)
    events = [(event.row, event.token) for event in decoding]
    assert decoding.generated == [[13, 14, 15], [10, 11, 12, 13, 14], [], [11, 12, 13, 14, 15]]
    assert decoding.finish_reasons == ["stop", "length", "stop", "length"]
    # Row 2 never enters decoding, row 0 is left out once it has ended, and nothing is computed after the last token.
    assert chain.batch_sizes == [4, 3, 3, 3, 2]
    assert events == [
        *[(0, 13), (1, 10), (3, 11)],
        *[(0, 14), (1, 11), (3, 12)],
        *[(0, 15), (1, 12), (3, 13)],
        *[(1, 13), (3, 14)],
        *[(1, 14), (3, 15)],
    ]


def test_decoding_leaving_rows_do_not_change_others(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny()
    alone = [decode(model, [prompt], SAMPLED, 12).generated[0] for prompt in RAGGED]
    # An end of text that some rows meet early, others late or never.
    eos = next(token for token in range(17) if 1 < sum(token in ids for ids in alone) < 5)
    together = decode(model, RAGGED, SAMPLED, 12, eos_id=eos)
    for row, ids in enumerate(alone):
        cut = ids.index(eos) if eos in ids else len(ids)
        assert together.generated[row] == ids[:cut]
        assert together.finish_reasons[row] == ("stop" if eos in ids else "length")


@pytest.mark.parametrize("n", [1, 2, 7])
def test_decoding_generates_max_new_tokens(n: int, build_tiny: Build, decode: Decode) -> None:
    decoding = decode(build_tiny(), RAGGED, n=n)
    assert [len(ids) for ids in decoding.generated] == [n] * 5
    assert decoding.finish_reasons == ["length"] * 5


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_decoding_full_context_ends_the_row(
    position: str, build_tiny: Build, decode: Decode, decode_naively: Naively
) -> None:
    model = build_tiny(positional_encoding=position, max_seq_len=9)
    decoding = decode(model, RAGGED, n=6)
    # A context of nine: a prompt of three has space for six new tokens, one of seven for two.
    assert [len(ids) for ids in decoding.generated] == [6, 6, 2, 6, 4]
    assert decoding.finish_reasons == ["length", "length", "context", "length", "context"]
    assert decoding.generated[2] == decode_naively(model, RAGGED[2], GREEDY, 2)
    assert context_limit(model) == 9


def test_decoding_alibi_exceeds_trained_length(build_tiny: Build, decode: Decode, decode_naively: Naively) -> None:
    model = build_tiny(positional_encoding="alibi", max_seq_len=4)
    assert context_limit(model) is None
    prompt = [1, 2, 3, 4, 5, 6, 7]
    decoding = decode(model, [prompt], n=20)
    assert decoding.finish_reasons == ["length"]
    assert decoding.generated == [decode_naively(model, prompt, GREEDY, 20)]


@pytest.mark.parametrize("length", [9, 10, 30])
def test_decoding_prompt_filling_context_raises_with_numbers(length: int, build_tiny: Build, decode: Decode) -> None:
    with pytest.raises(GenerationError, match=rf"prompt 1 has {length} tokens.* context is 9"):
        decode(build_tiny(max_seq_len=9), [[1], [2] * length])
    assert len(decode(build_tiny(max_seq_len=9), [[2] * 8]).generated[0]) == 1


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1], [17]], {}, "prompt 1 has an id outside the vocabulary of 17"),
        ([[-1]], {}, "prompt 0 has an id outside"),
        ([[1]], {"n": 0}, "max_new_tokens 0"),
        ([[1]], {"n": -5}, "max_new_tokens -5"),
    ],
)
def test_decoding_invalid_prompts_raise(
    prompts: list[list[int]], more: dict[str, Any], message: str, build_tiny: Build, decode: Decode
) -> None:
    with pytest.raises(GenerationError, match=message):
        decode(build_tiny(), prompts, **more)


def test_decoding_never_chooses_forbidden_ids(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny()
    forbidden = [*range(8), *range(10, 17)]
    for sampling in (GREEDY, SamplingConfig(temperature=50.0, top_p=None, repetition_penalty=1e-6, seed=0)):
        decoding = decode(model, [[1, 5], [3]], sampling, 20, forbidden_ids=forbidden)
        assert {token for ids in decoding.generated for token in ids} <= {8, 9}


def test_decoding_seed_keeps_global_generator_state(build_tiny: Build, decode: Decode) -> None:
    before = torch.get_rng_state()
    decode(build_tiny(), [[1]], SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_nonfinite_weights_raise(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny()
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        decode(model, [[1, 5]])


@pytest.mark.parametrize("n", [2.5, "3", None, True])
def test_decoding_non_numeric_token_count_raises(n: Any, build_tiny: Build, decode: Decode) -> None:
    with pytest.raises(GenerationError, match=r"^max_new_tokens .* is not a whole number$"):
        decode(build_tiny(), [[1]], n=n)


SAMPLINGS = [
    GREEDY,
    SAMPLED,
    SamplingConfig(temperature=1.0, top_k=3, top_p=None, seed=5),
    SamplingConfig(temperature=0.0, repetition_penalty=1.5),
]


@pytest.mark.parametrize(("base", "position", "dtype"), pairs(BASES, POSITIONS, DTYPES))
def test_decoding_is_batch_invariant_per_dtype(
    base: str, position: str, dtype: WeightDtype, build_tiny: Build, decode: Decode
) -> None:
    model = build_tiny(base=base, positional_encoding=position, n_kv_heads=1, max_seq_len=120)
    engine = Engine(model, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = [*RAGGED[:3], *(torch.randint(0, 17, (n,), generator=generator).tolist() for n in (40, 90))]
    for sampling in SAMPLINGS:
        together = decode(engine, prompts, sampling)
        for row, prompt in enumerate(prompts):
            alone = decode(engine, [prompt], sampling)
            assert together.generated[row] == alone.generated[0]
        assert len({tuple(ids) for ids in together.generated}) > 1


# As the command line does before torch is loaded; then the logits of rows alone and together, on two threads.
_ON_TWO_THREADS = """
import os
from psannlm.commands.app import main
try:
    main(["generate", "--help"])
except SystemExit:
    pass
import torch
from psannlm.config.model import ModelConfig
from psannlm.generation.engine import Engine
from psannlm.models.registry import build_model, resolve
torch.manual_seed(0)
torch.set_num_threads(2)
sizes = {"base": "transformer", "d_model": 256, "n_layers": 3, "n_heads": 4, "vocab_size": 50, "max_seq_len": 200}
model = build_model(resolve(ModelConfig(**sizes)), seed=0).eval()
with torch.no_grad():
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim == 2):
        matrix.copy_(torch.randn(matrix.shape) * matrix.shape[1] ** -0.5)
engine = Engine(model)
prompts = [[1 + (7 * row + at) % 49 for at in range(20 + 30 * row)] for row in range(4)]
def logits(rows):
    first, cache = engine.prefill(rows, 8)
    return torch.stack([first, *(engine.decode(torch.full((len(rows),), 3), cache) for _ in range(4))], dim=1)
together = logits(prompts)
print([torch.equal(logits([prompt])[0], together[row]) for row, prompt in enumerate(prompts)])
"""


@pytest.mark.slow
def test_decoding_is_batch_invariant_on_two_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_CBWR")}
    command = [sys.executable, "-c", _ON_TWO_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == str([True] * 4)


def test_decoding_low_precision_stays_close(build_tiny: Build, decode: Decode) -> None:
    """A check on the tests of precision above: engines of three precisions that all said nonsense would pass them."""
    model = build_tiny(d_model=48, d_mlp=64)
    wanted = decode(model, RAGGED, n=1).generated
    for dtype in ("bfloat16", "int8"):
        found = decode(Engine(model, dtype=dtype), RAGGED, n=1).generated
        assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 4


@pytest.fixture(scope="module")
def engines(build_tiny: Build) -> dict[str, Engine]:
    """Engines of every base and precision."""
    made = {base: Engine(build_tiny(base=base, max_seq_len=100)) for base in BASES}
    made["int8"] = Engine(build_tiny(positional_encoding="alibi", n_kv_heads=1, max_seq_len=100), dtype="int8")
    made["bfloat16"] = Engine(build_tiny(d_model=24, max_seq_len=100), dtype="bfloat16")
    return made


# Texts that repeat a few phrases, so that what followed one before is a good draft.
repetitive = st.lists(
    st.sampled_from([(1, 2, 3), (1, 2, 3, 4), (5,), (5, 6, 5, 6), (7, 7, 7), (3, 9)]), min_size=1, max_size=10
).map(lambda phrases: [token for phrase in phrases for token in phrase])


@pytest.mark.slow
@given(
    name=st.sampled_from([*BASES, "bfloat16", "int8"]),
    prompts=st.lists(repetitive, min_size=1, max_size=4),
    speculate=st.integers(1, 15),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    penalty=st.sampled_from([None, 0.7, 1.3]),
    seed=st.integers(0, 99),
    n=st.integers(1, 30),
    eos=st.one_of(st.none(), st.integers(0, 16)),
)
@settings(deadline=None, max_examples=100)
def test_speculation_keeps_tokens_and_finish_reasons(
    engines: dict[str, Engine],
    decode: Decode,
    name: str,
    prompts: list[list[int]],
    speculate: int,
    temperature: float,
    penalty: float | None,
    seed: int,
    n: int,
    eos: int | None,
) -> None:
    sampling = SamplingConfig(temperature=temperature, repetition_penalty=penalty, top_p=0.95, seed=seed)
    plain = decode(engines[name], prompts, sampling, n, eos_id=eos)
    guessed = decode(engines[name], prompts, sampling, n, eos_id=eos, speculate=speculate)
    assert guessed.generated == plain.generated
    assert guessed.finish_reasons == plain.finish_reasons
    assert guessed.n_passes <= plain.n_passes
    assert 0 <= guessed.n_accepted <= guessed.n_drafted
    assert plain.n_drafted == 0
    if len(prompts) == 1:
        # Each pass settles one token, and one more for every accepted draft token.
        n_settled = len(plain.generated[0]) + (plain.finish_reasons[0] == "stop")
        assert guessed.n_passes >= n_settled - 1 - guessed.n_accepted


@pytest.mark.parametrize("name", [*BASES, "bfloat16", "int8"])
@pytest.mark.parametrize("speculate", [1, 4, 15])
def test_speculation_accepted_drafts_save_passes(
    name: str, speculate: int, engines: dict[str, Engine], decode: Decode
) -> None:
    # Tokens that were seen are made likelier, so that the text goes round in circles.
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=0.5)
    prompts = [[1, 2, 3, 4] * 5, [7, 7, 7, 7], [5, 6] * 4]
    plain = decode(engines[name], prompts, sampling, 40)
    guessed = decode(engines[name], prompts, sampling, 40, speculate=speculate)
    assert guessed.generated == plain.generated
    assert guessed.n_accepted > 0
    assert plain.n_passes == 39
    assert guessed.n_passes < 39


@pytest.mark.parametrize(("speculate", "n_passes", "n_drafted"), [(3, 3, 6), (4, 2, 7), (15, 2, 7)])
def test_speculation_predictable_text_takes_minimal_passes(
    speculate: int, n_passes: int, n_drafted: int, build_tiny: Build, lead: Lead
) -> None:
    engine = Engine(build_tiny())
    passes = lead(engine, lambda token: (token + 1) % 4)
    prompt = [0, 1, 2, 3] * 4
    decoding = BatchDecoder(engine, [prompt], max_new_tokens=10, sampling=GREEDY, eos_id=None, speculate=speculate)
    events = [(event.row, event.token) for event in decoding]
    assert [token for _, token in events] == [0, 1, 2, 3] * 2 + [0, 1]
    # One token from the prefill; from each pass those that were guessed, of which none is beyond the end, and one more.
    assert decoding.n_passes == n_passes
    assert decoding.n_drafted == decoding.n_accepted == n_drafted
    assert passes.batch_sizes == [1] * (1 + n_passes)


def test_speculation_rejected_drafts_cost_no_token(build_tiny: Build, lead: Lead) -> None:
    engine = Engine(build_tiny())
    lead(engine, lambda token: {0: 1, 1: 2, 2: 5, 5: 0}[token] if token in (0, 1, 2, 5) else 0)
    # In the prompt 3 follows 2; the model predicts 5.
    decoding = BatchDecoder(
        engine, [[0, 1, 2, 3, 0, 1, 2, 3, 0]], max_new_tokens=7, sampling=GREEDY, eos_id=None, speculate=3
    )
    list(decoding)
    assert decoding.generated == [[1, 2, 5, 0, 1, 2, 5]]
    assert 0 < decoding.n_accepted < decoding.n_drafted


def test_speculation_eos_within_draft_ends_row(build_tiny: Build, lead: Lead) -> None:
    engine = Engine(build_tiny())
    lead(engine, lambda token: (token + 1) % 6)
    decoding = BatchDecoder(
        engine, [[0, 1, 2, 3, 4, 5] * 2, [8]], max_new_tokens=20, sampling=GREEDY, eos_id=4, speculate=6
    )
    events = [(event.row, event.token) for event in decoding]
    assert decoding.generated == [[0, 1, 2, 3], [3]]
    assert decoding.finish_reasons == ["stop"] * 2
    assert sorted(events) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]


def chi_square(found: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """Pearson's statistic, and the value that it exceeds once in 10,000 times by chance (Wilson and Hilferty 1931)."""
    # Outcomes that are too rare to be counted singly are counted together.
    common = {outcome for outcome, n in expected.items() if n >= 8}
    cells = [(float(found.get(outcome, 0)), expected[outcome]) for outcome in common]
    rare = (
        float(sum(n for outcome, n in found.items() if outcome not in common)),
        sum(n for outcome, n in expected.items() if outcome not in common),
    )
    cells += [rare] if rare[1] > 1 else []
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((n - wanted) ** 2 / wanted for n, wanted in cells), limit


N_ROWS = 4000
PROMPT = (0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 1, 3, 2, 0)


@pytest.fixture
def seeds_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that ask for no seed get one each all the same, which makes a statistical test certain."""
    numbers = count(1000)
    monkeypatch.setattr(secrets, "randbits", lambda n_bits: next(numbers))


@torch.no_grad()
def expected_counts(model: Transformer) -> dict[tuple[int, ...], float]:
    """How often each continuation of three tokens should come, by the model's own probabilities."""
    first = model.logits(model.hidden_states(torch.tensor([PROMPT]))[:, -1]).double().softmax(-1)[0]
    found: dict[tuple[int, ...], float] = {}
    for one, two in product(range(4), repeat=2):
        hidden = model.hidden_states(torch.tensor([[*PROMPT, one, two]]))
        second, third = model.logits(hidden[:, -2:]).double().softmax(-1)[0]
        for three in range(4):
            found[one, two, three] = N_ROWS * float(first[one] * second[two] * third[three])
    return found


def counts_of(decoding: BatchDecoder) -> dict[tuple[int, ...], int]:
    found: dict[tuple[int, ...], int] = {}
    for ids in decoding.generated:
        found[tuple(ids)] = found.get(tuple(ids), 0) + 1
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("seeds_that_repeat")
@pytest.mark.parametrize("speculate", [0, 1, 2, 4])
def test_speculation_keeps_the_sampling_distribution(speculate: int, build_tiny: Build, decode: Decode) -> None:
    model = build_tiny(vocab_size=4)
    sampling = SamplingConfig(temperature=1.0, top_p=None)
    decoding = decode(model, [PROMPT] * N_ROWS, sampling, 3, speculate=speculate)
    statistic, limit = chi_square(counts_of(decoding), expected_counts(model))
    assert statistic < limit
    if speculate:
        assert 0 < decoding.n_accepted < decoding.n_drafted


@pytest.mark.slow
@pytest.mark.usefixtures("seeds_that_repeat")
def test_speculation_distribution_test_detects_accepting_everything(
    build_tiny: Build, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_all(chosen: Sequence[int], draft: Sequence[int]) -> list[int]:
        return [*draft, chosen[len(draft)]]

    monkeypatch.setattr(rows_module, "accepted_tokens", take_all)
    model = build_tiny(vocab_size=4)
    decoding = decode(model, [PROMPT] * N_ROWS, SamplingConfig(temperature=1.0, top_p=None), 3, speculate=2)
    statistic, limit = chi_square(counts_of(decoding), expected_counts(model))
    assert statistic > 2 * limit


def slid(text: Sequence[int], limit: int) -> list[int]:
    """Return the part of ``text`` that a sliding row keeps once its context is full."""
    return list(text[-(limit // 2) :])


@pytest.mark.parametrize(("base", "limit", "position"), pairs(BASES, [4, 9, 16], ["rope", "sinusoidal"]))
def test_sliding_context_equals_reprompting_with_tail(
    base: str, position: str, limit: int, build_tiny: Build, decode: Decode, decode_naively: Naively
) -> None:
    model = build_tiny(base=base, positional_encoding=position, max_seq_len=limit)
    prompt = [1, 5, 9][: limit - 1]
    decoding = decode(model, [prompt], n=3 * limit, context="slide")
    assert decoding.finish_reasons == ["length"]
    text = [*prompt, *decoding.generated[0]]
    assert len(text) == len(prompt) + 3 * limit
    # The model never sees more than its context; whenever that is full, the older half is dropped.
    memory, n_slid = list(prompt), 0
    for token in decoding.generated[0]:
        if len(memory) > limit:
            memory, n_slid = slid(memory, limit), n_slid + 1
        assert [token] == decode_naively(model, memory, n=1)
        memory.append(token)
    assert n_slid >= 3
    # Up to the first of them it equals a context that stops.
    stopped = decode(model, [prompt], n=3 * limit)
    assert stopped.finish_reasons == ["context"]
    assert decoding.generated[0][: len(stopped.generated[0])] == stopped.generated[0]


def test_sliding_context_keeps_prompt_that_just_fits(
    build_tiny: Build, decode: Decode, decode_naively: Naively
) -> None:
    model = build_tiny(max_seq_len=9)
    prompt = [1, 5, 9, 2, 7, 7, 3, 12, 4]
    found = decode(model, [prompt], n=2, context="slide")
    (first,) = decode_naively(model, prompt, n=1)
    assert found.generated[0] == [first, *decode_naively(model, slid([*prompt, first], 9), n=1)]


@pytest.mark.parametrize("length", [10, 30])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_sliding_context_truncates_long_prompt_to_its_end(
    length: int, sampling: SamplingConfig, build_tiny: Build, decode: Decode
) -> None:
    model = build_tiny(max_seq_len=9)
    prompt = torch.randint(0, 17, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    found = decode(model, [prompt, [3]], sampling, 30, context="slide")
    assert found.generated == decode(model, [prompt[-4:], [3]], sampling, 30, context="slide").generated
    assert found.finish_reasons == ["length"] * 2
    assert found.prompts[0] == prompt[-4:]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "dtype", "position"), pairs(BASES, DTYPES, ["rope", "sinusoidal"]))
def test_sliding_context_rows_slide_independently(
    base: str, position: str, dtype: WeightDtype, build_tiny: Build, decode: Decode
) -> None:
    engine = Engine(build_tiny(base=base, positional_encoding=position, max_seq_len=9), dtype=dtype)
    prompts = [*RAGGED, [4] * 8, [2, 3] * 9]
    for sampling in SAMPLINGS[:2]:
        alone = [decode(engine, [prompt], sampling, 16, context="slide").generated[0] for prompt in prompts]
        eos = next(token for token in range(17) if 1 < sum(token in ids for ids in alone) < 7)
        assert decode(engine, prompts, sampling, 16, context="slide").generated == alone
        # Rows that leave do not disturb those that slide.
        cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in alone]
        assert decode(engine, prompts, sampling, 16, context="slide", eos_id=eos).generated == cut
        for speculate in (1, 3, 15):
            guessed = decode(engine, prompts, sampling, 16, context="slide", eos_id=eos, speculate=speculate)
            assert guessed.generated == cut


def test_sliding_context_speculation_keeps_tokens(build_tiny: Build, decode: Decode) -> None:
    engine = Engine(build_tiny(max_seq_len=16))
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=0.5)
    plain = decode(engine, [[1, 2, 3, 1, 2, 3]], sampling, 60, context="slide")
    guessed = decode(engine, [[1, 2, 3, 1, 2, 3]], sampling, 60, context="slide", speculate=4)
    assert guessed.generated == plain.generated
    assert guessed.n_accepted > 0


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_sliding_context_too_short_raises(limit: int, build_tiny: Build, decode: Decode) -> None:
    model = build_tiny(max_seq_len=limit)
    with pytest.raises(GenerationError, match=f"a context of {limit} tokens is too short to slide"):
        decode(model, [[1]], context="slide")
    if limit > 1:
        assert decode(model, [[1]]).finish_reasons == ["context"]


def test_sliding_context_does_not_apply_to_alibi(build_tiny: Build, decode: Decode) -> None:
    # Not even where the context would be too short to.
    model = build_tiny(positional_encoding="alibi", max_seq_len=3)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [2]]
    assert decode(model, prompts, n=30, context="slide").generated == decode(model, prompts, n=30).generated


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"context": "slid"}, r"context 'slid' is not one of stop, slide \(did you mean 'slide'\?\)"),
        ({"context": None}, "context None is not one of stop, slide"),
        ({"speculate": 16}, r"speculate 16 is not in 0 \.\. 15"),
        ({"speculate": -1}, r"speculate -1 is not in 0 \.\. 15"),
        ({"speculate": 1.5}, r"speculate 1\.5 is not a whole number"),
        ({"speculate": None}, "speculate None is not a whole number"),
        ({"speculate": True}, "speculate True is not a whole number"),
    ],
    ids=str,
)
def test_decoding_unknown_setting_raises(setting: dict[str, Any], said: str, build_tiny: Build, decode: Decode) -> None:
    with pytest.raises(GenerationError, match=said):
        decode(build_tiny(), [[1]], **setting)
