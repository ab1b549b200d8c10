"""Python API: psannLMDataPrep for data, psannLM for training, generation, saving and loading."""

from __future__ import annotations

import glob
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from psannlm.config.data import DataConfig, PathSource, TokenizerBackend
from psannlm.config.files import prepared_manifest
from psannlm.config.model import ModelConfig
from psannlm.config.run import section_from_kwargs
from psannlm.config.train import Amp, TrainConfig
from psannlm.data.corpus.documents import Document, read_documents
from psannlm.data.corpus.files import KNOWN_SUFFIXES, split_suffix
from psannlm.data.dataset import LMDataset
from psannlm.data.memory_store import encode_documents
from psannlm.data.prepare import PreparedData, load_corpus, load_documents
from psannlm.data.remote_prepared import find_remote_prepared
from psannlm.data.stream import Stream
from psannlm.errors import CorpusError, GenerationError, Interrupted
from psannlm.generation.batch_decode import ContextRule
from psannlm.generation.engine import Engine
from psannlm.generation.generate import Completion, choose_compiling, draw_samples, generate
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.requests import SamplingConfig
from psannlm.io.urls import is_remote, refusal
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.artifact import load_model, model_file, save_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.consoles import make_console, print_line
from psannlm.runtime.device import gpu_memory_bytes, pick_device
from psannlm.runtime.log import receiving_messages
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, Tokenizer
from psannlm.training.callbacks import Callback, TrainResult
from psannlm.training.checkpoint import find_checkpoint
from psannlm.training.trainer import Trainer

__all__ = ["Callback", "LMDataset", "Trainer", "psannLM", "psannLMDataPrep"]

Texts = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_GIVEN_IN_PYTHON = "(texts given in Python)"
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,5}$")


class psannLMDataPrep:
    """Tokenized texts or files, cut into windows for :meth:`psannLM.fit`.

    Args:
        texts_or_paths: texts, and paths of files or folders (``.txt``, ``.jsonl``, ``.parquet``, also ``.gz``,
            ``.zst``), one or many, also mixed. A string is a path if such a file or folder exists, or if it matches
            files as a glob; a string without spaces that looks like a path of no file is refused. Or one output folder
            of ``psannlm prep``, with its own tokenizer and validation split.
        tokenizer: ``auto``, ``sentencepiece``, ``tokenizers`` or ``simple``.
        tokenizer_model_path: a tokenizer file to use instead of training one on the training texts.
        max_length: tokens per window.
        pack_sequences: join documents into full windows; False: at most one document per window.
        isolate_documents: keep the documents of a window apart: nothing in the model reaches over a border.
        val_split: fraction of the documents for validation, at least one document; of a single document its end.
        seed: selects these documents, and the sample that the tokenizer is trained on. The training order, the
            initial weights and dropout depend on ``fit(..., seed=...)``.
        vocab_size: maximum vocabulary size of a trained tokenizer.

    Raises:
        CorpusError: a path does not exist or cannot be read, or there is no text.
        ConfigError: a value is invalid, or a prepared folder is mixed with other texts or has other settings.
        ArtifactError: a prepared folder is damaged.
    """

    def __init__(
        self,
        texts_or_paths: Texts,
        tokenizer: TokenizerBackend = "auto",
        tokenizer_model_path: str | os.PathLike[str] | None = None,
        max_length: int = 256,
        pack_sequences: bool = True,
        val_split: float = 0.0,
        seed: int = 1337,
        *,
        vocab_size: int = 4096,
        isolate_documents: bool = False,
    ) -> None:
        given = _listed(texts_or_paths)
        folder = _prepared_paths(given)
        documents, sources = ([], folder) if folder else _documents(given)
        settings: dict[str, Any] = {
            "sources": [{"path": source} for source in sources],
            "tokenizer": tokenizer,
            "tokenizer_model_path": None if tokenizer_model_path is None else os.fspath(tokenizer_model_path),
            "vocab_size": vocab_size,
            "max_length": max_length,
            "pack_sequences": pack_sequences,
            "isolate_documents": isolate_documents,
            "val_split": val_split,
            "seed": seed,
        }
        self.config = section_from_kwargs(DataConfig, "data", settings)
        self.max_length = self.config.max_length
        self.pack_sequences = self.config.pack_sequences
        self.val_split = self.config.val_split
        self.seed = self.config.seed
        self.tokenizer_model_path = self.config.tokenizer_model_path
        self.notices: list[str] = []
        with receiving_messages(self.notices.append):
            self.prepared: PreparedData = load_corpus(self.config) if folder else load_documents(documents, self.config)
        self._dataset: LMDataset | None = None
        self._val_dataset: LMDataset | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained or loaded tokenizer."""
        return self.prepared.tokenizer

    @property
    def tokenizer_backend(self) -> str:
        """Backend of the tokenizer: ``sentencepiece``, ``tokenizers`` or ``simple``."""
        return self.tokenizer.backend

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer, which the embedding of a model needs."""
        return self.tokenizer.vocab_size

    @property
    def dataset(self) -> LMDataset:
        """The training windows: item i is (inputs, labels), both (max_length,) int64 tensors.

        Built at the first access and then reused.
        """
        if self._dataset is None:
            self._dataset = self._windows(self.prepared.train)
        return self._dataset

    @property
    def val_dataset(self) -> LMDataset | None:
        """The validation windows, built like :attr:`dataset`; None without a validation split."""
        if self._val_dataset is None and self.prepared.val is not None:
            self._val_dataset = self._windows(self.prepared.val)
        return self._val_dataset

    def _windows(self, store: Stream) -> LMDataset:
        return LMDataset(
            store,
            self.max_length,
            pad_id=self.tokenizer.pad_id,
            pack=self.pack_sequences,
            isolate_documents=self.config.isolate_documents,
            tokenizer=self.tokenizer,
            config=self.config,
            text_sha256=self.prepared.report.sha256,
            lost_fraction=self.prepared.lost_fraction,
            preparation=self.prepared.preparation,
        )

    def __len__(self) -> int:
        return len(self.dataset)


