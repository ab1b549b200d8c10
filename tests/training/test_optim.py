"""Parameter groups, weight decay, Muon, and the optimiser state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psannlm.config.run import config_from_mapping
from psannlm.config.train import LrScaleConfig
from psannlm.errors import ArtifactError, ConfigError
from psannlm.models.transformer import Transformer
from psannlm.training import optim
from psannlm.training.optim import OptimizerSet, group_parameters

Build = Callable[..., Transformer]
BASES = ("respsann", "waveresnet", "transformer")
OPTIMIZERS = ("adamw", "muon")


def train_a_little(model: Transformer, optimizers: OptimizerSet, n_steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizers.set_lr(1e-2)
    for _ in range(n_steps):
        ids = torch.randint(0, 17, (2, 9), generator=generator)
        optimizers.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers.optimizers:
            optimizer.step()


def stays_put(name: str) -> bool:
    return "norm" in name or "raw_" in name or "scale" in name or "bias" in name or "conv.weight" in name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_shrinks_matrices_only(build_tiny: Build, base: str, optimizer: str, tied: bool) -> None:
    """Under gradients of zero, all that moves a parameter is weight decay."""
    model = build_tiny(base=base, tie_embeddings=tied, short_conv={"activation": "sine"}, residual_scale=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = OptimizerSet(model, optimizer, weight_decay=0.5)
    optimizers.set_lr(0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers.optimizers:
        each.step()
    for name, parameter in model.named_parameters():
        if stays_put(name):
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.ndim == 2, name
            torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.5), msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("base", BASES)
def test_parameter_groups_partition_trainable_parameters(build_tiny: Build, base: str, optimizer: str) -> None:
    model = build_tiny(base=base, sine_params={"learnable": ["frequency"]}, n_kv_heads=1)
    held = [id(p) for o in OptimizerSet(model, optimizer, 0.1).optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_hidden_matrices_only(build_tiny: Build, base: str, tied: bool) -> None:
    model = build_tiny(base=base, tie_embeddings=tied)
    muon, adamw = OptimizerSet(model, "muon", 0.1).optimizers
    name_of = {id(p): name for name, p in model.named_parameters()}
    taken = {name_of[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name in name_of.values() if name.startswith("blocks.") and "_proj.weight" in name}
    left = {name_of[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert {"embedding.weight"} | (set() if tied else {"head.weight"}) <= left


GROUPS = {
    "embedding": lambda name: name == "embedding.weight",
    "head": lambda name: name == "head.weight",
    "scalars": lambda name: stays_put(name) and "raw_" not in name,
    "activations": lambda name: "raw_" in name,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("group", GROUPS)
def test_lr_scale_gives_its_group_another_rate(build_tiny: Build, optimizer: str, group: str) -> None:
    """The group moves as under the multiplied rate, and every other parameter as under the rate itself."""
    settings = {"short_conv": {"activation": "sine"}, "residual_scale": True, "mlp": "sine"}
    scale = LrScaleConfig.model_validate({group: 4.0, **({"activations": 1.0} if group == "scalars" else {})})

    def moved(lr: float, scale: LrScaleConfig | None) -> dict[str, Tensor]:
        model = build_tiny(**settings)
        optimizers = OptimizerSet(model, optimizer, 0.5, scale)
        optimizers.set_lr(lr)
        model(torch.arange(9)[None] % 17, torch.arange(1, 10)[None] % 17).backward()
        for each in optimizers.optimizers:
            each.step()
        assert optimizers.scaled_rates(lr) == ({} if scale is None else {f"lr/{group}": 4.0 * lr})
        return {name: p.detach() for name, p in model.named_parameters()}

    found, usual, faster = moved(0.01, scale), moved(0.01, None), moved(0.04, None)
    of_group = {name for name in found if GROUPS[group](name)}
    assert of_group
    for name, value in found.items():
        assert torch.equal(value, (faster if name in of_group else usual)[name]), name
    assert any(not torch.equal(usual[name], faster[name]) for name in of_group)


def test_lr_scale_of_activations_is_that_of_scalars(build_tiny: Build) -> None:
    adamw = OptimizerSet(build_tiny(), "adamw", 0.1, LrScaleConfig(scalars=2.0))
    assert adamw.scaled_rates(1.0) == {"lr/scalars": 2.0, "lr/activations": 2.0}


@pytest.mark.parametrize("tied", [False, True])
def test_decay_embeddings_false_leaves_the_embedding_undecayed(build_tiny: Build, tied: bool) -> None:
    model = build_tiny(tie_embeddings=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = OptimizerSet(model, "adamw", 0.5, decay_embeddings=False)
    optimizers.set_lr(0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers.optimizers:
        each.step()
    unmoved = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unmoved == {name for name in before if stays_put(name)} | {"embedding.weight"}
    assert tied == ("head.weight" not in before)


def test_lr_scale_of_a_tied_head_is_refused(build_tiny: Build) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_scale\.head.*tied"):
        OptimizerSet(build_tiny(tie_embeddings=True), "adamw", 0.1, LrScaleConfig(head=1.0))
    with pytest.raises(ConfigError, match=r"train\.lr_scale\.head.*tied"):
        config_from_mapping({"model": {"tie_embeddings": True}, "train": {"lr_scale": {"head": 1.0}}})


def test_parameter_groups_leave_out_frozen_parameters(build_tiny: Build) -> None:
    model = build_tiny()
    model.embedding.weight.requires_grad_(False)
    assert not any("embedding.weight" in group for group in vars(group_parameters(model)).values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_roundtrip(build_tiny: Build, optimizer: str) -> None:
    """A continuation with the loaded state makes the very steps that the original makes."""
    model, copy = build_tiny(), build_tiny()
    original = OptimizerSet(model, optimizer, 0.1)
    train_a_little(model, original, 3)
    saved = {name: value.clone() for name, value in original.tensors().items()}
    copy.load_state_dict(model.state_dict())
    loaded = OptimizerSet(copy, optimizer, 0.1)
    loaded.load_tensors(saved)
    assert {name: value.tolist() for name, value in loaded.tensors().items()} == {
        name: value.tolist() for name, value in saved.items()
    }
    train_a_little(model, original, 2, seed=1)
    train_a_little(copy, loaded, 2, seed=1)
    for (name, a), b in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizer_state_is_copied_on_load(build_tiny: Build) -> None:
    model = build_tiny()
    first = OptimizerSet(model, "adamw", 0.1)
    train_a_little(model, first, 1)
    kept = first.tensors()
    frozen = {name: value.clone() for name, value in kept.items()}
    second = OptimizerSet(model, "adamw", 0.1)
    second.load_tensors(kept)
    train_a_little(model, second, 1)
    assert all(torch.equal(kept[name], frozen[name]) for name in kept)


def saved_state(build_tiny: Build, optimizer: str = "adamw") -> dict[str, Tensor]:
    model = build_tiny()
    optimizers = OptimizerSet(model, optimizer, 0.1)
    train_a_little(model, optimizers, 1)
    return optimizers.tensors()


def drop_one(state: dict[str, Tensor]) -> None:
    del state["embedding.weight/exp_avg"]


def add_one(state: dict[str, Tensor]) -> None:
    state["blocks.9.mlp.up_proj.weight/exp_avg"] = torch.zeros(2)


def reshape_one(state: dict[str, Tensor]) -> None:
    state["embedding.weight/exp_avg"] = torch.zeros(17, 5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(drop_one, "embedding.weight"), (add_one, "blocks.9"), (reshape_one, "another shape")],
)
def test_optimizer_state_of_other_parameters_raises(
    build_tiny: Build, spoil: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    state = saved_state(build_tiny)
    spoil(state)
    with pytest.raises(ArtifactError, match=said):
        OptimizerSet(build_tiny(), "adamw", 0.1).load_tensors(state)


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_optimizer_state_of_other_optimizer_raises(build_tiny: Build, saved: str, wanted: str) -> None:
    with pytest.raises(ArtifactError, match="another optimiser"):
        OptimizerSet(build_tiny(), wanted, 0.1).load_tensors(saved_state(build_tiny, saved))


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)])
def test_muon_matches_torch_with_bfloat16_hardware(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: True)
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = (optim.Muon([ours], **settings), torch.optim.Muon([theirs], **settings))
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)])
def test_orthogonalize_maps_singular_values_by_the_quintic(shape: tuple[int, int]) -> None:
    """The singular vectors stay; of each value the polynomial is taken, five times, here on the values themselves."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = left @ torch.diag(values) @ right
    torch.testing.assert_close(optim.orthogonalize(matrix, torch.float32).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(optim.orthogonalize(matrix, torch.bfloat16).double(), expected, atol=0.06, rtol=0)


def test_muon_uses_float32_without_bfloat16_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: False)
    monkeypatch.setattr(optim, "orthogonalize", lambda matrix, dtype: used.append(dtype) or matrix.to(dtype))
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optim.Muon([parameter]).step()
    assert used == [torch.float32]
