"""The ``train`` section: optimiser, schedule, precision, parallelism, and what is kept on disk."""

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
from psannlm.errors import Problem, UnknownKeyError

Amp = Literal["auto", "bf16", "fp16", "fp32"]


# Names of another library's settings, which documents mention; see validation.py.
NO_DEEPSPEED = (
    "psannlm does not use DeepSpeed; drop this key, and to shard weights, gradients and optimizer state over the ranks "
    "set train.fsdp: full (in Python fsdp='full') and start the run with torchrun or psannlm train --nproc N"
)
DEEPSPEED_KEYS = ("deepspeed", "deepspeed_config", "zero_stage")


class TrainConfig(Section):
    """One training run. A step is one optimiser update."""

    epochs: Whole = Field(1, ge=1, description="passes over the training windows")
    max_steps: PositiveWhole | None = Field(None, description="stop after this many steps instead of after the epochs")
    batch_tokens: Whole = Field(65_536, ge=1, description="tokens in one micro-batch per rank")
    grad_accum_steps: Whole = Field(1, ge=1, description="micro-batches per optimiser step")
    lr: Real = Field(2e-4, gt=0, description="peak learning rate")
    min_lr: Real = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="course of the learning rate after warm-up; wsd: constant, then a cooldown at the end"
    )
    warmup_steps: Whole = Field(0, ge=0, description="steps over which the learning rate rises from zero to lr")
    cooldown_share: Real = Field(
        0.2, gt=0, le=1, description="wsd: share of all steps, the last ones, over which the rate falls to min_lr"
    )
    weight_decay: Real = Field(
        0.1, ge=0, description="AdamW's decay of matrices (never norms, biases, sine parameters)"
    )
    label_smoothing: Real = Field(
        0.0, ge=0, lt=1, description="probability mass spread over the vocabulary in training"
    )
    grad_clip: Real | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="at a loss or gradient that is not finite: stop, or skip the step (the third in a row stops; "
        "a GPU is waited for at each step then)",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for hidden matrices, AdamW for the rest"
    )
    amp: Amp = Field("auto", description="auto: bf16 where the device computes in it, else fp32; null means fp32")
    compile: Flag | Literal["auto"] = Field(
        "auto", description="torch.compile the model: slow to start, faster per step; auto: where the run repays it"
    )
    ddp: Literal["auto", "on", "off"] = Field(
        "auto", description="data parallel under torchrun; auto: when there is one"
    )
    fsdp: Literal["off", "full"] = Field(
        "off", description="full: shard weights, gradients and optimiser state over the ranks instead of repeating them"
    )
    grad_sync: Literal["step", "micro_batch"] = Field(
        "step",
        description="when ranks exchange gradients; micro_batch: more is sent, and fsdp keeps no whole gradients",
    )
    grad_checkpoint: Flag = Field(False, description="recompute activations in the backward pass, to save memory")
    checkpoint_dir: FileName = Field(
        "runs/default", description="the run folder: checkpoints, metrics.jsonl, loss_curve.png"
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
        2, ge=1, description="newest checkpoints kept on disk; the best one is kept besides"
    )
    sample_prompts: tuple[Prompt, ...] = Field(
        ("The ",), description="texts that the model continues at each validation, for people to read; []: none"
    )
    sample_tokens: Whole = Field(40, ge=1, description="tokens of such a continuation, at most")
    tensorboard: Flag = Field(
        False, description="write TensorBoard's event files too, to tensorboard/ in the run folder"
    )
    seed: Whole = Field(
        1337,
        ge=0,
        description="decides the initial weights, the order of training windows and dropout; what is held out is "
        "data.seed's",
    )
    device: Text = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="before")
    @classmethod
    def _no_deepspeed(cls, value: object, info: ValidationInfo) -> object:
        # The YAML reader reports such a key itself, together with every other problem.
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
        # YAML 1.1 readers turn on and off into booleans before anyone can ask what was meant.
        word = value if isinstance(value, bool) else word_to_bool(value)
        if word is None or (word and info.field_name == "fsdp"):
            return value
        return "on" if word else "off"

    @field_validator("log_interval_steps", "eval_interval_steps", "save_interval_steps", mode="before")
    @classmethod
    def _zero_is_never(cls, value: object) -> object:
        return None if value == 0 and not isinstance(value, bool) else value

    def cooldown_steps(self, total_steps: int) -> int:
        """Return how many of ``total_steps`` the cooldown takes under ``wsd``; otherwise there is none."""
        return max(1, round(self.cooldown_share * total_steps)) if self.schedule == "wsd" else 0

    def checks(self) -> list[Check]:
        found: list[Check] = []
        if self.min_lr > self.lr:
            found.append(Check(("min_lr", "lr"), f"min_lr {self.min_lr:g} exceeds lr {self.lr:g}"))
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            message = (
                f"{self.warmup_steps} warm-up steps do not fit into max_steps {self.max_steps}; lower "
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
        if self.fsdp == "full" and self.ddp == "off":
            found.append(
                Check(("fsdp", "ddp"), "full shards over several ranks, and ddp: off allows only one; drop it")
            )
        if self.fsdp == "full" and self.compile is True:
            found.append(
                Check(("fsdp", "compile"), "full does not go together with compile: true; set one of them off")
            )
        return found
