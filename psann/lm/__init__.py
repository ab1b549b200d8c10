"""The import path of older documents: ``from psann.lm import psannLM, psannLMDataPrep`` gives what psannlm gives.

There is no ``psann/__init__.py``: ``psann`` is a namespace, so that this folder can stand beside another distribution
of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["psannLM", "psannLMDataPrep"]

if TYPE_CHECKING:
    from psannlm import psannLM, psannLMDataPrep


def __getattr__(name: str) -> object:
    if name in __all__:
        import psannlm

        return getattr(psannlm, name)
    raise AttributeError(f"module 'psann.lm' has no attribute '{name}'; new code imports from psannlm")
