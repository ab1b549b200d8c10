"""Parameter counts, FLOPs and memory estimates against the real model."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from psannlm.config.model import BaseName, ModelConfig
from psannlm.errors import ConfigError
from psannlm.kernels.recompute import recompute_disabled
from psannlm.models import accounting
from psannlm.models.accounting import (
    Place,
    count_parameters,
    describe_oversize,
    flops_per_token,
    refuse_oversize,
    training_memory,
)
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.training.optim import OptimizerSet

TINY: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50}
CONFIGS = [
    resolve(
        ModelConfig(base=base, mlp=mlp, tie_embeddings=tied, short_conv={"enabled": conv, "activation": "sine"}, **TINY)
    )
    for base, mlp, tied, conv in (
        ("respsann", "sine", False, False),
        ("waveresnet", "sineglu", False, True),
        ("transformer", "swiglu", True, False),
        ("transformer", "gelu", False, True),
        ("transformer", "gelusine", True, False),
    )
]
NORMED = {"activation_norm": True, "embedding_norm": True}
CONFIGS.append(resolve(ModelConfig(base="respsann", short_conv={"activation": "sine"}, **NORMED, **TINY)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.base}-{c.mlp}")
def test_count_parameters_groups_sum_to_the_model(config: ModelConfig) -> None:
    counts = count_parameters(config)
    assert sum(counts.values()) == sum(p.numel() for p in build_model(config).parameters())
    assert counts["embedding"] == 50 * 16
    assert counts.get("output matrix", 0) == (0 if config.tie_embeddings else 50 * 16)
    assert counts["attention"] == 2 * (2 * 16 * 16 + 2 * 8 * 16)
    assert counts["norms"] == (5 + config.embedding_norm) * 16
    assert counts.get("residual scales", 0) == (4 if config.base == "respsann" else 0)
    assert counts.get("short convolution", 0) == (2 * 2 * 16 * 4 if config.short_conv.enabled else 0)
    per_feature = {"sine": 3, "sineglu": 3, "gelusine": 2}.get(config.mlp or "", 0)
    of_convs = 3 * 4 * 16 * bool(config.short_conv.enabled)
    assert counts.get("sine", 0) == 2 * (config.d_mlp or 0) * per_feature + of_convs


@pytest.mark.parametrize(
    ("settings", "matrices"),
    [
        # Per layer: q 16, k and v 8 each, out 16; then the feed-forward; the output matrix 40 once.
        ({"mlp": "swiglu"}, 2 * (48 + 3 * 24) + 40),
        ({"mlp": "gelu"}, 2 * (48 + 2 * 24) + 40),
        ({"mlp": "sine"}, 2 * (48 + 2 * 24) + 40),  # the bias is added, not multiplied
        ({"mlp": "swiglu", "tie_embeddings": True}, 2 * (48 + 3 * 24) + 40),
        ({"mlp": "gelu", "short_conv": {"enabled": True, "kernel_size": 3}}, 2 * (48 + 2 * 24 + 2 * 12) + 40),
    ],
    ids=str,
)
def test_flops_known_values(settings: dict[str, Any], matrices: int) -> None:
    config = ModelConfig(
        base="transformer", d_model=4, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=6, vocab_size=10, **settings
    )
    # Attention: 2 layers x width 4 x 8 tokens x 12.
    assert flops_per_token(resolve(config), 8) == 6 * matrices + 12 * 2 * 4 * 8


def measured_activations(model: Transformer, n_rows: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that autograd saves in a real forward pass, parameters left out."""
    saved: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.zeros(n_rows, seq_len, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(input_ids, input_ids)
    return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.base}-{c.mlp}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_training_memory_matches_a_real_pass(
    config: ModelConfig, dtype: torch.dtype, grad_checkpoint: bool, device_type: str, norms_of_a_gpu: Any
) -> None:
    """With recomputation: what the pass keeps, and what one block saves while it is run again."""
    model = build_model(config)
    settings: dict[str, Any] = {"dtype": dtype, "grad_checkpoint": grad_checkpoint, "device_type": device_type}
    for n_rows in (1, 5):
        # What a GPU keeps is what a CPU would without the passes that only it has, and with the norms of a GPU.
        with ExitStack() as stack:
            if device_type == "cuda":
                stack.enter_context(recompute_disabled())
                stack.enter_context(norms_of_a_gpu())
            model.grad_checkpoint = False
            measured = measured_activations(model, n_rows, 32, dtype)
            if grad_checkpoint:
                model.grad_checkpoint = True
                kept = measured_activations(model, n_rows, 32, dtype)
                measured = kept + (measured - kept) // config.n_layers
        assert training_memory(config, n_rows, 32, **settings).activations == pytest.approx(measured, rel=0.01)


