"""Training under the import path of earlier documents: the trainer, and ``python -m psann.lm.train.cli``.

The names are looked up on first use, because the command line must not wait for torch.
"""

__all__ = ["Callback", "Trainer"]

# As typing.TYPE_CHECKING, which would have to be imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from psannlm import Callback, Trainer


def __getattr__(name: str) -> object:
    if name in __all__:
        import psannlm

        return getattr(psannlm, name)
    raise AttributeError(f"module 'psann.lm.train' has no attribute '{name}'")
