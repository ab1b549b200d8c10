"""The import path of older documents for the configuration sections."""

from __future__ import annotations

from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.train import TrainConfig

__all__ = ["DataConfig", "ModelConfig", "TrainConfig"]
