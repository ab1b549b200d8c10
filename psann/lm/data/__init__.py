"""Corpora under the import path of earlier documents: prepared text, its windows as a dataset, and their settings."""

from __future__ import annotations

from psannlm import psannLMDataPrep
from psannlm.config.data import DataConfig
from psannlm.data.dataset import LMDataset

__all__ = ["DataConfig", "LMDataset", "psannLMDataPrep"]
