"""Networks by the import path of earlier documents: ``build_model(ModelConfig(base="respsann", vocab_size=4096))``."""

from __future__ import annotations

from psannlm.config.model import ModelConfig
from psannlm.models.artifact import LoadedModel, load_model, save_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer

__all__ = ["LoadedModel", "ModelConfig", "Transformer", "build_model", "load_model", "resolve", "save_model"]
