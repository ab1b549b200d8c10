"""Inference engine: the model's logits, batch-invariant, compiled and uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from psannlm.config.model import BaseName, PositionKind
from psannlm.errors import DeviceError, GenerationError
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.requests import SamplingConfig
from psannlm.kernels.compiler import has_compiler
from psannlm.kernels.torch_private import can_compile_ahead
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import CACHE_BLOCK_TOKENS, MAX_DECODE_TOKENS, KVCache
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import computes_in_bf16

Build = Callable[..., Transformer]
Decode = Callable[..., BatchDecoder]
CPU = torch.device("cpu")
BASES, POSITIONS, DTYPES = get_args(BaseName), get_args(PositionKind), get_args(WeightDtype)
GREEDY = SamplingConfig(temperature=0.0)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed))


def run(engine: Engine, prompts: Sequence[Sequence[int]], following: Tensor, n_new: int = 1) -> Tensor:
    """Logits (B, 1 + T, V) after the prompts and after each of the tokens (B, T) that follow."""
    logits, state = engine.prefill(prompts, n_new)
    return torch.stack([logits, *(engine.decode(following[:, t], state) for t in range(following.shape[1]))], dim=1)


@torch.no_grad()
def full(model: Transformer, prompt: Sequence[int], following: Tensor) -> Tensor:
    """The same for one row, from a single forward pass of the model."""
    input_ids = torch.tensor([[*prompt, *following.tolist()]])
    return model.logits(model.hidden_states(input_ids))[0, len(prompt) - 1 :]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
def test_engine_matches_uncached_model(base: str, position: str, build_tiny: Build) -> None:
    model = build_tiny(base=base, positional_encoding=position, n_kv_heads=1, max_seq_len=200)
    engine = Engine(model)
    prompts = [tokens(n).tolist() for n in (3, 1, 70, 16, 17)]
    following = tokens(5, 80, seed=1)
    found = run(engine, prompts, following)
    assert found.dtype == torch.float32
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[row], full(model, prompt, following[row]), rtol=0, atol=2e-4)
    # The module's own KV cache leads to the same logits.
    logits, past = model(torch.tensor([prompts[2]]), use_cache=True)
    by_module = [logits[0, -1]]
    for token in following[2][:4]:
        logits, past = model(token.view(1, 1), past_kvs=past, use_cache=True)
        by_module.append(logits[0, -1])
    torch.testing.assert_close(torch.stack(by_module), found[2][:5], rtol=0, atol=2e-4)


def require_exact(dtype: WeightDtype) -> None:
    """Skip where products themselves depend on how many rows there are."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    if dtype != "float32" and not computes_in_bf16(CPU):
        pytest.skip(f"this CPU has no bf16 hardware, and {dtype} is widened for products that depend on the batch")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_rows_are_batch_invariant_bitwise(
    base: str, position: str, dtype: WeightDtype, build_tiny: Build
) -> None:
    require_exact(dtype)
    # A feed-forward wide enough for the kernels that split their sums, and prompts of more and less than a block.
    settings = {"d_model": 32, "d_mlp": 1408, "max_seq_len": 700, "n_layers": 1}
    engine = Engine(build_tiny(base=base, positional_encoding=position, **settings), dtype=dtype)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 1, 40, 530, 230)]
    following = tokens(5, 6, seed=1)
    together = run(engine, prompts, following)
    for rows in ([0], [1], [2], [3], [4], [2, 0], [4, 1, 2]):
        found = run(engine, [prompts[row] for row in rows], following[rows])
        for place, row in enumerate(rows):
            assert torch.equal(found[place], together[row]), rows


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_multi_token_pass_equals_single_steps_bitwise(
    base: str, position: str, dtype: WeightDtype, build_tiny: Build
) -> None:
    require_exact(dtype)
    conv = {"enabled": True, "kernel_size": 3, "dilation_growth": 2} if base == "waveresnet" else {}
    model = build_tiny(base=base, positional_encoding=position, n_kv_heads=1, max_seq_len=200, short_conv=conv)
    engine = Engine(model, dtype=dtype)
    prompts = [tokens(n).tolist() for n in (50, 3)]
    following = tokens(2, 40, seed=1)
    wanted = run(engine, prompts, following)[:, 1:]
    _, state = engine.prefill(prompts, 1)
    parts = []
    with torch.inference_mode():
        for chunk in following.split([2, 16, 1, 5, 9, 7], dim=1):
            parts.append(engine.forward_tokens(chunk, state))
            state.commit()
    assert torch.equal(torch.cat(parts, dim=1), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_cache_growth_changes_no_logits(dtype: WeightDtype, build_tiny: Build) -> None:
    engine = Engine(build_tiny(max_seq_len=1000), dtype=dtype)
    size = 4 if dtype == "float32" else 2
    assert engine.cache_dtype.itemsize == size
    prompts = [tokens(n).tolist() for n in (3, 40)]
    following = tokens(2, 330, seed=1)
    states = [engine.prefill(prompts, n_new)[1] for n_new in (1, 10_000)]
    grown, large = states
    capacities = [grown.capacity]
    assert grown.capacity == CACHE_BLOCK_TOKENS < large.capacity
    for t in range(330):
        assert torch.equal(engine.decode(following[:, t], grown), engine.decode(following[:, t], large))
        for state in states:
            assert state.n_bytes == cache_bytes(engine.model.config, 2, state.capacity, size)
        if grown.capacity != capacities[-1]:
            capacities.append(grown.capacity)
    # Several blocks, of which each is half as large again, so that little is copied and little is held for nothing.
    assert len(capacities) >= 4
    for before, after in pairwise(capacities):
        assert after % CACHE_BLOCK_TOKENS == 0
        assert before < after <= before * 3 // 2 + CACHE_BLOCK_TOKENS
    assert grown.lengths == [333, 370]


def test_engine_too_many_tokens_per_pass_raise(build_tiny: Build) -> None:
    engine = Engine(build_tiny())
    _, state = engine.prefill([[1]], 1)
    with pytest.raises(
        GenerationError, match=f"{MAX_DECODE_TOKENS + 1} tokens at once .* use {MAX_DECODE_TOKENS} at most"
    ):
        engine.forward_tokens(tokens(1, MAX_DECODE_TOKENS + 1), state)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("int4", r"dtype 'int4' is not one of float32, bfloat16, int8 \(did you mean 'int8'\?\)"),
        ("fp32", "dtype 'fp32' is not one of"),
        (8, "dtype 8 is not one of"),
    ],
)
def test_engine_unknown_dtype_raises(dtype: Any, said: str, build_tiny: Build) -> None:
    with pytest.raises(GenerationError, match=said):
        Engine(build_tiny(), dtype=dtype)


