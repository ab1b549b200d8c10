"""Language models with trainable sine activations: ``from psannlm import psannLM, psannLMDataPrep``.

The names are looked up on first use, so that importing the package, and with it ``psannlm --help``, loads no torch.
"""

import os
import sys

# python -m puts the working folder in front of the path, where any file may bear the name of a library. It goes before
# anything else is imported, and only while python -m looks for a module of ours: then sys.argv starts with -m.
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:
    _named = sys.orig_argv[-len(sys.argv)]
    if (_named.partition("m")[2] if _named.startswith("-") else _named).partition(".")[0] == "psannlm":
        del sys.path[0]

import logging

# Messages are silent unless a program configures logging or receives them (psannlm/runtime/log.py).
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"
__all__ = ["Callback", "LMDataset", "Trainer", "__version__", "psannLM", "psannLMDataPrep"]

# As typing.TYPE_CHECKING, which would have to be imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from psannlm.api import Callback, LMDataset, Trainer, psannLM, psannLMDataPrep


def __getattr__(name: str) -> object:
    if name in __all__:
        from psannlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'psannlm' has no attribute '{name}'")