class psannLM:
    """A language model: build, fit, generate, save, load.

    Args:
        base: ``waveresnet``, ``respsann`` or ``transformer``.
        d_model, n_layers, n_heads: width, depth and query heads.
        d_mlp: hidden width of the feed-forward; None: the default of ``base``.
        vocab_size: vocabulary size; None: that of the tokenizer at :meth:`fit`.
        positional_encoding: ``rope``, ``alibi`` or ``sinusoidal``.
        sine_params: settings of the sine activation, such as ``dict(amp_init=1.0, trainable=True)``.
        settings: any other key of the ``model`` section of a configuration file, such as ``dropout``.

    Raises:
        UnknownKeyError: (a TypeError) a keyword is unknown; the message names the nearest known one.
        ConfigError: a value or a combination is invalid, or the weights do not fit into memory.
    """

    def __init__(
        self,
        base: str = "waveresnet",
        d_model: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        d_mlp: int | None = None,
        vocab_size: int | None = None,
        positional_encoding: str = "rope",
        sine_params: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        named = {
            "base": base,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_mlp": d_mlp,
            "vocab_size": vocab_size,
            "positional_encoding": positional_encoding,
            "sine_params": sine_params or {},
        }
        self.config = section_from_kwargs(ModelConfig, "model", {**named, **settings})
        refuse_oversize(self.config, MIN_VOCAB_SIZE, Place(for_training=False))
        self.tokenizer: Tokenizer | None = None
        self.result: TrainResult | None = None
        self._model: Transformer | None = None
        self._engine_made: tuple[object, Engine] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The cached engine holds compiled steps and packed weights that cannot be copied; it is rebuilt.
        return {**self.__dict__, "_engine_made": None}

    @property
    def _settings(self) -> ModelConfig:
        """The configuration of the weights, with defaults filled in; before there are weights, the given one."""
        return self.config if self._model is None else self._model.config

    @property
    def base(self) -> str:
        """``waveresnet``, ``respsann`` or ``transformer``."""
        return self._settings.base

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._settings.d_model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self._settings.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self._settings.n_heads

    @property
    def d_mlp(self) -> int | None:
        """Hidden width of the feed-forward; None if it is not given and there are no weights yet."""
        return self._settings.d_mlp

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size; None if it is not given and there are no weights yet."""
        return self._settings.vocab_size

    @property
    def positional_encoding(self) -> str:
        """``rope``, ``alibi`` or ``sinusoidal``."""
        return self._settings.positional_encoding

    @property
    def sine_params(self) -> dict[str, Any]:
        """All settings of the sine activation, as a new dict."""
        return self._settings.sine_params.model_dump()

    @property
    def model(self) -> Transformer:
        """The ``torch.nn.Module``: ids (batch, time) to logits (batch, time, vocab), see ``Transformer.forward``.

        Built with the default seed if it was neither trained nor loaded.

        Raises:
            ConfigError: ``vocab_size`` is not given and :meth:`fit` was not called, or memory is too small.
        """
        if self._model is None:
            resolved = resolve(self.config)
            refuse_oversize(resolved, self.config.vocab_size or 0, Place(for_training=False))
            self._model = build_model(resolved, seed=TrainConfig().seed)
        return self._model

    def fit(
        self,
        train_data: psannLMDataPrep | LMDataset | None = None,
        val_data: psannLMDataPrep | LMDataset | Texts | None = None,
        epochs: int = 1,
        batch_tokens: int = 65_536,
        lr: float = 2e-4,
        amp: Amp | None = "bf16",
        ddp: Literal["auto", "on", "off"] | bool = "auto",
        *,
        verbose: bool = True,
        resume: str = "auto",
        callbacks: Sequence[Callback] = (),
        **overrides: Any,
    ) -> psannLM:
        """Train on ``train_data`` with a :class:`~psannlm.training.trainer.Trainer`; return self.

        The model then has the weights of the last step.

        Args:
            train_data: the windows to train on, or their ``dataset``. The former name ``data`` is accepted.
            val_data: texts, or windows of the same tokenizer, instead of the validation split of ``train_data``.
            epochs, batch_tokens, lr, amp, ddp: as in the ``train`` section of a configuration; ``amp=None`` is fp32.
            verbose: show progress and messages on the standard error stream.
            resume: with a ``checkpoint_dir``: ``auto``, ``never`` or a checkpoint, as for ``psannlm train``.
            callbacks: called after steps, validations and saves, and at the end; see
                :class:`~psannlm.training.callbacks.Callback`.
            overrides: any other key of the ``train`` section, such as ``seed`` of the initial weights, the order of the
                training windows and dropout. Checkpoints, metrics and the loss curve are kept only if
                ``checkpoint_dir`` is given; ``self.result`` has the result of the run.

        Raises:
            UnknownKeyError: (a TypeError) a keyword is unknown; the message names the nearest known one.
            ConfigError, DeviceError: a value is invalid, or the requested device is unavailable.
            TokenizerError: the model was trained with another tokenizer than that of ``train_data``.
        """
        if train_data is not None and "data" in overrides:
            raise TypeError("fit got train_data and data, two names of one argument; give train_data alone")
        data = overrides.pop("data", None) if train_data is None else train_data
        if not isinstance(data, (psannLMDataPrep, LMDataset)):
            raise TypeError(f"fit takes a psannLMDataPrep, not {type(data).__name__}: fit(psannLMDataPrep(texts))")
        tokenizer, data_config = data.origin() if isinstance(data, LMDataset) else (data.tokenizer, data.config)
        named = {"epochs": epochs, "batch_tokens": batch_tokens, "lr": lr, "amp": amp, "ddp": ddp}
        validation = None if val_data is None else _validation(tokenizer, data_config, val_data)
        console = make_console(stderr=True) if verbose else None
        former = self._model
        with tempfile.TemporaryDirectory(prefix="psannlm_fit_") as scratch:
            settings = {**named, "checkpoint_dir": scratch, **overrides}
            config = section_from_kwargs(TrainConfig, "train", settings)
            is_read = verbose or "checkpoint_dir" in overrides
            is_done = False
            try:
                self._model = former or self._built_for(tokenizer, data_config.max_length, config)
                trainer = Trainer(
                    self,
                    data,
                    validation,
                    config,
                    callbacks=callbacks,
                    resume=resume,
                    console=console,
                    sampler=draw_samples if is_read else None,
                )
                with nullcontext() if console is None else receiving_messages(partial(print_line, console)):
                    trainer.train()
                is_done = True
            except Interrupted as error:
                if "checkpoint_dir" in overrides:
                    raise
                raise Interrupted(
                    "fit was stopped, and nothing was kept; with checkpoint_dir=... it saves when it is stopped, and "
                    "the same call resumes"
                ) from error
            finally:
                # A model without a finished fit can still be trained on data of another vocabulary.
                if not is_done:
                    self._model = former
        return self

    def _built_for(self, tokenizer: Tokenizer, max_length: int, config: TrainConfig) -> Transformer:
        """Return new weights; the data set the open values. Raises ConfigError if memory is too small."""
        resolved = resolve(self.config, vocab_size=tokenizer.vocab_size, max_seq_len=max_length)
        device = pick_device(config.device)
        refuse_oversize(resolved, tokenizer.vocab_size, Place(device.type, gpu_memory_bytes(device)))
        return build_model(resolved, seed=config.seed)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        top_k: int | None = None,
        top_p: float | None = 0.9,
        temperature: float = 1.0,
        repetition_penalty: float | None = None,
        *,
        seed: int | None = None,
        dtype: WeightDtype = "float32",
        compile: bool | Literal["auto"] = "auto",
        speculate: int = 0,
        context: ContextRule = "stop",
        stop: str | Iterable[str] = (),
        min_p: float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Return the continuation of ``prompt``, without the prompt.

        Args:
            temperature: softmax temperature; 0 is greedy.
            seed: the same seed, prompt and settings give the same text; None: a new random seed.
            dtype: of the weights during generation: ``float32``, ``bfloat16`` or ``int8``; the model is unchanged.
            compile: compile decoding with torch.compile: half a minute once, then several times faster; ``auto``
                compiles for many new tokens.
            speculate: maximum number of draft tokens per pass, taken from the text so far and verified by the model;
                the text stays the same (prompt lookup decoding).
            context: ``stop`` refuses a prompt that fills the context, and ends a text that fills it with a warning;
                ``slide`` drops the oldest half and continues. The context is ``max_length`` of the training
                data; with ``alibi`` there is no limit.
            stop: up to four texts; the result ends before the first that occurs in it.
            min_p: keep only tokens whose probability is at least this fraction of the most likely token's.
            on_text: called with each new piece of text.

        Raises:
            GenerationError: the model has no tokenizer yet, or the prompt or a setting is invalid.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed, min_p)
        listener = None if on_text is None else lambda _, text: on_text(text)
        engine = self._engine(dtype, choose_compiling(compile, max_new_tokens))
        return self._complete(engine, [prompt], max_new_tokens, sampling, speculate, context, stop, listener)[0].text

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        top_k: int | None = None,
        top_p: float | None = 0.9,
        temperature: float = 1.0,
        repetition_penalty: float | None = None,
        *,
        seed: int | None = None,
        dtype: WeightDtype = "float32",
        compile: bool | Literal["auto"] = "auto",
        speculate: int = 0,
        context: ContextRule = "stop",
        stop: str | Iterable[str] = (),
        min_p: float | None = None,
    ) -> list[str]:
        """Return the result of :meth:`generate` for each prompt, in order, decoded as one batch."""
        if isinstance(prompts, str):
            raise TypeError("generate_batch takes a list of prompts; generate takes one")
        sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed, min_p)
        engine = self._engine(dtype, choose_compiling(compile, max_new_tokens))
        completions = self._complete(engine, prompts, max_new_tokens, sampling, speculate, context, stop, None)
        return [completion.text for completion in completions]

    def _engine(self, dtype: WeightDtype, compile: bool | Literal["auto"]) -> Engine:
        """Return the engine of the last call, or a new one if settings or weights have changed."""
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in self.model.parameters())
        key = (dtype, compile, self.model.config, weights)
        if self._engine_made is None or self._engine_made[0] != key:
            engine = Engine(self.model, dtype=dtype, compile=compile)
            for notice in engine.notices:
                warnings.warn(notice, stacklevel=3)
            self._engine_made = (key, engine)
        return self._engine_made[1]

    def _complete(
        self,
        engine: Engine,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingConfig,
        speculate: int,
        context: ContextRule,
        stop: str | Iterable[str],
        on_text: Callable[[int, str], None] | None,
    ) -> list[Completion]:
        if self.tokenizer is None:
            raise GenerationError("this model has no tokenizer yet: fit it, or load one that was trained")
        completions = generate(
            engine,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            speculate=speculate,
            context=context,
            stop=stop,
            on_text=on_text,
        )
        full = [row for row, done in enumerate(completions) if done.finish_reason == "context"]
        if full:
            row, which = full[0], f" {full[0] + 1}" if len(completions) > 1 else ""
            others = f" (and {len(full) - 1} more)" if len(full) > 1 else ""
            n_new, limit = len(completions[row].ids), self.model.config.max_seq_len
            warnings.warn(
                f"text{which}{others} ends after {n_new} of {max_new_tokens} new tokens: the model's context of "
                f"{limit} tokens is full. Shorten the prompt, give context='slide' to drop the oldest tokens and "
                "continue, or train with a larger max_length",
                stacklevel=3,
            )
        return completions

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write weights, configuration and tokenizer to one file (in a folder: its ``model.safetensors``).

        Raises:
            StorageError: the file cannot be written; an existing file is unchanged.
        """
        target = model_file(Path(path).expanduser())
        save_model(target, self.model, self.tokenizer)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> psannLM:
        """Return the model of a file, of a checkpoint folder or of a run folder (its best checkpoint), on the CPU.

        Raises:
            ArtifactError: the file is missing, damaged or of another version, or no checkpoint of the run is valid.
        """
        given = Path(path).expanduser()
        loaded = load_model(find_checkpoint(given) or given)
        model = cls.__new__(cls)
        model.config = loaded.model.config
        model.tokenizer = loaded.tokenizer
        model.result = None
        model._model = loaded.model
        model._engine_made = None
        return model


def _documents(texts_or_paths: Texts) -> tuple[list[Document], list[str]]:
    """Return the documents of texts and paths, and the names of their sources."""
    given = _listed(texts_or_paths)
    documents: list[Document] = []
    sources: list[str] = []
    n_texts = 0
    for item in given:
        if isinstance(item, os.PathLike) or _is_path(item):
            path = os.fspath(item)
            documents += read_documents([PathSource(path=path)])
            sources.append(path)
        else:
            n_texts += 1
            documents.append(Document(item, f"text {n_texts}"))
    if n_texts or not sources:
        sources.append(_GIVEN_IN_PYTHON)
    return documents, sources


def _listed(texts_or_paths: Texts) -> list[str | os.PathLike[str]]:
    is_one = isinstance(texts_or_paths, (str, os.PathLike))
    return [texts_or_paths] if is_one else list(texts_or_paths)  # type: ignore[list-item, arg-type]


def _prepared_paths(given: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the sources if a prepared folder is among them, else an empty list; a text counts as a source too."""
    paths = [os.fspath(item) if isinstance(item, os.PathLike) or _is_path(item) else _GIVEN_IN_PYTHON for item in given]
    is_found = any(prepared_manifest(path) is not None or find_remote_prepared(path) is not None for path in paths)
    return paths if is_found else []


def _is_path(text: object) -> bool:
    """Whether a string names a file or folder. Raises CorpusError if it only looks like a path."""
    if not isinstance(text, str):
        raise CorpusError(f"texts_or_paths holds {type(text).__name__} {text!r:.60}; give strings or paths")
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    if text and os.path.exists(os.path.expanduser(text)):
        return True
    if is_remote(text) and refusal(text) is None:
        return True
    if any(character.isspace() for character in text):
        return False
    if glob.has_magic(text) and glob.glob(os.path.expanduser(text), recursive=True):
        return True
    if split_suffix(text)[0] in KNOWN_SUFFIXES or os.sep in text or _FILE_SUFFIX.search(text):
        raise CorpusError(f"{text!r} looks like a path, but there is no such file or folder; correct it")
    return False


def _validation(
    tokenizer: Tokenizer, config: DataConfig, val_data: psannLMDataPrep | LMDataset | Texts
) -> psannLMDataPrep | LMDataset:
    """Return the validation windows; texts are tokenized and cut like the training texts."""
    if isinstance(val_data, (psannLMDataPrep, LMDataset)):
        return val_data
    documents, _ = _documents(val_data)
    return LMDataset(
        encode_documents(documents, tokenizer),
        config.max_length,
        pad_id=tokenizer.pad_id,
        pack=config.pack_sequences,
        isolate_documents=config.isolate_documents,
        tokenizer=tokenizer,
        config=config,
    )
