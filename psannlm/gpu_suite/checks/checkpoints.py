"""GPU-08: checkpoints moved between GPU and CPU, detection of damage, and exact resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psannlm.config.run import RunConfig, config_from_mapping
from psannlm.data.loader import Position
from psannlm.data.synthetic.stories import write_books
from psannlm.errors import ArtifactError
from psannlm.gpu_suite.context import CheckContext, Shape, Trainer
from psannlm.gpu_suite.measures import none_of
from psannlm.models.artifact import load_model
from psannlm.reports.schemas.gpu import CheckResult, Measure
from psannlm.training.checkpoint import TrainerState, read_optimizer, read_state, save_checkpoint, step_folder
from psannlm.training.optim import OptimizerSet
from psannlm.training.run import train

_FLIPS_PER_FILE = 8
_CORPUS_BYTES = 60_000
_EXACT = "a copy is a copy, on any device"


def check_checkpoints(context: CheckContext) -> CheckResult:
    """GPU-08: save on the device, load on the CPU and back, bit for bit; damage; exact resume."""
    context.say("GPU-08: saving and loading")
    trainer = Trainer.build(context, context.sizes.training.config("waveresnet"), torch.float32)
    trainer.curve(context.sizes.training, 3)
    folder = _save(context.folder / "saved", trainer)
    measures = [*round_trip_measures(trainer, folder, context.device), damage_measure(folder)]
    context.say("GPU-08: an uninterrupted run, and a resumed one")
    resume, notes = _resume_measures(context)
    return CheckResult("GPU-08", "checkpoints", (*measures, *resume), notes=tuple(notes))


def _save(run: Path, trainer: Trainer) -> Path:
    state = TrainerState(
        step=3,
        position=Position(),
        tokens=0,
        config={},
        corpus_sha256="",
        tokenizer_fingerprint="",
        best=None,
        metrics={},
        scaler=trainer.scaler.state_dict(),
    )
    return save_checkpoint(run, trainer.model, None, trainer.optimizers.tensors(), state)


def round_trip_measures(trainer: Trainer, folder: Path, device: torch.device) -> list[Measure]:
    """Return the number of tensors that differ on the CPU, back on the device, and in the optimizer state."""
    read_state(folder)
    here = trainer.model.state_dict()
    loaded = load_model(folder).model
    on_cpu = differing(loaded.state_dict(), here)
    back = differing(loaded.to(device).state_dict(), here)
    optimizers = OptimizerSet(loaded, "adamw", 0.1)
    optimizers.load_tensors(read_optimizer(folder))
    state = differing(optimizers.tensors(), trainer.optimizers.tensors())
    return [
        none_of("weights that differ on the CPU", on_cpu, "tensors", _EXACT, detail=_named(on_cpu)),
        none_of("weights that differ back on the device", back, "tensors", _EXACT, detail=_named(back)),
        none_of("optimizer state that differs", state, "tensors", _EXACT, detail=_named(state)),
    ]


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not bitwise equal, or that only one of the two has."""
    names = sorted(a.keys() | b.keys())
    return [name for name in names if name not in a or name not in b or not _is_same(a[name], b[name])]


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Compared as bytes: a NaN equals itself, and zero differs from minus zero.
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def damage_measure(folder: Path) -> Measure:
    """Flip bits of every file of a checkpoint, one at a time, and return the number of undetected flips."""
    generator = torch.Generator().manual_seed(11)
    unnoticed = []
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        content = path.read_bytes()
        for place in torch.randint(len(content), (_FLIPS_PER_FILE,), generator=generator).tolist():
            bit = int(torch.randint(8, (), generator=generator))
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                read_state(folder)
            except ArtifactError:
                continue
            finally:
                path.write_bytes(content)
            unnoticed.append(f"{path.name}, byte {place}")
    found = f"of {len(files) * _FLIPS_PER_FILE}{': ' if unnoticed else ''}{_named(unnoticed)}"
    reason = "every byte is under a SHA-256"
    return none_of("flipped bits that reading did not notice", unnoticed, "flips", reason, detail=found)


