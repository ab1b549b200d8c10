"""Optimisers and parameter groups: AdamW, Muon for hidden matrices, and weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import unwrap
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psannlm.config.train import TIED_HEAD, LrScaleConfig, TrainConfig
from psannlm.errors import ArtifactError, ConfigError, Problem
from psannlm.models.activations import is_activation_parameter
from psannlm.runtime.device import computes_in_bf16
from psannlm.runtime.distributed import as_sharded, full_tensor, shard_like

ADAMW_BETAS = (0.9, 0.95)
ADAMW_EPS = 1e-8
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_NORM_FLOOR = 1e-7


@dataclass(frozen=True)
class ParameterGroups:
    """Parameters by name: hidden matrices, embedding, output matrix, and all others, which are never decayed."""

    hidden: dict[str, nn.Parameter]
    embedding: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    undecayed: dict[str, nn.Parameter]


def group_parameters(model: nn.Module) -> ParameterGroups:
    """Sort the learnable parameters of a ``Transformer``.

    Weight decay pulls towards zero, which is neutral for a matrix, but not for the raw parameters of a sine (softplus
    of zero is 0.69, far from a decay of 0.01), norms, biases, residual scales and the few taps of a short convolution.
    """
    groups = ParameterGroups({}, {}, {}, {})
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in linear and name.startswith("blocks."):
            groups.hidden[name] = parameter
        elif name == "embedding.weight":
            groups.embedding[name] = parameter
        elif name in linear:
            groups.head[name] = parameter
        else:
            groups.undecayed[name] = parameter
    return groups


def build_optimizers(model: nn.Module, settings: TrainConfig) -> OptimizerSet:
    """Return the optimizers of ``model`` that the ``train`` section asks for; errors as in ``OptimizerSet``."""
    return OptimizerSet(model, settings.optimizer, settings.weight_decay, settings.lr_scale, settings.decay_embeddings)


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix with nearly the same singular vectors and singular values near 1.

    Five Newton-Schulz iterations (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), each with G = X Xᵀ:
    X ← a·X + (b·G + c·G²)·X, from X scaled to a Frobenius norm of 1. After them the singular values lie between about
    0.7 and 1.2, in any of the precisions.

    Args:
        matrix: ``[rows, columns]``.
        dtype: of the products and of the result.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype, copy=True)
    is_tall = matrix.size(0) > matrix.size(1)
    if is_tall:
        x = x.T
    x.div_(x.norm().clamp(min=_NORM_FLOOR))
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class _WithoutCompiler:
    """Methods of torch's optimizers without a wrapper that imports torch.compile's modules at the first call.

    The wrapper ends the graph of a compiled function there, and no graph of ours holds an optimizer. The import takes
    as long as that of torch itself.
    """

    add_param_group: Any = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Any = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(_WithoutCompiler, torch.optim.AdamW):
    """torch's AdamW, which does not import torch.compile's modules."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient."""
        return unwrap(torch.optim.AdamW.step)(self, closure)


