"""The import path of older documents for the dataset of training windows."""

from __future__ import annotations

from psannlm.data.dataset import LMDataset

__all__ = ["LMDataset"]