def _corpus(folder: Path, n_bytes: int) -> Path:
    """Return the path of a synthetic corpus of ``n_bytes``, written if it does not exist yet."""
    path = folder / f"books_{n_bytes}.txt"
    if not path.exists():
        path.write_text("".join(write_books(1337, n_bytes)), encoding="utf-8")
    return path


def run_config(
    context: CheckContext,
    name: str,
    *,
    shape: Shape | None = None,
    corpus_bytes: int = _CORPUS_BYTES,
    **train_settings: Any,
) -> RunConfig:
    """Return the configuration of a run of ``sizes.n_steps`` steps under ``folder / name``.

    The default is ``sizes.training`` in float32; ``shape`` and the settings override it.
    """
    shape = shape or context.sizes.training
    corpus = _corpus(context.folder, corpus_bytes)
    sizes = {"d_model": shape.d_model, "n_layers": shape.n_layers, "n_heads": shape.n_heads}
    settings = {
        "max_steps": context.sizes.n_steps,
        "epochs": 1000,
        "batch_tokens": shape.n_tokens,
        "lr": 1e-3,
        "amp": "fp32",
        "device": context.device.type,
        "log_interval_steps": 1,
        "keep_checkpoints": 100,
        "checkpoint_dir": str(context.folder / name),
    }
    return config_from_mapping(
        {
            "model": {"base": "waveresnet", "vocab_size": shape.vocab_size, **sizes},
            "data": {
                "sources": [{"path": str(corpus), "per_line": True}],
                "tokenizer": "simple",
                "vocab_size": 300,
                "max_length": shape.seq_len,
            },
            "train": {**settings, **train_settings},
        }
    )


def _resume_measures(context: CheckContext) -> tuple[list[Measure], list[str]]:
    n_steps = context.sizes.n_steps
    half = n_steps // 2
    train(run_config(context, "uninterrupted", save_interval_steps=half), resume="never")
    again = None
    if context.is_gpu:
        train(run_config(context, "repeated"), resume="never")
        again = _weights(context.folder / "repeated", n_steps)
    middle = step_folder(context.folder / "uninterrupted", half)
    train(run_config(context, "resumed"), resume=str(middle))
    return resume_measures(
        _weights(context.folder / "uninterrupted", n_steps), _weights(context.folder / "resumed", n_steps), again
    )


def _weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_model(step_folder(run, step)).model.state_dict()


def resume_measures(
    straight: Mapping[str, Tensor], resumed: Mapping[str, Tensor], again: Mapping[str, Tensor] | None
) -> tuple[list[Measure], list[str]]:
    """Return the number of tensors that differ between an uninterrupted and a resumed run.

    ``again`` is a second uninterrupted run, for devices that may not be deterministic. If it equals the first, the
    resume must be exact; otherwise the resumed run may differ by up to three times the distance of those two.
    """
    name = "weights that a resume changes, and the device by itself does not"
    changed = differing(straight, resumed)
    own = [] if again is None else differing(straight, again)
    if not own:
        reason = "the device is deterministic, so a resume is exact"
        return [none_of(name, changed, "tensors", reason, detail=_named(changed))], []
    assert again is not None
    by_itself = _distance(straight, again)
    note = f"resume is not exact here: two uninterrupted runs differ by {by_itself:.2g} of the weights' norm"
    reason = f"two uninterrupted runs differ by {by_itself:.2g} on this device; three times that is allowed"
    distance = _distance(straight, resumed)
    # A comparison with NaN is false: it counts as beyond.
    beyond = [] if distance <= 3 * by_itself else changed
    return [none_of(name, beyond, "tensors", reason, detail=f"distance: {distance:.2g} of the weights' norm")], [note]


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    if a.keys() != b.keys():
        return math.inf
    distance = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((distance / sum(float(a[name].double().square().sum()) for name in a)) ** 0.5)