def test_engine_auto_compile_without_compiler_gives_notice(
    build_tiny: Build, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.generation.engine.compiler_fault", lambda device: "a C++ compiler (install g++)")
    model = build_tiny()
    engine = Engine(model, compile="auto")
    assert engine.compiles is False
    assert len(engine.notices) == 1
    assert "needs a C++ compiler" in engine.notices[0]
    assert decode(engine, [[1, 5], [2]]).generated == decode(model, [[1, 5], [2]]).generated
    assert Engine(model).notices == []


def test_engine_required_compile_without_compiler_raises(build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.kernels.compiler.missing_to_compile", lambda device: "a C++ compiler (install g++)")
    with pytest.raises(
        DeviceError, match=r"compiled decoding needs a C\+\+ compiler .install g\+\+., which is missing"
    ):
        Engine(build_tiny(), compile=True)


def test_engine_compiled_step_marks_cache_addresses_static(build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler refuses CUDA graphs for a pass that writes into any other input, without an error."""
    monkeypatch.setattr("psannlm.generation.engine.require_compiler", lambda *asked: None)
    monkeypatch.setattr("psannlm.generation.engine.compiled_step", lambda step, model, args, options: step)
    engine = Engine(build_tiny(base="waveresnet"), compile=True)
    logits, state = engine.prefill([[1, 5], [2]], 8)
    engine.decode(logits.argmax(dim=-1), state)
    for layer in state.layers:
        for tensor in (layer.keys, layer.values, layer.attn_conv_state, layer.mlp_conv_state):
            assert getattr(tensor, "_dynamo_static_input_type", None) == "unguarded"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_engine_notices_emulated_dtypes(dtype: WeightDtype, build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("psannlm.generation.engine", "psannlm.generation.quantize"):
        monkeypatch.setattr(f"{module}.computes_in_bf16", lambda device: False)
    model = build_tiny(max_seq_len=100)
    engine = Engine(model, dtype=dtype)
    assert [dtype in notice and "no bf16 hardware" in notice for notice in engine.notices] == [True]
    prompt, following = tokens(20).tolist(), tokens(10, seed=1)
    found = run(engine, [prompt], following[None])[0]
    wanted = full(model, prompt, following)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_engine_weight_bytes_follow_dtype(build_tiny: Build) -> None:
    model = build_tiny()
    wide, half, quarter = (Engine(model, dtype=dtype).weight_bytes for dtype in ("float32", "bfloat16", "int8"))
    assert wide == 2 * half == 4 * quarter


compiled = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler for torch.compile"),
    pytest.mark.filterwarnings("ignore"),
]


def in_compiled_tests(function: Any) -> Any:
    for mark in compiled:
        function = mark(function)
    return function


# One layer and one set of sizes for all of them, so that the compiler's own cache serves what differs in weights alone.
COMPILED = {"n_layers": 1, "d_model": 16, "d_mlp": 32, "max_seq_len": 1000}
RAGGED = [[1, 5, 9], [1, 2, 3, 4, 5, 6, 7] * 8, [16]]


@pytest.fixture(scope="module")
def compiled_engines(build_tiny: Build) -> dict[str, Engine]:
    model = build_tiny(**COMPILED)
    return {dtype: Engine(model, dtype=dtype, compile=True) for dtype in ("float32", "int8")}


@in_compiled_tests
def test_engine_compiled_steps_match_model(compiled_engines: dict[str, Engine], build_tiny: Build) -> None:
    """Over growth from one block to many, in one state after another, each with a capacity of its own."""
    engine, model = compiled_engines["float32"], build_tiny(**COMPILED)
    assert engine.compiles
    assert engine.notices == []
    for n_prompt, n, n_new in ((5, 270, 1), (5, 180, 300), (100, 50, 30), (30, 20, 1)):
        prompts = [tokens(n_prompt + row, seed=row).tolist() for row in range(3)]
        following = tokens(3, n, seed=n)
        found = run(engine, prompts, following, n_new)
        for row, prompt in enumerate(prompts):
            wanted = full(model, prompt, following[row])
            torch.testing.assert_close(found[row], wanted, rtol=0, atol=3e-4)


@in_compiled_tests
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_engine_compiled_tokens_match_eager_and_single_rows(
    dtype: WeightDtype, compiled_engines: dict[str, Engine], build_tiny: Build, decode: Decode
) -> None:
    engine = compiled_engines[dtype]
    sampled = SamplingConfig(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.2, seed=11)
    for sampling in (GREEDY, sampled):
        # Three rows and one row by turns: each size has a step of its own.
        together = decode(engine, RAGGED, sampling, 150)
        alone = [decode(engine, [prompt], sampling, 150).generated[0] for prompt in RAGGED]
        assert together.generated == alone
        assert decode(engine, RAGGED, sampling, 150).generated == alone
        if dtype == "float32":
            assert decode(build_tiny(**COMPILED), RAGGED, sampling, 150).generated == alone
        # Rows that have ended stay in the batch, and disturb no other.
        ends = {token: [[*ids, token].index(token) for ids in alone] for token in range(17)}
        eos = max(ends, key=lambda token: max(ends[token]) - min(ends[token]))
        assert max(ends[eos]) - min(ends[eos]) >= 10
        cut = [ids[:end] for ids, end in zip(alone, ends[eos], strict=True)]
        ended = decode(engine, RAGGED, sampling, 150, eos_id=eos)
        assert ended.generated == cut
        assert ended.finish_reasons == ["stop" if eos in ids else "length" for ids in alone]


@in_compiled_tests
@pytest.mark.skipif(not can_compile_ahead(), reason="products and attention in C++ need torch 2.13")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_engine_compiled_row_is_same_among_many(dtype: str, compiled_engines: dict[str, Engine]) -> None:
    """To the last bit among 2 and 20 rows; int8 could not be compiled for more than 16."""
    engine = compiled_engines[dtype]
    prompts = [tokens(5 + 3 * row, seed=row).tolist() for row in range(20)]
    following = tokens(20, 12, seed=50)
    among_many = run(engine, prompts, following)
    for row, of_pair in enumerate(run(engine, prompts[:2], following[:2])):
        assert torch.equal(of_pair, among_many[row])


@in_compiled_tests
def test_engine_compiled_speculation_keeps_tokens(
    compiled_engines: dict[str, Engine], build_tiny: Build, decode: Decode
) -> None:
    engine = compiled_engines["float32"]
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=0.5)
    prompts = [[1, 2, 3, 4] * 5, [7, 7, 7, 7], [5, 6] * 4]
    plain = decode(build_tiny(**COMPILED), prompts, sampling, 100)
    guessed = decode(engine, prompts, sampling, 100, speculate=3)
    assert guessed.generated == plain.generated
    assert guessed.n_accepted > 0
    assert guessed.n_passes < plain.n_passes


@in_compiled_tests
def test_engine_compiled_sliding_matches_eager(build_tiny: Build, decode: Decode) -> None:
    # A context of its own needs no kernel of its own.
    model = build_tiny(**{**COMPILED, "max_seq_len": 20})
    found = decode(Engine(model, compile=True), [[1, 5, 9], [2] * 15, [3] * 50], GREEDY, 70, context="slide")
    assert found.generated == decode(model, [[1, 5, 9], [2] * 15, [3] * 50], GREEDY, 70, context="slide").generated


@in_compiled_tests
def test_engine_two_compiled_models_are_independent(
    compiled_engines: dict[str, Engine], build_tiny: Build, decode: Decode
) -> None:
    """Nothing guards a compiled step, so that it must hold the right weights by itself."""
    models = [build_tiny(seed, **COMPILED) for seed in (0, 1, 2)]
    engines = [compiled_engines["float32"], *(Engine(model, compile=True) for model in models[1:])]
    wanted = [decode(model, RAGGED, n=40).generated for model in models]
    assert wanted[0] != wanted[1] != wanted[2]
    for _ in range(2):
        for engine, ids in zip(engines, wanted, strict=True):
            assert decode(engine, RAGGED, n=40).generated == ids
    # Two states of two engines by turns, and two of one.
    states: list[tuple[Engine, KVCache, list[int]]] = []
    found: list[list[int]] = []
    for engine in (*engines, engines[0]):
        logits, state = engine.prefill(RAGGED, 1)
        states.append((engine, state, logits.argmax(-1).tolist()))
        found.append([int(logits[0].argmax())])
    for _ in range(20):
        for at, (engine, state, last) in enumerate(states):
            following = engine.decode(torch.tensor(last), state).argmax(-1).tolist()
            states[at] = (engine, state, following)
            found[at].append(following[0])
    assert found == [ids[0][:21] for ids in (*wanted, wanted[0])]


@in_compiled_tests
def test_engine_compiles_one_step_per_shape(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny(base="transformer", positional_encoding="alibi", n_kv_heads=1, max_seq_len=50)
    engine = Engine(model, compile=True)
    assert decode(engine, [[1, 2, 3], [4]], n=80).generated == decode(model, [[1, 2, 3], [4]], n=80).generated
