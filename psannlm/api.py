"""The Python surface: texts to a dataset, a dataset to a model, a model to text and files."""

from __future__ import annotations

import glob
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
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
from psannlm.data.stream import Stream
from psannlm.errors import CorpusError, GenerationError, Interrupted
from psannlm.generation.batch_decode import ContextRule
from psannlm.generation.engine import Engine
from psannlm.generation.generate import Completion, choose_compiling, draw_samples, generate
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.sampling import SamplingConfig
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.artifact import load_model, model_file, save_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.consoles import make_console
from psannlm.runtime.device import gpu_memory_bytes, pick_device
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, Tokenizer
from psannlm.training.callbacks import Callback
from psannlm.training.checkpoint import find_checkpoint
from psannlm.training.console import ConsoleReporter
from psannlm.training.reporting import Reporter, SilentReporter
from psannlm.training.result import TrainResult
from psannlm.training.trainer import Trainer

__all__ = ["Callback", "LMDataset", "Trainer", "psannLM", "psannLMDataPrep"]

Texts = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_GIVEN_IN_PYTHON = "(texts given in Python)"
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,5}$")


class psannLMDataPrep:
    """Texts or files, tokenized and cut into windows for :meth:`psannLM.fit`.

    Args:
        texts_or_paths: texts, and paths of files or folders (``.txt``, ``.jsonl``, ``.parquet``, also ``.gz``,
            ``.zst``), one or many, also mixed. A string counts as a path if there is such a file or
            folder, or files that it matches as a glob; one without spaces that only looks like a path is refused.
            Or one folder that ``psannlm prep`` made, with its own tokenizer and validation part.
        tokenizer: ``auto``, ``sentencepiece``, ``tokenizers`` or ``simple``.
        tokenizer_model_path: a tokenizer file to use instead of fitting one on the training texts.
        max_length: tokens of a window.
        pack_sequences: join documents into full windows; False never puts two into one window.
        val_split: fraction of the documents held out for validation, at least one; of a single document its end.
        seed: decides which documents those are, and the sample the tokenizer is fitted on. The order of training, the
            initial weights and dropout have a seed of their own: ``fit(..., seed=...)``.
        vocab_size: entries of a fitted tokenizer, at most.

    Raises:
        CorpusError: a path does not exist or cannot be read, or there is no text.
        ConfigError: a value is refused, or a prepared folder stands beside other texts or was made otherwise.
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
        self.prepared: PreparedData = (
            load_corpus(self.config, self.notices.append)
            if folder
            else load_documents(documents, self.config, self.notices.append)
        )
        self._dataset: LMDataset | None = None
        self._val_dataset: LMDataset | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was fitted or loaded."""
        return self.prepared.tokenizer

    @property
    def tokenizer_backend(self) -> str:
        """Which backend is live: ``sentencepiece``, ``tokenizers`` or ``simple``."""
        return self.tokenizer.backend

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer; the number of rows a model's embedding needs."""
        return self.tokenizer.vocab_size

    @property
    def dataset(self) -> LMDataset:
        """The training windows: item i is (inputs, labels), both (max_length,) int64 tensors.

        Built at the first access, and one object from then on.
        """
        if self._dataset is None:
            self._dataset = self._windows(self.prepared.train)
        return self._dataset

    @property
    def val_dataset(self) -> LMDataset | None:
        """The held-out windows, one object like :attr:`dataset`; None when nothing was held out."""
        if self._val_dataset is None and self.prepared.val is not None:
            self._val_dataset = self._windows(self.prepared.val)
        return self._val_dataset

    def _windows(self, store: Stream) -> LMDataset:
        return LMDataset(
            store,
            self.max_length,
            pad_id=self.tokenizer.pad_id,
            pack=self.pack_sequences,
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
        d_mlp: hidden width of the feed-forward; None picks it by kind.
        vocab_size: rows of the embedding; None takes the tokenizer's at :meth:`fit`.
        positional_encoding: ``rope``, ``alibi`` or ``sinusoidal``.
        sine_params: settings of the sine activation, such as ``dict(amp_init=1.0, trainable=True)``.
        settings: any other key of the ``model`` section of a configuration file, such as ``dropout``.

    Raises:
        UnknownKeyError: (a TypeError) a keyword is not known; the nearest known one is named.
        ConfigError: a value or a combination is refused, or the weights do not fit into this machine's memory.
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
        # The engine of the last call holds compiled steps and packed weights that cannot be copied; it is made again.
        return {**self.__dict__, "_engine_made": None}

    @property
    def _settings(self) -> ModelConfig:
        """The configuration of the weights where there are any: what was left open is filled in."""
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
        """Hidden width of the feed-forward; where it was left open, None until there are weights."""
        return self._settings.d_mlp

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding; where it was left open, None until there are weights."""
        return self._settings.vocab_size

    @property
    def positional_encoding(self) -> str:
        """``rope``, ``alibi`` or ``sinusoidal``."""
        return self._settings.positional_encoding

    @property
    def sine_params(self) -> dict[str, Any]:
        """Every setting of the sine activation, a fresh dict."""
        return self._settings.sine_params.model_dump()

    @property
    def model(self) -> Transformer:
        """The ``torch.nn.Module``: ids (batch, time) to logits (batch, time, vocab), see ``Transformer.forward``.

        It is built with the default seed if it was neither fitted nor loaded.

        Raises:
            ConfigError: ``vocab_size`` was left open and there was no :meth:`fit`, or memory is too small.
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

        The model holds the weights of the last step then.

        Args:
            train_data: the windows to train on, or their ``dataset``; ``data``, its former name, is taken too.
            val_data: texts, or windows of the same tokenizer, to validate on instead of what ``train_data`` held out.
            epochs, batch_tokens, lr, amp, ddp: as in the ``train`` section of a configuration; ``amp=None`` is fp32.
            verbose: show progress on the standard error stream.
            resume: with a ``checkpoint_dir``: ``auto``, ``never`` or a checkpoint, as for ``psannlm train``.
            callbacks: called after steps, validations, saves and at the end; see
                :class:`~psannlm.training.callbacks.Callback`.
            overrides: any other key of the ``train`` section, such as ``seed``, which decides the initial weights, the
                order of the training windows and dropout. Checkpoints, metrics and the loss curve are kept only
                when ``checkpoint_dir`` is given; ``self.result`` sums up the run.

        Raises:
            UnknownKeyError: (a TypeError) a keyword is not known; the nearest known one is named.
            ConfigError, DeviceError: a value is refused, or what it asks for is not to be had.
            TokenizerError: the model has learnt the ids of another tokenizer than that of ``train_data``.
        """
        if train_data is not None and "data" in overrides:
            raise TypeError("fit got train_data and data, two names of one argument; give train_data alone")
        data = overrides.pop("data", None) if train_data is None else train_data
        if not isinstance(data, (psannLMDataPrep, LMDataset)):
            raise TypeError(f"fit takes a psannLMDataPrep, not {type(data).__name__}: fit(psannLMDataPrep(texts))")
        tokenizer, data_config = data.origin() if isinstance(data, LMDataset) else (data.tokenizer, data.config)
        named = {"epochs": epochs, "batch_tokens": batch_tokens, "lr": lr, "amp": amp, "ddp": ddp}
        validation = None if val_data is None else _validation(tokenizer, data_config, val_data)
        reporter: Reporter = ConsoleReporter(make_console(stderr=True)) if verbose else SilentReporter()
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
                    reporter=reporter,
                    sampler=draw_samples if is_read else None,
                )
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
                # A model that never finished a fit is still open to data of another vocabulary.
                if not is_done:
                    self._model = former
        return self

    def _built_for(self, tokenizer: Tokenizer, max_length: int, config: TrainConfig) -> Transformer:
        """Return new weights; the data decide what was left open. Raises ConfigError if memory is too small."""
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
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Return the text that follows ``prompt``, the prompt left out.

        Args:
            temperature: 0 always takes the likeliest token.
            seed: the same seed, prompt and settings give the same text; None draws a new one.
            dtype: of the weights while generating: ``float32``, ``bfloat16`` or ``int8``; the model is not changed.
            compile: put decoding through torch.compile: half a minute at first, then several times faster; ``auto``
                does so where many tokens are asked for.
            speculate: guess up to so many tokens per pass from the text so far and let the model check them; the text
                stays the same.
            context: ``stop`` refuses a prompt without room in the context, and ends a text that fills it with a
                warning; ``slide`` drops the oldest half and continues. The context is ``max_length`` of the training
                data; with ``alibi`` there is no limit.
            on_text: called with pieces of the text as they come.

        Raises:
            GenerationError: the model has no tokenizer yet, or the prompt or a setting cannot be honoured.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed)
        listener = None if on_text is None else lambda _, text: on_text(text)
        engine = self._engine(dtype, choose_compiling(compile, max_new_tokens))
        return self._complete(engine, [prompt], max_new_tokens, sampling, speculate, context, listener)[0].text

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
    ) -> list[str]:
        """Return what :meth:`generate` gives for each prompt, in order, decoded together."""
        if isinstance(prompts, str):
            raise TypeError("generate_batch takes a list of prompts; generate takes one")
        sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, seed)
        engine = self._engine(dtype, choose_compiling(compile, max_new_tokens))
        completions = self._complete(engine, prompts, max_new_tokens, sampling, speculate, context, None)
        return [completion.text for completion in completions]

    def _engine(self, dtype: WeightDtype, compile: bool | Literal["auto"]) -> Engine:
        """The engine of the last call, unless settings or weights have changed since."""
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
            StorageError: the file cannot be written; what stood there is still there.
        """
        target = model_file(Path(path).expanduser())
        save_model(target, self.model, self.tokenizer)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> psannLM:
        """Return the model of a file, of a checkpoint folder or of a run folder (its best checkpoint), on the CPU.

        Raises:
            ArtifactError: the file is missing, damaged or of another version, or no checkpoint of the run is whole.
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
    """Sort strings and paths into documents; also return what to write down as sources."""
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
    """Return what was given as paths if a prepared folder is among it; a text beside it counts as a source too."""
    paths = [os.fspath(item) if isinstance(item, os.PathLike) or _is_path(item) else _GIVEN_IN_PYTHON for item in given]
    return paths if any(prepared_manifest(path) is not None for path in paths) else []


def _is_path(text: object) -> bool:
    """Whether a string names a file or folder; one that only looks like a path is refused rather than learnt from."""
    if not isinstance(text, str):
        raise CorpusError(f"texts_or_paths holds {type(text).__name__} {text!r:.60}; give strings or paths")
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    if text and os.path.exists(os.path.expanduser(text)):
        return True
    if any(character.isspace() for character in text):
        return False
    if glob.has_magic(text) and glob.glob(os.path.expanduser(text), recursive=True):
        return True
    if split_suffix(text)[0] in KNOWN_SUFFIXES or os.sep in text or _FILE_SUFFIX.search(text):
        raise CorpusError(f"{text!r} looks like a path, and there is no such file or folder; correct it")
    return False


def _validation(
    tokenizer: Tokenizer, config: DataConfig, val_data: psannLMDataPrep | LMDataset | Texts
) -> psannLMDataPrep | LMDataset:
    """Return what to validate on; texts are tokenized and cut as the training texts were."""
    if isinstance(val_data, (psannLMDataPrep, LMDataset)):
        return val_data
    documents, _ = _documents(val_data)
    return LMDataset(
        encode_documents(documents, tokenizer),
        config.max_length,
        pad_id=tokenizer.pad_id,
        pack=config.pack_sequences,
        tokenizer=tokenizer,
        config=config,
    )
