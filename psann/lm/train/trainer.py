"""The import path of older documents for the trainer, with its callbacks."""

from __future__ import annotations

from psannlm.training.callbacks import Callback, SaveEvent, StepEvent, ValidationEvent
from psannlm.training.result import TrainResult
from psannlm.training.trainer import Trainer

__all__ = ["Callback", "SaveEvent", "StepEvent", "TrainResult", "Trainer", "ValidationEvent"]
