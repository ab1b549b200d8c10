"""The rule of ``compile: auto``: the size of the run decides, and a missing compiler is never required."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from psannlm.config.run import RunConfig
from psannlm.errors import DeviceError
from psannlm.models.accounting import flops_per_token
from psannlm.models.registry import resolve
from psannlm.training.plan import COMPILE_BREAK_EVEN_FLOPS, decide_compiling, plan_training, run_flops
from psannlm.training.run import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TinyRun = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is what is tested here, with devices that are not there too."""
    monkeypatch.setattr("psannlm.kernels.compiler.trial_failure", lambda kind, **trust: None)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def there_is(one: bool) -> None:
        monkeypatch.setattr("psannlm.kernels.compiler.shutil.which", lambda name: "/usr/bin/g++" if one else None)

    there_is(True)
    return there_is


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("device", [CPU], ids=str)
def test_compile_auto_compiles_from_break_even_size(device: torch.device) -> None:
    needed = COMPILE_BREAK_EVEN_FLOPS[device.type]
    assert decide_compiling("auto", device, 0.99 * needed) == (False, None)
    is_compiled, said = decide_compiling("auto", device, needed)
    assert (is_compiled, "compiles the model" in str(said)) == (True, True)


def test_compile_auto_gpu_break_even_exceeds_cpu() -> None:
    assert COMPILE_BREAK_EVEN_FLOPS["cuda"] > 100 * COMPILE_BREAK_EVEN_FLOPS["cpu"]
    assert decide_compiling("auto", GPU, 10 * COMPILE_BREAK_EVEN_FLOPS["cpu"]) == (False, None)


def test_compile_without_compiler_auto_continues_true_raises(compiler: Callable[[bool], None]) -> None:
    compiler(False)
    is_compiled, said = decide_compiling("auto", CPU, 1e20)
    assert not is_compiled
    assert "g++" in str(said)
    with pytest.raises(DeviceError, match="compile: false"):
        decide_compiling(True, CPU, 1e20)


@pytest.mark.usefixtures("compiler")
def test_compile_explicit_setting_prints_nothing() -> None:
    assert decide_compiling(True, CPU, 0.0) == (True, None)
    assert decide_compiling(False, CPU, 1e20) == (False, None)


def test_run_flops_count_all_steps(tiny_run: TinyRun) -> None:
    config = tiny_run(grad_accum_steps=3)
    model = resolve(config.model, vocab_size=300, max_seq_len=config.data.max_length)
    per_token = flops_per_token(model, config.data.max_length)
    n_tokens = config.train.batch_tokens // config.data.max_length * config.data.max_length * 3 * 7
    assert run_flops(config, model, 7) == per_token * n_tokens


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("repays", [False, True])
def test_run_compiles_as_its_plan_says(
    repays: bool, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    compiled: list[torch.nn.Module] = []

    def note(model: torch.nn.Module) -> torch.nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr("psannlm.training.run.torch.compile", note)
    if repays:
        monkeypatch.setitem(COMPILE_BREAK_EVEN_FLOPS, "cpu", 1.0)
    config = tiny_run(max_steps=1, compile="auto", device="cpu")
    plan_training(config)
    assert ["compiles the model" in line for line in logged.messages if "compile: auto" in line] == [True] * repays
    assert compiled == []
    result = train(config)
    assert compiled == ([result.model] if repays else [])
