"""Rooflines: bytes of a decoding step, memory bandwidth, and the fraction of it that a step reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from psannlm.benchmarks.harness.roofline import memory_reader, read_rate, step_bytes
from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import RooflineFraction


@pytest.mark.parametrize(("dtype", "element"), [("float32", 4), ("bfloat16", 2), ("int8", 2)])
def test_step_bytes_count_weights_once_and_cache_per_row(
    dtype: str, element: int, build_tiny: Callable[..., Transformer]
) -> None:
    engine = Engine(build_tiny(base="transformer"), dtype=dtype)
    # 2 layers of keys and values, 12 wide.
    assert step_bytes(engine, 3, 10) == engine.weight_bytes + 3 * 10 * 2 * 2 * 12 * element
    assert step_bytes(engine, 1, 11) - step_bytes(engine, 1, 10) == 2 * 2 * 12 * element


def test_roofline_fraction_is_paired_by_run() -> None:
    roofline = RooflineFraction.of(100, rates=[1000.0, 500.0, 2000.0], steps_s=[0.2, 0.4, 0.1])
    assert roofline.roofline_s == pytest.approx(0.1)
    # 0.1 s of 0.2 s, 0.2 s of 0.4 s, 0.05 s of 0.1 s: the machine slowed down for both alike.
    assert (roofline.fraction.lowest, roofline.fraction.highest) == (pytest.approx(0.5), pytest.approx(0.5))
    plain = roofline.as_dict()
    assert plain["fraction_of_floor"]["median"] == pytest.approx(0.5)
    assert plain["bytes_per_s"]["median"] == 1000.0


def test_read_rate_is_median_of_fastest_way() -> None:
    now = 0.0

    def spend(*seconds: float) -> Callable[[], None]:
        pending = list(seconds)

        def work() -> None:
            nonlocal now
            now += pending.pop(0)

        return work

    ways = [spend(4.0, 4.0, 1.0), spend(2.0, 9.0, 2.0), spend(3.0, 3.0, 3.0)]
    assert read_rate(ways, 12, 3, lambda: now) == 12 / 2.0


@pytest.mark.parametrize("n_bytes", [4, 4096, 5_000_003])
def test_memory_reader_accepts_any_size(n_bytes: int) -> None:
    assert memory_reader(n_bytes, torch.device("cpu"))(lambda done, total: None) > 0
