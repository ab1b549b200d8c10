"""Our own transformer at the size of another model, which reference libraries read."""

from __future__ import annotations

from psannlm.benchmarks.harness.random_weights import randomize_parameters
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.config.model import ModelConfig
from psannlm.export.gguf import Q8_0_BLOCK
from psannlm.models.accounting import count_parameters, match_mlp_width
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer


def exportable_config(task: ReferenceTask) -> ModelConfig:
    """Return a plain SwiGLU transformer of our model's sizes, as wide as brings it nearest to its parameter count."""
    ours = task.config
    conv = ours.short_conv.model_copy(update={"enabled": None})
    changes: dict[str, object] = {"base": "transformer", "mlp": "swiglu", "short_conv": conv, "residual_scale": None}
    changes |= {"positional_encoding": "rope", "max_seq_len": task.seq_len, "d_mlp": None}
    plain = resolve(ours.model_copy(update=changes))

    def count(width: int) -> int:
        return sum(count_parameters(plain.model_copy(update={"d_mlp": width})).values())

    width = match_mlp_width(count, task.parameters)
    return plain.model_copy(update={"d_mlp": max(1, round(width / Q8_0_BLOCK)) * Q8_0_BLOCK})


def build_exportable_transformer(task: ReferenceTask) -> Transformer:
    """Return that transformer with random float32 weights, none of them zero."""
    model = build_model(exportable_config(task), seed=0).eval()
    randomize_parameters(model, 0)
    return model