# Without gelusine, of which a CPU recomputes nothing.
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.mlp != "gelusine"], ids=lambda c: f"{c.base}-{c.mlp}")
def test_training_memory_gpu_exceeds_cpu(config: ModelConfig) -> None:
    on_cpu, on_gpu = (training_memory(config, 4, 32, device_type=name).activations for name in ("cpu", "cuda"))
    assert on_gpu > on_cpu


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.base}-{c.mlp}")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_memory_optimizer_state_matches_optimizer(config: ModelConfig, name: Any) -> None:
    model = build_model(config)
    optimizers = OptimizerSet(model, name, 0.1)
    input_ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids, input_ids).backward()
    for optimizer in optimizers.optimizers:
        optimizer.step()
    held = sum(t.nbytes for key, t in optimizers.tensors().items() if not key.endswith("/step"))
    memory = training_memory(config, 1, 8, optimizer=name)
    assert memory.optimizer == held
    assert memory.weights == memory.gradients == sum(p.nbytes for p in model.parameters())
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.scratch
    assert memory.total == parts


@pytest.mark.slow
def test_training_memory_reflects_memory_savings() -> None:
    config = CONFIGS[1]
    plain = training_memory(config, 4, 64)
    assert training_memory(config, 4, 64, optimizer="muon").optimizer < plain.optimizer
    assert training_memory(config, 4, 64, dtype=torch.bfloat16).activations < plain.activations
    assert training_memory(config, 4, 64, grad_checkpoint=True).activations < 0.7 * plain.activations  # of 2 blocks
    assert training_memory(config, 8, 64).activations > 1.8 * plain.activations


@pytest.mark.slow
@pytest.mark.parametrize("base", get_args(BaseName))
def test_training_memory_of_huge_model_is_fast(base: BaseName) -> None:
    config = resolve(ModelConfig(base=base, d_model=8192, n_layers=2, n_heads=64, vocab_size=128_000))
    started_s = time.process_time()
    assert sum(count_parameters(config).values()) > 2 * 12 * 8192**2
    assert training_memory(config, 64, 4096).activations > 1 << 34
    assert time.process_time() - started_s < 5.0


def test_training_memory_builds_deep_model_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    original = Transformer.__init__

    def note(self: Transformer, config: ModelConfig) -> None:
        built.append(config)
        original(self, config)

    monkeypatch.setattr(Transformer, "__init__", note)
    config = resolve(ModelConfig(base="respsann", **{**TINY, "vocab_size": 51}))
    count_parameters(config)
    flops_per_token(config, 16)
    training_memory(config, 4, 16, optimizer="muon")
    assert len(built) == 2
    # Another configuration gets figures of its own, and so does the first one after it.
    assert count_parameters(resolve(ModelConfig(base="respsann", **TINY)))["embedding"] == 50 * 16
    assert count_parameters(config)["embedding"] == 51 * 16


def test_oversize_model_is_refused_immediately() -> None:
    for settings in ({"n_layers": 1_000_000}, {"d_model": 1_000_000, "n_heads": 1}, {"n_layers": 10**9}):
        config = ModelConfig(base="transformer", **settings)
        with pytest.raises(ConfigError, match="GB for the model alone"):
            refuse_oversize(config, 300)
    refuse_oversize(ModelConfig(base="transformer", d_model=16, n_layers=2, n_heads=2), 300)


