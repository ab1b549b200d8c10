"""Trainer and callbacks under the import path of earlier documents."""

from __future__ import annotations

from psannlm.training.callbacks import Callback, SaveEvent, StepEvent, TrainResult, ValidationEvent
from psannlm.training.trainer import Trainer

__all__ = ["Callback", "SaveEvent", "StepEvent", "TrainResult", "Trainer", "ValidationEvent"]
