"""The ``train`` section: optimizer, schedule, precision, parallelism, logging and checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from psannlm.config.base import (
    Check,
    FileName,
    Flag,
    PositiveWhole,
    Prompt,
    Real,
    Section,
    Text,
    Whole,
    word_to_bool,
)
from psannlm.config.constants import TaskPack
from psannlm.errors import Problem, UnknownKeyError
from psannlm.io.urls import is_remote

Amp = Literal["auto", "bf16", "fp16", "fp32"]


# Settings of DeepSpeed, which users may bring along; reported in validation.py.
NO_DEEPSPEED = (
    "psannlm does not use DeepSpeed; drop this key, and to shard weights, gradients and optimizer state over the ranks "
    "set train.fsdp: full (in Python fsdp='full') and start the run with torchrun or psannlm train --nproc N"
)
DEEPSPEED_KEYS = ("deepspeed", "deepspeed_config", "zero_stage")


TIED_HEAD = (
    "the output matrix is tied to the embedding (model.tie_embeddings), and one matrix has one learning rate; set "
    "train.lr_scale.embedding, and drop it"
)


class LrScaleConfig(Section):
    """Learning rates of groups of parameters, as multiples of the schedule's; their weight decay scales alike."""

    embedding: Real = Field(1.0, gt=0, description="multiplier of the learning rate of the embedding matrix")
    head: Real | None = Field(
        None,
        gt=0,
        description="multiplier of the learning rate of the output matrix; null: 1, or that of the embedding where the "
        "two are tied, which have one rate",
    )
    scalars: Real = Field(
        1.0,
        gt=0,
        description="multiplier of the learning rate of all parameters that are not matrices: norms, biases, taps of "
        "short convolutions, residual scales, and parameters of activations",
    )
    activations: Real | None = Field(
        None,
        gt=0,
        description="multiplier of the learning rate of the parameters of activations (those of the sine, and gains); "
        "null: scalars",
    )