def test_oversize_shapes_beyond_64_bits_raise() -> None:
    with pytest.raises(ConfigError, match=r"more elements than 64 bits can count|GB for the model alone"):
        refuse_oversize(ModelConfig(base="transformer", d_model=1 << 40, n_heads=1), 300)


GB = 10**9


@pytest.mark.parametrize(
    ("place", "memory_gb", "fault"),
    [
        (Place(), 17, None),
        (Place(), 15, "weights, gradients and optimizer state), and this machine has 15.0 GB"),
        (Place(for_training=False), 5, None),
        (Place(for_training=False), 3, "(weights), and this machine has 3.0 GB"),
        (Place(n_ranks=2), 30, "need 32.0 GB for the model alone (weights, gradients and optimizer state of 2 ranks)"),
        (Place(n_ranks=4, n_shards=4), 17, None),
        (Place(n_ranks=4, n_shards=4), 15, "need 16.0 GB"),
        (Place(n_ranks=1, n_shards=8), 3, "need 4.0 GB"),
        (Place("cuda", 17 * GB), 5, None),
        (Place("cuda", 17 * GB), 3, "need 4.0 GB for the model alone (weights), and this machine has 3.0 GB"),
        (Place("cuda", 15 * GB), 5, "and the GPU has 15.0 GB; lower model.d_model"),
        (Place("cuda", 15 * GB), 5, "or shard it over several GPUs with train.fsdp: full"),
        (Place("cuda", 9 * GB, n_shards=2), 5, None),
        (Place("cuda", 7 * GB, n_shards=2), 5, "need 8.0 GB for the model alone"),
        (Place("cuda", None), 5, None),
        (Place("cuda", 5 * GB, for_training=False), 5, None),
    ],
    ids=str,
)
def test_oversize_depends_on_device_and_ranks(
    place: Place, memory_gb: int, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A billion parameters take 4 GB, and 16 GB with gradients and the optimizer's two moments."""
    monkeypatch.setattr(accounting, "count_parameters", lambda config: {"all": GB})
    monkeypatch.setattr("psannlm.io.limits._physical_bytes", lambda: memory_gb * GB)
    monkeypatch.setattr("psannlm.io.limits.cgroup_limit_bytes", lambda: None)
    found = describe_oversize(ModelConfig(n_layers=1), place)
    assert (found is None) is (fault is None)
    assert (fault or "") in (found or "")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["waveresnet", "transformer"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_training_memory_deep_model_is_extrapolated_exactly(
    base: BaseName, grad_checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(ModelConfig(base=base, **{**TINY, "n_layers": 5}))
    whole = training_memory(config, 3, 8, grad_checkpoint=grad_checkpoint)
    monkeypatch.setattr(accounting, "_MOST_LAYERS_BUILT", 4)
    assert training_memory(config, 3, 8, grad_checkpoint=grad_checkpoint) == whole


def test_count_parameters_of_million_layers_is_fast() -> None:
    config = resolve(ModelConfig(base="respsann", **{**TINY, "n_layers": 1_000_000}))
    started_s = time.process_time()
    assert training_memory(config, 4, 16).activations > 10**6
    assert time.process_time() - started_s < 5.0


def test_count_parameters_matches_built_model(build_tiny: Any) -> None:
    for base in ("waveresnet", "respsann", "transformer"):
        model = build_tiny(base=base, n_layers=3)
        assert sum(count_parameters(model.config).values()) == sum(p.numel() for p in model.parameters())


def test_match_mlp_width_reaches_target_parameters() -> None:
    assert accounting.match_mlp_width(lambda width: 1000 + 37 * width, 1000 + 37 * 802) == 800
    assert accounting.match_mlp_width(lambda width: 10 * width, 1230) == 123
