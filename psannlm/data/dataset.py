"""Training windows as a ``torch.utils.data.Dataset``: the class of ``psannLMDataPrep.dataset``."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_index
from typing import SupportsIndex

from torch import Tensor
from torch.utils.data import Dataset

from psannlm.config.data import DataConfig
from psannlm.data.stream import Stream
from psannlm.data.windows import Windows
from psannlm.tokenizers.base import Tokenizer


class LMDataset(Windows, Dataset[tuple[Tensor, Tensor]]):
    """Windows of T tokens as pairs of int64 tensors: ``dataset[i]`` is (inputs, labels), both (T,).

    The label of a position is the next token, or -100 (``IGNORE_INDEX``, which torch's cross-entropy ignores) for
    padding and where a document begins. Every token of the corpus is a label in exactly one window. The dataset works
    in torch's ``DataLoader`` with any number of workers, and can be pickled.

    Args:
        store: the tokens.
        seq_len: T, 1 or more.
        pad_id: id of padding, after the end of the text in the last window.
        pack: join documents into full windows; False never puts two into one window.
        isolate_documents: also give the positions that keep the documents of a window apart (``document_positions``).
        tokenizer, config, text_sha256: origin of the tokens; a :class:`~psannlm.training.trainer.Trainer` needs them
            for its checkpoints.
        lost_fraction, preparation: as in :class:`~psannlm.data.prepare.PreparedData`; None is unknown.

    Raises:
        ConfigError: ``seq_len`` is below 1.
    """

    def __init__(
        self,
        store: Stream,
        seq_len: int,
        *,
        pad_id: int,
        pack: bool = True,
        isolate_documents: bool = False,
        tokenizer: Tokenizer | None = None,
        config: DataConfig | None = None,
        text_sha256: str = "",
        lost_fraction: float | None = None,
        preparation: int | None = None,
    ) -> None:
        super().__init__(store, seq_len, pad_id=pad_id, pack=pack, isolate_documents=isolate_documents)
        self.tokenizer = tokenizer
        self.config = config
        self.text_sha256 = text_sha256
        self.lost_fraction = lost_fraction
        self.preparation = preparation

    def __getitem__(self, index: SupportsIndex) -> tuple[Tensor, Tensor]:
        """Return (inputs, labels) of one window, both (T,) int64; a negative index counts from the end.

        Raises:
            IndexError: there is no such window.
            TypeError: ``index`` is not an integer.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[tuple[Tensor, Tensor]]:
        """Return several windows at once, for batches of torch's ``DataLoader``. Errors as for one."""
        inputs, labels = self.batch([self._from_start(as_index(index)) for index in indices])
        return list(zip(inputs.unbind(), labels.unbind(), strict=True))

    def _from_start(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return index % len(self)

    def origin(self) -> tuple[Tokenizer, DataConfig]:
        """Return the tokenizer and the settings of these windows. Raises TypeError if they were not given."""
        if self.tokenizer is None or self.config is None:
            raise TypeError(
                f"{self!r} has no tokenizer or no configuration; use psannLMDataPrep(...).dataset, or pass both"
            )
        cut = {
            "max_length": self.seq_len,
            "pack_sequences": self.is_packed,
            "isolate_documents": self.isolate_documents,
        }
        return self.tokenizer, self.config.model_copy(update=cut)

    def __repr__(self) -> str:
        return f"<LMDataset of {len(self):,} windows of {self.seq_len:,} tokens>"