class TrainConfig(Section):
    """Settings of a training run. A step is one optimizer update."""

    init_from: FileName | None = Field(
        None,
        description="model file, checkpoint folder or run folder (its best checkpoint) whose weights the run starts "
        "from; step, optimizer, schedule and data order start fresh, and model may be left out",
    )
    epochs: Whole = Field(1, ge=1, description="number of passes over the training windows")
    max_steps: PositiveWhole | None = Field(None, description="number of optimizer steps; null: given by epochs")
    batch_tokens: Whole = Field(65_536, ge=1, description="tokens per micro-batch and rank")
    grad_accum_steps: Whole = Field(1, ge=1, description="micro-batches per optimizer step (gradient accumulation)")
    global_batch_tokens: PositiveWhole | None = Field(
        None,
        description="tokens per optimizer step over all ranks, from which grad_accum_steps is derived, so that another "
        "number of GPUs makes the same steps; null: batch_tokens x grad_accum_steps x ranks",
    )
    lr: Real = Field(2e-4, gt=0, description="peak learning rate")
    min_lr: Real = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="learning rate schedule after warm-up; wsd: constant, then a cooldown at the end"
    )
    warmup_steps: Whole = Field(0, ge=0, description="steps of learning rate warm-up from zero to lr")
    cooldown_share: Real = Field(
        0.2, gt=0, le=1, description="wsd: fraction of all steps at the end over which the rate falls to min_lr"
    )
    weight_decay: Real = Field(
        0.1, ge=0, description="weight decay of matrices (never of norms, biases and parameters of activations)"
    )
    decay_embeddings: Flag = Field(
        True, description="apply weight decay to the embedding matrix, and to the output matrix where it is tied to it"
    )
    lr_scale: LrScaleConfig = Field(
        default_factory=LrScaleConfig, description="learning rates of groups of parameters, as multiples of lr"
    )
    ema: Real | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average (EMA) of the weights, such as 0.999 for about the last "
        "1,000 steps; validations measure it and checkpoints keep it beside the weights; null: none",
    )
    label_smoothing: Real = Field(
        0.0, ge=0, lt=1, description="label smoothing: probability mass spread over the vocabulary"
    )
    grad_clip: Real | None = Field(1.0, gt=0, description="maximum global gradient norm; null: no clipping")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="action at a non-finite loss or gradient: stop, or skip the step (the third in a row stops; "
        "skip synchronizes host and GPU at every step)",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer; muon: Muon for hidden matrices, AdamW for all other parameters"
    )
    amp: Amp = Field(
        "auto", description="mixed precision; auto: bf16 if the hardware supports it, else fp32; null: fp32"
    )
    compile: Flag | Literal["auto"] = Field(
        "auto",
        description="use torch.compile: a slow start, then faster steps; auto: if the run is long enough to pay off",
    )
    ddp: Literal["auto", "on", "off"] = Field(
        "auto", description="data parallelism under torchrun; auto: on if there are several ranks"
    )
    fsdp: Literal["off", "full", "hybrid"] = Field(
        "off",
        description="full: shard weights, gradients and optimizer state over all ranks instead of replicating them; "
        "hybrid: shard them over shard_size ranks, and replicate the shards over the groups of such ranks",
    )
    shard_size: PositiveWhole | None = Field(
        None,
        description="fsdp hybrid: number of ranks that share one copy of the model, a divisor of all ranks; null: the "
        "ranks of a machine",
    )
    grad_sync: Literal["step", "micro_batch"] = Field(
        "step",
        description="when ranks reduce gradients; micro_batch: more communication, but fsdp keeps gradients sharded",
    )
    grad_checkpoint: Flag = Field(
        False, description="activation checkpointing: recompute activations in the backward pass to save memory"
    )
    checkpoint_dir: FileName = Field(
        "runs/default", description="run folder for checkpoints, metrics.jsonl and loss_curve.png"
    )
    log_interval_steps: PositiveWhole | None = Field(
        10, description="steps between lines of metrics.jsonl; 0 or null: only the first and the last step"
    )
    eval_interval_steps: PositiveWhole | None = Field(
        None, description="steps between validations; 0 or null: only at the end"
    )
    save_interval_steps: PositiveWhole | None = Field(
        None, description="steps between checkpoints; 0 or null: only at the end"
    )
    keep_checkpoints: Whole = Field(
        2, ge=1, description="number of latest checkpoints kept on disk, in addition to the best"
    )
    keep_steps: tuple[PositiveWhole, ...] = Field(
        (), description="steps after which a checkpoint is saved and kept, whatever keep_checkpoints is"
    )
    sample_prompts: tuple[Prompt, ...] = Field(
        ("The ",), description="prompts of the samples generated at each validation; []: no samples"
    )
    sample_tokens: Whole = Field(40, ge=1, description="maximum number of tokens of a sample")
    eval_tasks: tuple[TaskPack, ...] = Field(
        (), description="task packs that the model is scored on at each validation, such as [psannlm_agreement]"
    )
    tensorboard: Flag = Field(
        False, description="also write TensorBoard event files, to tensorboard/ in the run folder"
    )
    seed: Whole = Field(
        1337,
        ge=0,
        description="seed of the initial weights, the order of training windows and dropout; data.seed decides what "
        "is held out",
    )
    device: Text = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_deepspeed(cls, value: object, info: ValidationInfo) -> object:
        # With "collect", such keys are reported together with all other problems.
        named = [key for key in DEEPSPEED_KEYS if isinstance(value, dict) and key in value]
        if named and not (info.context or {}).get("collect"):
            raise UnknownKeyError([Problem(f"train.{key}", NO_DEEPSPEED) for key in named])
        return value

    @field_validator("amp", mode="before")
    @classmethod
    def _null_amp_is_fp32(cls, value: object) -> object:
        return "fp32" if value is None else value

    @field_validator("ddp", "fsdp", mode="before")
    @classmethod
    def _may_be_boolean(cls, value: object, info: ValidationInfo) -> object:
        # YAML 1.1 readers parse on and off as booleans.
        word = value if isinstance(value, bool) else word_to_bool(value)
        if word is None or (word and info.field_name == "fsdp"):
            return value
        return "on" if word else "off"

    @field_validator("log_interval_steps", "eval_interval_steps", "save_interval_steps", mode="before")
    @classmethod
    def _zero_is_never(cls, value: object) -> object:
        return None if value == 0 and not isinstance(value, bool) else value

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients and optimizer state are sharded over ranks."""
        return self.fsdp != "off"

    def cooldown_steps(self, total_steps: int) -> int:
        """Return the number of cooldown steps of ``total_steps``: 0 for all schedules but ``wsd``."""
        return max(1, round(self.cooldown_share * total_steps)) if self.schedule == "wsd" else 0

    def checks(self) -> list[Check]:
        found: list[Check] = []
        if is_remote(self.checkpoint_dir):
            message = (
                f"{self.checkpoint_dir!r} is a URL; a run is written to a folder: name one, and copy it afterwards"
            )
            found.append(Check(("checkpoint_dir",), message))
        if self.min_lr > self.lr:
            found.append(Check(("min_lr", "lr"), f"min_lr {self.min_lr:g} exceeds lr {self.lr:g}"))
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            message = (
                f"{self.warmup_steps} warm-up steps exceed max_steps {self.max_steps}; lower "
                "train.warmup_steps too (--set train.warmup_steps=0 for a first try)"
            )
            found.append(Check(("warmup_steps", "max_steps"), message))
        elif self.max_steps is not None and self.schedule == "wsd":
            cooldown = self.cooldown_steps(self.max_steps)
            if self.warmup_steps + cooldown > self.max_steps:
                message = (
                    f"a cooldown of {cooldown} steps after {self.warmup_steps} of warm-up does not fit into max_steps "
                    f"{self.max_steps}; lower it, or train.warmup_steps"
                )
                found.append(Check(("cooldown_share", "warmup_steps", "max_steps"), message))
        if self.global_batch_tokens is not None and self.grad_accum_steps != 1:
            message = f"{self.grad_accum_steps} is given, and global_batch_tokens derives it; keep one of them"
            found.append(Check(("grad_accum_steps", "global_batch_tokens"), message))
        return found + self._sharding_checks()

    def _sharding_checks(self) -> list[Check]:
        found: list[Check] = []
        if self.is_sharded and self.ddp == "off":
            message = f"{self.fsdp} needs several ranks, and ddp: off allows only one; drop it"
            found.append(Check(("fsdp", "ddp"), message))
        if self.shard_size is not None and self.fsdp != "hybrid":
            message = f"has no effect with fsdp: {self.fsdp}; set train.fsdp: hybrid, or drop it"
            found.append(Check(("shard_size", "fsdp"), message))
        if self.shard_size == 1 and self.fsdp == "hybrid":
            message = "1 rank for each copy of the model shards nothing; set train.fsdp: off, or raise it"
            found.append(Check(("shard_size", "fsdp"), message))
        return found
