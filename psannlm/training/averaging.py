"""Exponential moving average (EMA) of the weights: its update after each step, and validation with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from psannlm.errors import ArtifactError
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.runtime.distributed import as_sharded, shard_like
from psannlm.training.parallel import reshard

# Key of the notes of the file of averaged weights.
NOTES_KEY = "ema"


class WeightAverage:
    """Exponential moving average of the parameters of ``model`` (Polyak and Juditsky 1992), as large as they are.

    After update n = 0, 1, 2, ... the average is β · average + (1 - β) · parameters, with
    β = min(decay, (1 + n) / (10 + n)): it follows the parameters closely at first, so that the initial weights do not
    weigh on a run of fewer than 1 / (1 - decay) steps. It starts as a copy of the parameters, sharded as they are.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        reshard(model)
        self.decay = decay
        self.n_updates = 0
        self._model = model
        # torch's AveragedModel copies the module, which FSDP refuses; the update is the one that it applies.
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters, once per optimizer step, without waiting for the device."""
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        averages, parameters = _local(self._averages), _local(self._parameters)
        get_ema_multi_avg_fn(decay)(averages, parameters, self.n_updates)  # type: ignore[no-untyped-call]
        self.n_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the parameters of the model with their average, in place, until the context ends."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # What FSDP has gathered for a forward pass would be used again by the next one.
        reshard(self._model)
        for average, parameter in zip(_local(self._averages), _local(self._parameters), strict=True):
            former = parameter.clone()
            parameter.copy_(average)
            average.copy_(former)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights by name, as the model's ``state_dict`` does: with its buffers, sharded."""
        return {**self._model.state_dict(), **self._averages}

    def notes(self) -> dict[str, Any]:
        """Return what the file of the averaged weights says of them."""
        return {NOTES_KEY: {"decay": self.decay, "updates": self.n_updates}}

    def load(self, path: Path) -> None:
        """Load the average from the model file at ``path``, which was written with :meth:`tensors` and :meth:`notes`.

        Raises:
            ArtifactError: the file is missing or damaged, or does not hold the average of this model.
        """
        loaded = load_model(path)
        entry = loaded.notes.get(NOTES_KEY)
        n_updates = entry.get("updates") if isinstance(entry, dict) else None
        if type(n_updates) is not int or n_updates < 0:
            raise ArtifactError(f"{path} does not hold averaged weights: its notes have no number of updates")
        if loaded.model.config != self._model.config:
            raise ArtifactError(f"{path} holds the weights of a model of another configuration")
        given: Mapping[str, Tensor] = loaded.model.state_dict()
        with torch.no_grad():
            for name, own in self._averages.items():
                own.copy_(shard_like(given[name].to(own.device), own))
        self.n_updates = n_updates


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return this rank's shards of ``tensors``; of those that are not sharded, the tensors themselves."""
    return [
        value.detach() if (sharded := as_sharded(value)) is None else sharded.to_local() for value in tensors.values()
    ]
