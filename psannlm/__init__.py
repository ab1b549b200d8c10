"""Language models with trainable sine activations: ``from psannlm import psannLM, psannLMDataPrep``.

The names are looked up on first use, so that importing the package, and with it ``psannlm --help``, loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "psannLM", "psannLMDataPrep"]

if TYPE_CHECKING:
    from psannlm.api import psannLM, psannLMDataPrep


def __getattr__(name: str) -> object:
    if name in ("psannLM", "psannLMDataPrep"):
        from psannlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'psannlm' has no attribute '{name}'")
