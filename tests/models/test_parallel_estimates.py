"""Estimates of memory and communication over many devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from psannlm.config.model import ModelConfig
from psannlm.models.accounting import count_parameters, training_memory
from psannlm.models.parallel_estimates import Device, bytes_sent, sharded_elements, sharded_memory, tokens_per_s
from psannlm.models.registry import build_model, resolve
from psannlm.training.optim import group_parameters

CONFIG = resolve(
    ModelConfig(base="respsann", d_model=64, n_layers=3, n_heads=2, residual_scale=True), vocab_size=128, max_seq_len=32
)
GPU = Device("any", 1e9, 1e12, 0.5, 1e9, 1e8)


def test_sharded_elements_are_the_decayed_ones() -> None:
    groups = group_parameters(build_model(CONFIG, device="meta"))
    ends = groups.embedding | groups.head
    sizes = [sum(p.numel() for p in part.values()) for part in (groups.hidden, ends, groups.undecayed)]
    assert list(sharded_elements(CONFIG)) == sizes
    assert sum(sizes) == sum(count_parameters(CONFIG).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_memory_of_all_devices_sums_to_replica(optimizer: str) -> None:
    """Once the rest, which every device has, is taken off; rounding is below one element a device."""
    whole = training_memory(CONFIG, 2, 32, optimizer=optimizer)  # type: ignore[arg-type]
    rest = sharded_elements(CONFIG)[2]
    for n_devices in (1, 2, 7, 64):
        part = sharded_memory(whole, CONFIG, n_devices, dtype=torch.float32)
        for name, per_element in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
            in_all = n_devices * (getattr(part, name) - per_element * rest) + per_element * rest
            assert 0 <= in_all - getattr(whole, name) <= 8 * n_devices, (name, n_devices)
        assert part.activations == whole.activations


def test_sharded_memory_accumulated_gradients_are_whole() -> None:
    whole = training_memory(CONFIG, 2, 32)
    kept = sharded_memory(whole, CONFIG, 4, dtype=torch.float32, grad_accum_steps=2)
    sent = sharded_memory(whole, CONFIG, 4, dtype=torch.float32, grad_accum_steps=2, grad_sync="micro_batch")
    assert kept == replace(sent, gradients=kept.gradients)
    assert kept.gradients - sent.gradients == 4 * sum(sharded_elements(CONFIG)[:2])


@pytest.mark.slow
def test_sharded_memory_counts_no_autocast_copies() -> None:
    """What the copies take is found by running the pass on shapes; what is left must be what scales with the batch."""
    one, two = (training_memory(CONFIG, n, 32, dtype=torch.bfloat16) for n in (1, 2))
    part = sharded_memory(one, CONFIG, 2, dtype=torch.bfloat16)
    assert part.activations >= 0
    assert one.activations - part.activations == 2 * sharded_elements(CONFIG)[0]
    assert part.activations < 2 * (two.activations - one.activations) + one.weights


def test_bytes_sent_replicas_send_less_than_shards() -> None:
    assert bytes_sent(CONFIG, 1, dtype=torch.float32).total == 0
    n = sum(count_parameters(CONFIG).values())
    assert bytes_sent(CONFIG, 2, dtype=torch.float32).total == 4 * n
    assert bytes_sent(CONFIG, 2, dtype=torch.float32, micro_batches=3).total == 4 * n
    assert bytes_sent(CONFIG, 2, dtype=torch.float32, micro_batches=3, each=True).total == 12 * n
    hidden, ends, rest = sharded_elements(CONFIG)
    expected = (3 * (2 * 2 * hidden + 4 * ends) + 4 * (hidden + ends) + 8 * rest) / 2
    assert bytes_sent(CONFIG, 2, 2, dtype=torch.bfloat16, micro_batches=3).total == expected


def test_bytes_sent_hybrid_sends_little_between_groups() -> None:
    """Within a group as if it were alone, and beyond it the gradients of one shard, once."""
    hidden, ends, rest = sharded_elements(CONFIG)
    alone = bytes_sent(CONFIG, 4, 4, dtype=torch.bfloat16, micro_batches=3)
    for each in (False, True):
        sent = bytes_sent(CONFIG, 32, 4, dtype=torch.bfloat16, micro_batches=3, each=each)
        assert sent.beyond == pytest.approx(2 * 7 / 8 * (hidden + ends) + 2 * 31 / 32 * 4 * rest)
        more = 2 * 3 / 4 * 4 * (hidden + ends) if each else 0
        assert sent.within == pytest.approx(alone.within - 2 * 3 / 4 * 4 * rest + more)


def test_tokens_per_s_is_bound_by_slower_resource() -> None:
    def rate(n_devices: int, tokens: int, device: Device = GPU) -> float:
        return tokens_per_s(
            CONFIG, device, n_devices, n_devices, seq_len=32, tokens_per_device=tokens, grad_checkpoint=False
        )

    many = 1_000_000
    assert rate(8, many) == pytest.approx(8 * rate(1, many))
    assert rate(8, 32) < 8 * rate(1, 32)
    assert rate(16, 32) < 2 * rate(8, 32)
    assert rate(8, 32, replace(GPU, node_bytes_per_s=2e9)) == pytest.approx(2 * rate(8, 32))