class Muon(_WithoutCompiler, torch.optim.Muon):
    """torch's Muon with the precision of the device and for sharded matrices; the updates are those of torch.

    torch always orthogonalizes in bfloat16. A CPU without bfloat16 hardware emulates it, which took two thirds of a
    step of a model of 2M parameters; there the products are float32. A sharded momentum stays sharded: one matrix at a
    time is gathered, and every rank computes its full direction.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = full_tensor(parameter.grad.lerp(momentum, group["momentum"]))
                dtype = torch.bfloat16 if computes_in_bf16(parameter.device) else torch.float32
                direction = orthogonalize(update, dtype)
                # Liu et al. 2025: the root mean square of AdamW's usual step.
                rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(direction, parameter), alpha=-rate)


class OptimizerSet:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), alone or beside Muon for the hidden matrices.

    Muon (Jordan et al. 2024) moves along the orthogonalised momentum; its step is scaled to AdamW's usual size (Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate and one weight decay serve both.

    Args:
        lr_scale: multiples of the learning rate by group; None: all 1.
        decay_embeddings: decay the embedding, and with it an output matrix that is tied to it.

    Raises:
        ConfigError: ``lr_scale`` has a rate for the output matrix of a model whose embeddings are tied.
    """

    def __init__(
        self,
        model: nn.Module,
        name: Literal["adamw", "muon"],
        weight_decay: float,
        lr_scale: LrScaleConfig | None = None,
        decay_embeddings: bool = True,
    ) -> None:
        groups = group_parameters(model)
        scale = lr_scale or LrScaleConfig()
        is_tied = getattr(model, "head", None) is None
        if scale.head is not None and is_tied:
            raise ConfigError(Problem("train.lr_scale.head", TIED_HEAD))
        self._names = {id(p): n for part in vars(groups).values() for n, p in part.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        if name == "muon":
            self.optimizers.append(
                Muon(
                    list(groups.hidden.values()),
                    weight_decay=weight_decay,
                    momentum=MUON_MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        hidden = {} if name == "muon" else groups.hidden
        of_embedding = weight_decay if decay_embeddings else 0.0
        # (multiple of the learning rate, weight decay) -> parameters
        parts: dict[tuple[float, float], list[nn.Parameter]] = {}
        of_activations = scale.scalars if scale.activations is None else scale.activations
        self._scales = {
            "embedding": scale.embedding,
            "head": scale.embedding if is_tied else scale.head or 1.0,
            "scalars": scale.scalars,
            "activations": of_activations,
        }
        for named, times, decay in (
            (groups.embedding, scale.embedding, of_embedding),
            (groups.head, scale.head or 1.0, weight_decay),
            (hidden, 1.0, weight_decay),
            (groups.undecayed, scale.scalars, 0.0),
        ):
            for key, parameter in named.items():
                own = of_activations if is_activation_parameter(key) else times
                parts.setdefault((own, decay), []).append(parameter)
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        # The fp16 scaler cannot unscale sharded and replicated gradients together: one optimiser for each.
        for is_sharded in sorted({as_sharded(p) is not None for params in parts.values() for p in params}):
            split = [
                {
                    "params": [p for p in params if (as_sharded(p) is not None) == is_sharded],
                    "weight_decay": decay,
                    "lr_scale": times,
                }
                for (times, decay), params in parts.items()
            ]
            self.optimizers.append(AdamW(split, betas=ADAMW_BETAS, eps=ADAMW_EPS, fused=fused))

    def set_lr(self, lr: float) -> None:
        """Set the schedule's learning rate for the next steps; each group gets its multiple of it."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

    def scaled_rates(self, lr: float) -> dict[str, float]:
        """Return the learning rates that differ from the schedule's ``lr``, by group, for the metrics of a step."""
        return {f"lr/{name}": lr * times for name, times in self._scales.items() if times != 1.0}

    def zero_grad(self) -> None:
        """Release all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint as tensors named ``parameter/entry``, sharded as the model is."""
        return {
            f"{self._names[id(parameter)]}/{entry}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for entry, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of :meth:`tensors`.

        An empty mapping is the state before the first step (under fp16, overflows may have skipped every step so far).

        Raises:
            ArtifactError: the tensors belong to other parameters or to another optimiser.
        """
        if not tensors:
            return
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            by_parameter.setdefault(name, {})[entry] = value
        for optimizer in self.optimizers:
            wanted = (
                {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
            )
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self._names[id(parameter)]
                    state = by_parameter.pop(name, {})
                    if set(state) != wanted:
                        message = f"optimiser state of {name} holds {sorted(state)}, not {sorted(wanted)}"
                        raise ArtifactError(f"{message}: it was made with another optimiser")
                    if any(value.shape != parameter.shape for key, value in state.items() if key != "step"):
                        raise ArtifactError(f"optimiser state of {name} has another shape than the parameter")
                    optimizer.state[parameter] = {k: _placed(k, v, parameter, group) for k, v in state.items()}
        if by_parameter:
            raise ArtifactError(
                f"optimiser state of parameters that the model lacks: {', '.join(sorted(by_parameter)[:3])}"
            )


def _placed(entry: str, value: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Move a state tensor to its device: AdamW counts steps on the CPU unless it is fused."""
    if entry == "step":
        return value.to(parameter.device if group.get("fused") else value.device, copy=True)
    return shard_like(value.to(parameter.device), parameter).clone()
