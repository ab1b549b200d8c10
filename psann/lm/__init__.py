"""Import path of earlier documents: ``from psann.lm import psannLM, psannLMDataPrep`` re-exports psannlm.

There is no ``psann/__init__.py``: ``psann`` is a namespace, so that this folder can coexist with another distribution
of that name.
"""

import os
import sys

# As psannlm/__init__.py does, and says why. It cannot be asked: the working folder may hold another psannlm.
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:
    _named = sys.orig_argv[-len(sys.argv)]
    if (_named.partition("m")[2] if _named.startswith("-") else _named).startswith("psann.lm."):
        del sys.path[0]

__all__ = ["Callback", "LMDataset", "Trainer", "psannLM", "psannLMDataPrep"]

# As typing.TYPE_CHECKING, which would have to be imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from psannlm import Callback, LMDataset, Trainer, psannLM, psannLMDataPrep


def __getattr__(name: str) -> object:
    if name in __all__:
        import psannlm

        return getattr(psannlm, name)
    raise AttributeError(f"module 'psann.lm' has no attribute '{name}'; new code imports from psannlm")
