"""Configuration keys that do not change what a run learns, for resume, run comparison and studies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NonSemanticKey:
    """Why a key does not change the model, and where else than on resume its value is ignored.

    Attributes:
        reason: what the key changes instead.
        is_bookkeeping: it only sets where and how often a run is recorded; reports do not list it as a difference.
        may_differ_in_study: a study counts an existing run with another value as the run that its plan asks for.
    """

    reason: str
    is_bookkeeping: bool = False
    may_differ_in_study: bool = False


# A run may resume with other values of these keys. Every other key of the configuration must stay the same.
NON_SEMANTIC_KEYS: dict[str, NonSemanticKey] = {
    "train.checkpoint_dir": NonSemanticKey("place of the run folder", True, True),
    "data.cache_dir": NonSemanticKey("place of copies of a prepared folder at a URL", True, True),
    "train.log_interval_steps": NonSemanticKey("number of logged steps", True, True),
    "train.save_interval_steps": NonSemanticKey("number of checkpoints", True, True),
    "train.keep_checkpoints": NonSemanticKey("number of checkpoints kept on disk", True, True),
    "train.keep_steps": NonSemanticKey("checkpoints kept on disk for other runs", True, True),
    "train.device": NonSemanticKey("hardware; results differ by rounding", may_differ_in_study=True),
    "train.ddp": NonSemanticKey("number of processes"),
    "train.fsdp": NonSemanticKey("memory per rank; results differ by rounding"),
    "train.shard_size": NonSemanticKey("memory per rank; results differ by rounding"),
    "train.grad_sync": NonSemanticKey("communication and memory per rank"),
    "train.compile": NonSemanticKey("speed; results differ by rounding"),
    "train.grad_checkpoint": NonSemanticKey("memory and speed"),
    "train.on_nonfinite": NonSemanticKey("whether a run with a non-finite step ends there"),
    "train.sample_prompts": NonSemanticKey("sample texts in the log", may_differ_in_study=True),
    "train.sample_tokens": NonSemanticKey("length of the sample texts"),
    "train.eval_tasks": NonSemanticKey("task scores in the log"),
    "train.tensorboard": NonSemanticKey("additional log files"),
}
BOOKKEEPING_KEYS = frozenset(key for key, value in NON_SEMANTIC_KEYS.items() if value.is_bookkeeping)
KEYS_FREE_IN_STUDY = frozenset(key for key, value in NON_SEMANTIC_KEYS.items() if value.may_differ_in_study)
