"""``train.global_batch_tokens``: the same steps on any number of ranks, or a refusal."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from psannlm.config.run import RunConfig, plan_batches
from psannlm.data.loader import Position
from psannlm.data.prepare import load_corpus
from psannlm.errors import ConfigError
from psannlm.runtime.distributed import World
from psannlm.training.plan import build_loader

TinyRun = Callable[..., RunConfig]


@pytest.mark.parametrize(("n_ranks", "n_accumulated"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_global_batch_derives_accumulation_from_ranks(tiny_run: TinyRun, n_ranks: int, n_accumulated: int) -> None:
    plan = plan_batches(tiny_run(batch_tokens=32, grad_accum_steps=1, global_batch_tokens=256), n_ranks)
    assert (plan.grad_accum_steps, plan.tokens_per_step) == (n_accumulated, 256)


def test_global_batch_takes_the_same_windows_on_any_ranks(tiny_run: TinyRun) -> None:
    config = tiny_run(batch_tokens=32, grad_accum_steps=1, global_batch_tokens=128)
    data = load_corpus(config.data)

    def steps(n_ranks: int) -> list[list[tuple[int, ...]]]:
        loaders = [build_loader(config, data, World(rank=rank, size=n_ranks)) for rank in range(n_ranks)]
        found = []
        for batches in zip(*(loader.steps(Position()) for loader in loaders), strict=False):
            rows = [row for batch in batches for micro in batch.micro_batches for row in micro.input_ids.tolist()]
            found.append(sorted(map(tuple, rows)))
            if len(found) == 5:
                break
        return found

    assert steps(1) == steps(2) == steps(4)


@pytest.mark.parametrize(("n_ranks", "said"), [(1, "96 or 128"), (3, "96 or 192"), (8, "set it to 256")])
def test_indivisible_global_batch_is_refused_with_the_nearest(tiny_run: TinyRun, n_ranks: int, said: str) -> None:
    config = tiny_run(batch_tokens=32, grad_accum_steps=1, global_batch_tokens=100)
    with pytest.raises(ConfigError, match=f"train.global_batch_tokens: 100 is not a multiple.*{said}"):
        plan_batches(config, n_ranks)


def test_indivisible_global_batch_is_refused_before_anything_is_written(tiny_run: TinyRun) -> None:
    from psannlm.training.run import train

    config = tiny_run(batch_tokens=32, grad_accum_steps=1, global_batch_tokens=100)
    with pytest.raises(ConfigError, match="global_batch_tokens"):
        train(config)
    assert not os.path.lexists(config.train.checkpoint_dir)


def test_global_batch_and_accumulation_exclude_each_other(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="grad_accum_steps: 2 is given, and global_batch_tokens derives it"):
        tiny_run(global_batch_tokens=256)
