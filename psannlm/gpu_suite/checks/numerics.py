"""GPU-01 and GPU-02: gradients against float64 on the CPU, and training losses of low precision against float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.benchmarks.harness.random_weights import randomize_parameters
from psannlm.config.model import PositionKind
from psannlm.gpu_suite.context import BASE_NAMES, CheckContext, Trainer, draw_tokens, dtype_name
from psannlm.gpu_suite.measures import at_least, at_most, largest, largest_distance, none_of
from psannlm.models.activations import SineActivation
from psannlm.models.registry import build_model
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.gpu import CheckResult, Measure

POSITIONS: tuple[PositionKind, ...] = ("rope", "alibi", "sinusoidal")
# Gradients below this fraction of the model's largest are compared with that: their own norm is rounding.
_SMALL_GRADIENT = 1e-3
GRADIENT_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
CURVE_LIMITS = {torch.bfloat16: (0.02, 0.05), torch.float16: (0.005, 0.02)}
_MIN_DROP_NATS = 0.1


@dataclass(frozen=True)
class Gradients:
    """The mean loss in nats, and the gradient of each parameter on the CPU in float64."""

    loss: float
    by_name: dict[str, Tensor]

    def is_finite(self) -> bool:
        """Whether loss and all gradients are finite."""
        return math.isfinite(self.loss) and all(bool(g.isfinite().all()) for g in self.by_name.values())

    def worst_error(self, reference: Gradients) -> float:
        """Return the largest relative distance of one parameter's gradient from that of ``reference``.

        The distance is infinite if a value is non-finite or only one of the two has a gradient for a parameter.
        """
        if not self._is_comparable(reference):
            return math.inf
        longest = largest(float(g.norm()) for g in reference.by_name.values())
        return largest(
            float((self.by_name[name] - g).norm()) / max(float(g.norm()), _SMALL_GRADIENT * longest)
            for name, g in reference.by_name.items()
        )

    def whole_error(self, reference: Gradients) -> float:
        """Return the relative distance of the gradient of all parameters together; infinite as above."""
        if not self._is_comparable(reference):
            return math.inf
        distance = sum(float((self.by_name[name] - g).square().sum()) for name, g in reference.by_name.items())
        return math.sqrt(distance / sum(float(g.square().sum()) for g in reference.by_name.values()))

    def _is_comparable(self, reference: Gradients) -> bool:
        return self.by_name.keys() == reference.by_name.keys() and self.is_finite() and reference.is_finite()


class _ExactSine(nn.Module):
    """A exp(-d g(z)) sin(f z) in plain torch operations in the dtype of z, differentiated by autograd."""

    def __init__(self, activation: SineActivation) -> None:
        super().__init__()
        self.mode, self.bounds = activation.mode, activation.bounds
        for name in ("amplitude", "frequency", "decay"):
            # The same parameters under the same names, so that gradients are found under the model's names.
            setattr(self, f"raw_{name}", getattr(activation, f"raw_{name}"))

    def forward(self, z: Tensor) -> Tensor:
        values = []
        for name in ("amplitude", "frequency", "decay"):
            value, bounds = F.softplus(getattr(self, f"raw_{name}")), self.bounds[name]
            values.append(value if bounds is None else value.clamp(*bounds))
        amplitude, frequency, decay = values
        envelope = {"abs": z.abs(), "relu": z.relu(), "none": torch.zeros_like(z)}[self.mode]
        return amplitude * torch.exp(-decay * envelope) * torch.sin(frequency * z)


def exact_copy(model: Transformer) -> Transformer:
    """Return a copy of the model on the CPU in float64, without our own kernels.

    Rotary and linear-bias tables stay float32, as they are defined.
    """
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SineActivation):
                setattr(module, name, _ExactSine(child))
    return exact


def exact_gradients(model: Transformer, tokens: Tensor) -> Gradients:
    """Return loss and gradients of ``tokens`` (B, T + 1) from :func:`exact_copy`, full logits and torch's loss."""
    exact = exact_copy(model)
    logits = exact.logits(exact.hidden_states(tokens[:, :-1])).flatten(0, 1)
    return _gradients(exact, F.cross_entropy(logits, tokens[:, 1:].flatten()))


def device_gradients(model: Transformer, tokens: Tensor, context: CheckContext, dtype: torch.dtype) -> Gradients:
    """Return loss and gradients of ``tokens`` as training computes them on the device."""
    here = tokens.to(context.device)
    with context.precision(dtype).autocast():
        loss = model(here[:, :-1], here[:, 1:].contiguous()) / tokens[:, 1:].numel()
    return _gradients(model, loss)


