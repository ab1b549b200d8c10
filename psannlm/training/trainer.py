"""Trainer class of the Python API: model, data, training configuration and callbacks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from psannlm.config.data import DataConfig
from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig, plan_batches
from psannlm.config.train import TrainConfig
from psannlm.data.corpus.documents import ReadReport
from psannlm.data.dataset import LMDataset
from psannlm.data.prepare import PreparedData
from psannlm.data.stream import Stream
from psannlm.errors import ConfigError, TokenizerError
from psannlm.evaluation.loss import Evaluation, evaluate
from psannlm.models.artifact import model_file, save_model
from psannlm.models.registry import resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import pick_precision
from psannlm.runtime.distributed import World
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.callbacks import Callback, TrainResult
from psannlm.training.context import Sampler
from psannlm.training.plan import cut_windows
from psannlm.training.run import train

_EVENTS = ("on_step", "on_validation", "on_save", "on_end")


class LanguageModel(Protocol):
    """An object with a network and the tokenizer it was trained with, such as ``psannLM``."""

    tokenizer: Tokenizer | None
    result: TrainResult | None
    config: ModelConfig

    @property
    def model(self) -> Transformer:
        """The network."""
        ...


class Corpus(Protocol):
    """Prepared text with its settings, such as ``psannLMDataPrep``."""

    prepared: PreparedData
    config: DataConfig


class Trainer:
    """Training of a model on a corpus, as by ``psannLM.fit`` and ``psannlm train``.

    Args:
        model: a ``psannLM``, or the network of one (``model.model``); trained in place.
        train_data: a ``psannLMDataPrep``, or an :class:`~psannlm.data.dataset.LMDataset` of one.
        val_data: windows to validate on, of the same two types; all of their training text is used. None: the
            validation split of ``train_data``, if it is a ``psannLMDataPrep``.
        config: the ``train`` section; checkpoints, metrics and the loss curve go to its ``checkpoint_dir``.
        callbacks: see :class:`~psannlm.training.callbacks.Callback`; called in this order.
        resume: ``auto`` resumes from the latest valid checkpoint of ``checkpoint_dir``, ``never`` starts from scratch,
            any other value is the path of a checkpoint.
        console: a rich console that shows progress; None: no progress. Messages are logged in either case.
        sampler: continues ``config.sample_prompts`` at each validation; None: no samples.
        time_budget_s: seconds after which the current step is finished and saved, and :meth:`train` returns.

    Attributes:
        model: the network.
        tokenizer: that of the data.
        config: the full configuration of the run: model, data and train.
        result: the result of the last :meth:`train`, or None.

    Raises:
        TypeError: an argument has another type.
        ConfigError: values contradict each other, such as ``batch_tokens`` below one window.
        TokenizerError: model, training and validation data have different tokenizers.
    """

    def __init__(
        self,
        model: LanguageModel | Transformer,
        train_data: LMDataset | Corpus,
        val_data: LMDataset | Corpus | None = None,
        config: TrainConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        resume: str = "auto",
        console: Console | None = None,
        sampler: Sampler | None = None,
        time_budget_s: float | None = None,
    ) -> None:
        self._holder = None if isinstance(model, Transformer) else model
        self.model = model if isinstance(model, Transformer) else _network(model)
        self._data, data_config = _prepared(train_data, val_data)
        self.tokenizer = self._data.tokenizer
        if config is not None and not isinstance(config, TrainConfig):
            raise TypeError(f"config is a {type(config).__name__}; give a TrainConfig")
        self.callbacks = _callbacks(callbacks)
        if self._holder is not None and self._holder.tokenizer is not None:
            _refuse_other_tokenizer(self._holder.tokenizer, self.tokenizer)
        self.config = RunConfig(model=model.config, data=data_config, train=config or TrainConfig())
        if model.config.max_seq_len is None:
            # max_seq_len was left open, or set by the windows of an earlier run; longer windows extend it.
            context = max(self.model.config.max_seq_len or 0, data_config.max_length)
            self.model.config = resolve(self.model.config.model_copy(update={"max_seq_len": context}))
        self.resume = resume
        self.result: TrainResult | None = None
        self._console, self._sampler, self._time_budget_s = console, sampler, time_budget_s
        self._ending = threading.Event()

    def train(self) -> TrainResult:
        """Train to the last step, or until :meth:`stop` or the time budget ends the run; return the result.

        The model then has the weights of the last step and is in evaluation mode. A ``psannLM`` also gets the
        tokenizer, so that it can generate.

        Raises:
            ConfigError: ``checkpoint_dir`` holds a run of another configuration; the message lists the differences.
            DeviceError: the device, precision or process group of the configuration is unavailable.
            Interrupted: Ctrl-C or SIGTERM; the state was saved.
            TrainingError: the loss is NaN or Inf, or memory ran out.
            StorageError: a checkpoint cannot be written.
        """
        self._ending.clear()
        self.result = train(
            self.config,
            resume=self.resume,
            console=self._console,
            data=self._data,
            model=self.model,
            sampler=self._sampler,
            time_budget_s=self._time_budget_s,
            callbacks=self.callbacks,
            ending=self._ending,
        )
        if self._holder is not None:
            self._holder.tokenizer, self._holder.result = self.tokenizer, self.result
        return self.result

    def stop(self) -> None:
        """End the run after the current step, which is saved. May be called by a callback or by another thread.

        :meth:`train` returns its result as usual; calling it again resumes there.
        """
        self._ending.set()

    def evaluate(self, data: LMDataset | Corpus | None = None) -> Evaluation:
        """Return loss (nats per token), perplexity and bits per byte of the current weights; each token counts once.

        Args:
            data: windows of the same tokenizer; None: the validation data.

        Raises:
            ConfigError: there is no validation data.
            TokenizerError: ``data`` has another tokenizer.
            CorpusError: the text holds no token.
        """
        store = self._data.val if data is None else _other_store(data, self.tokenizer, "data")
        if store is None:
            raise ConfigError(
                "there is nothing to evaluate on: give data here, val_data to the Trainer, or val_split to "
                "psannLMDataPrep"
            )
        device = World().pick_device(self.config.train.device)
        return evaluate(
            self.model.to(device),
            cut_windows(self.config, store, self.tokenizer),
            precision=pick_precision(self.config.train.amp, device),
            batch_size=plan_batches(self.config).micro_batch_size,
        )

    def save(self, path: str | Path) -> Path:
        """Write weights, configuration and tokenizer to one file (in a folder: its ``model.safetensors``).

        ``psannLM.load`` and ``psannlm generate --checkpoint`` read it.

        Raises:
            StorageError: the file cannot be written; an existing file is unchanged.
        """
        target = model_file(Path(path).expanduser())
        save_model(target, self.model, self.tokenizer)
        return target


def _network(model: LanguageModel) -> Transformer:
    network = getattr(model, "model", None)
    if not isinstance(network, Transformer):
        raise TypeError(f"model is a {type(model).__name__}; give a psannLM, or the network of one (model.model)")
    return network


def _prepared(train_data: LMDataset | Corpus, val_data: LMDataset | Corpus | None) -> tuple[PreparedData, DataConfig]:
    """Return the data and its configuration in the form that ``train`` takes."""
    if isinstance(train_data, LMDataset):
        tokenizer, config = train_data.origin()
        data = PreparedData(
            tokenizer,
            train_data.store,
            None,
            ReadReport(known_sha256=train_data.text_sha256),
            preparation=train_data.preparation,
            lost_fraction=train_data.lost_fraction,
        )
    else:
        _refuse_no_corpus(train_data, "train_data")
        data, config = train_data.prepared, train_data.config
    if val_data is not None:
        data = replace(data, val=_other_store(val_data, data.tokenizer, "val_data"), val_overlap=None)
    return data, config


def _other_store(data: LMDataset | Corpus, tokenizer: Tokenizer, name: str) -> Stream:
    """Return the tokens of other data. Raises TokenizerError if they have another tokenizer."""
    if isinstance(data, LMDataset):
        found, store = data.tokenizer, data.store
    else:
        _refuse_no_corpus(data, name)
        found, store = data.prepared.tokenizer, data.prepared.train
    if found is not None and found.fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"{name} has tokenizer {found.fingerprint[:12]}, the training data has {tokenizer.fingerprint[:12]}; give "
            "fit the texts themselves, or prepare them with tokenizer_model_path set to the training data's tokenizer"
        )
    return store


def _refuse_no_corpus(data: Corpus, name: str) -> None:
    if not isinstance(getattr(data, "prepared", None), PreparedData):
        raise TypeError(f"{name} is a {type(data).__name__}; give psannLMDataPrep(texts), or its dataset")


def _refuse_other_tokenizer(trained: Tokenizer, found: Tokenizer) -> None:
    if trained.fingerprint != found.fingerprint:
        raise TokenizerError(
            f"the model was trained with tokenizer {trained.fingerprint[:12]}, the training data has "
            f"{found.fingerprint[:12]}; save the model's tokenizer and prepare the data with tokenizer_model_path set "
            "to that file"
        )


def _callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Return the callbacks as a tuple. Raises TypeError if one is not a callback, before the first step."""
    found = (callbacks,) if isinstance(callbacks, Callback) else tuple(callbacks)
    for callback in found:
        if isinstance(callback, type):
            raise TypeError(f"callbacks holds the class {callback.__name__}; give an object: {callback.__name__}()")
        missing = [name for name in _EVENTS if not callable(getattr(callback, name, None))]
        if missing:
            raise TypeError(f"callback {callback!r:.60} has no {', '.join(missing)}; derive it from psannlm.Callback")
    return found
