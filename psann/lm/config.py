"""Configuration sections under the import path of earlier documents."""

from __future__ import annotations

from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.train import TrainConfig

__all__ = ["DataConfig", "ModelConfig", "TrainConfig"]
