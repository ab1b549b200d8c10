"""Every train key is either semantic or declared not to change a run, as is one of data."""

from __future__ import annotations

from psannlm.config.non_semantic import BOOKKEEPING_KEYS, KEYS_FREE_IN_STUDY, NON_SEMANTIC_KEYS
from psannlm.config.train import TrainConfig

# Keys that change what a run learns. A new key of TrainConfig belongs here or into NON_SEMANTIC_KEYS.
SEMANTIC_KEYS = {
    "epochs",
    "max_steps",
    "batch_tokens",
    "grad_accum_steps",
    "ema",
    "lr",
    "min_lr",
    "schedule",
    "warmup_steps",
    "cooldown_share",
    "weight_decay",
    "decay_embeddings",
    "lr_scale",
    "label_smoothing",
    "grad_clip",
    "optimizer",
    "amp",
    "eval_interval_steps",
    "global_batch_tokens",
    "init_from",
    "seed",
}


def test_train_keys_are_all_classified() -> None:
    non_semantic = {key.removeprefix("train.") for key in NON_SEMANTIC_KEYS if key.startswith("train.")}
    assert {key for key in NON_SEMANTIC_KEYS if not key.startswith("train.")} == {"data.cache_dir"}
    assert not non_semantic & SEMANTIC_KEYS
    assert non_semantic | SEMANTIC_KEYS == set(TrainConfig.model_fields)


def test_non_semantic_subsets_keep_their_members() -> None:
    bookkeeping = {"checkpoint_dir", "log_interval_steps", "save_interval_steps", "keep_checkpoints", "keep_steps"}
    assert {f"train.{key}" for key in bookkeeping} | {"data.cache_dir"} == BOOKKEEPING_KEYS
    assert BOOKKEEPING_KEYS | {"train.device", "train.sample_prompts"} == KEYS_FREE_IN_STUDY
