"""Dataset of training windows under the import path of earlier documents."""

from __future__ import annotations

from psannlm.data.dataset import LMDataset

__all__ = ["LMDataset"]