def _gradients(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Gradients(float(loss.detach()), found)


def check_gradients(context: CheckContext) -> CheckResult:
    """GPU-01: forward and backward pass of each base with each positional encoding."""
    shape, measures, broken = context.sizes.gradients, [], []
    for base in BASE_NAMES:
        for positions in POSITIONS:
            model = build_model(shape.config(base, positional_encoding=positions), seed=1)
            randomize_parameters(model, seed=2)
            model.to(context.device)
            tokens = draw_tokens(shape, seed=3)
            reference = exact_gradients(model, tokens)
            context.say(f"GPU-01: {base}, {positions}")
            for dtype in GRADIENT_LIMITS:
                found = device_gradients(model, tokens, context, dtype)
                if not found.is_finite():
                    broken.append(f"{base}, {positions}, {dtype_name(dtype)}")
                measures += gradient_measures(f"{base}, {positions}", dtype, found, reference)
    finite = none_of("non-finite losses or gradients", broken, "cases", "one ends a training run")
    return CheckResult(
        "GPU-01",
        "forward and backward",
        (finite, *measures),
        notes=(
            "distance from float64 on the CPU, relative to the norm of the gradient: in float32 of the worst "
            "parameter, in bfloat16 of all parameters together",
            *(f"non-finite: {case}" for case in broken),
        ),
    )


def gradient_measures(case: str, dtype: torch.dtype, found: Gradients, reference: Gradients) -> list[Measure]:
    """Return the errors of loss and gradients of one case."""
    limit = GRADIENT_LIMITS[dtype]
    name = dtype_name(dtype)
    if dtype == torch.float32:
        error = found.worst_error(reference)
        reason = "float32 sums stay below 1e-5; TF32, a wrong kernel or a missing term exceed 1e-4"
    else:
        error = found.whole_error(reference)
        reason = "products rounded to 8 bits change a gradient by a few percent; a wrong kernel by much of its norm"
    loss_error = abs(found.loss - reference.loss) / abs(reference.loss)
    loss_reason = "a mean over tokens, where rounding errors cancel"
    return [
        at_most(f"{case}, {name}: gradient", error, limit, "of its length", reason),
        at_most(f"{case}, {name}: loss", loss_error, limit / 10, "of the loss", loss_reason),
    ]


def check_precision(context: CheckContext) -> CheckResult:
    """GPU-02: training losses in bfloat16 and float16 against float32, at each step of each base."""
    shape, n_steps = context.sizes.training, context.sizes.n_steps
    measures: list[Measure] = []
    series: dict[str, list[float]] = {}
    for base in BASE_NAMES:
        curves = {}
        for dtype in (torch.float32, *CURVE_LIMITS):
            context.say(f"GPU-02: {base}, {dtype_name(dtype)}, {n_steps} steps")
            trainer = Trainer.build(context, shape.config(base), dtype)
            curves[dtype] = trainer.curve(shape, n_steps)
            if trainer.precision.needs_scaler:
                measures.append(scale_measure(base, trainer.n_skipped))
            series[f"{base}, {dtype_name(dtype)}"] = curves[dtype]
        measures += curve_measures(base, curves)
    return CheckResult(
        "GPU-02",
        "precision parity",
        tuple(measures),
        notes=(f"{n_steps} steps of {shape.n_tokens:,} tokens from the same weights; distances in nats per token",),
        series=series,
    )


def scale_measure(base: str, n_skipped: int) -> Measure:
    """Return how often float16 gradients overflowed until the scaler had found its scale."""
    reason = "the scale starts at 65,536 and is halved at each overflow: more than eight would leave it below 256"
    return at_most(f"{base}, float16: steps repeated after an overflow", n_skipped, 8, "steps", reason)


def curve_measures(base: str, curves: Mapping[torch.dtype, list[float]]) -> list[Measure]:
    """Return the distances between the loss curves, and the drop of the float32 loss."""
    exact = curves[torch.float32]
    drop = largest(exact[0] - loss for loss in exact)
    reason = "constant curves are equal in any precision"
    measures = [at_least(f"{base}: fall of the float32 loss", drop, _MIN_DROP_NATS, "nats", reason)]
    for dtype, (mean_limit, most_limit) in CURVE_LIMITS.items():
        distances = [abs(a - b) for a, b in zip(curves[dtype], exact, strict=True)]
        name = f"{base}, {dtype_name(dtype)}"
        bits = 8 if dtype == torch.bfloat16 else 11
        reason = f"{bits} bits of mantissa; several times the effect of rounding alone"
        measures += [
            at_most(f"{name}: mean distance", sum(distances) / len(distances), mean_limit, "nats", reason),
            at_most(f"{name}: largest distance", largest_distance(curves[dtype], exact), most_limit, "nats", reason),
        ]
    return measures
