"""Start of a run from the weights of another model (``train.init_from``): what is taken over, and what must agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from psannlm.config.base import Section
from psannlm.config.model import ModelConfig
from psannlm.config.run import RunConfig, load_config
from psannlm.data.prepare import PreparedData
from psannlm.errors import ArtifactError, ConfigError, Problem, PsannlmError
from psannlm.io.safetensors_header import file_metadata
from psannlm.models.artifact import load_model, model_file
from psannlm.models.registry import build_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer
from psannlm.training.checkpoint import find_checkpoint, list_checkpoints, read_state
from psannlm.training.run_folder import CONFIG_FILE

_KEY = "train.init_from"
# Keys of the model that change no tensor: a child may have other values.
_FREE = ("dropout", "max_seq_len")


@dataclass(frozen=True)
class Parent:
    """Weights to start from, with the configuration of the new run.

    Attributes:
        lineage: plain data about the model file: path, SHA-256, step and tokens of its training.
    """

    model: Transformer
    tokenizer: Tokenizer
    lineage: dict[str, Any]


def with_parent_model(config: RunConfig, resume: str = "auto") -> RunConfig:
    """Return ``config`` with the model of ``train.init_from``, where that is set; keys that are given must agree.

    A run that resumes takes the model from its own run folder, and needs the parent no longer.

    Raises:
        ConfigError: the parent does not exist, a key of the model differs from it, or its context is shorter than
            ``data.max_length``.
        ArtifactError: the parent is not a model file.
    """
    if config.train.init_from is None:
        return config
    own = _model_of_run(config, resume)
    if own is not None:
        # A key that differs is reported by the comparison with the checkpoint.
        return config.model_copy(update={"model": _merged(config.model, own)})
    path = parent_file(config.train.init_from)
    theirs = _read_config(path)
    problems = [Problem(f"model.{key}", message) for key, message in _differences(config.model, theirs, path).items()]
    merged = _merged(config.model, theirs)
    window = config.data.max_length
    if merged.max_seq_len is not None and merged.max_seq_len < window:
        message = (
            f"{window} is longer than the context of {path}, {merged.max_seq_len} tokens; lower it, or extend the "
            f"context with model.max_seq_len: {window}"
        )
        problems.append(Problem("data.max_length", message))
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update={"model": merged})


def parent_file(given: str) -> Path:
    """Return the model file that ``train.init_from`` names: of a run folder, that of its best checkpoint.

    Raises:
        ConfigError: there is nothing at this path.
    """
    path = Path(os.path.expanduser(given))
    if not os.path.lexists(path):
        raise ConfigError(Problem(_KEY, f"no model file, checkpoint folder or run folder at {path}"))
    return model_file(find_checkpoint(path) or path)


def load_parent(config: RunConfig) -> Parent:
    """Load the weights of ``train.init_from`` into a model of ``config.model`` (see :func:`with_parent_model`).

    Raises:
        ConfigError: it has no tokenizer, or ``data.tokenizer_model_path`` names another one.
        ArtifactError: the file is damaged.
        TokenizerError: the tokenizer file cannot be read.
    """
    assert config.train.init_from is not None
    path = parent_file(config.train.init_from)
    loaded = load_model(path)
    tokenizer, named = loaded.tokenizer, config.data.tokenizer_model_path
    given = None if named is None else load_tokenizer(Path(os.path.expanduser(named)))
    if tokenizer is None and given is None:
        message = f"{path} has no tokenizer; name the one it was trained with"
        raise ConfigError(Problem("data.tokenizer_model_path", message))
    if tokenizer is not None and given is not None and given.fingerprint != tokenizer.fingerprint:
        raise ConfigError(Problem("data.tokenizer_model_path", _other_tokenizer(given, tokenizer, path)))
    model = build_model(config.model, device="meta")
    model.load_state_dict({name: tensor.float() for name, tensor in loaded.model.state_dict().items()}, assign=True)
    lineage: dict[str, Any] = {"path": str(path), "sha256": file_metadata(path).get("sha256")}
    lineage |= {key: loaded.notes[key] for key in ("step", "tokens", "val_loss", "imported") if key in loaded.notes}
    kept = tokenizer or given
    assert kept is not None
    return Parent(model, kept, lineage)


def refuse_other_tokenizer(parent: Parent, data: PreparedData) -> None:
    """Raise ConfigError where the data were encoded with another tokenizer than the parent's, as a folder may be."""
    if data.tokenizer.fingerprint != parent.tokenizer.fingerprint:
        path = Path(parent.lineage["path"])
        raise ConfigError(Problem("data.sources", _other_tokenizer(data.tokenizer, parent.tokenizer, path)))


def _other_tokenizer(found: Tokenizer, parents: Tokenizer, path: Path) -> str:
    return (
        f"the tokenizer has the fingerprint {found.fingerprint[:12]}, and that of {path} {parents.fingerprint[:12]}: "
        "the same text would have other ids. Leave it out, or prepare the text with the tokenizer of the model"
    )


def _model_of_run(config: RunConfig, resume: str) -> ModelConfig | None:
    """Return the model of the run that will resume, or None for a run that starts."""
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume)
        try:
            return RunConfig.model_validate(read_state(folder).config).model if folder.is_dir() else None
        except (ValidationError, PsannlmError):
            return None  # find_state reads it again, and says why it cannot be resumed
    folder = Path(os.path.expanduser(config.train.checkpoint_dir))
    if not list_checkpoints(folder) or not (folder / CONFIG_FILE).is_file():
        return None
    try:
        return load_config(folder / CONFIG_FILE, check_files=False).model
    except ConfigError:
        return None


def _read_config(path: Path) -> ModelConfig:
    metadata = file_metadata(path)
    try:
        return ModelConfig.model_validate_json(metadata["config"])
    except (KeyError, ValidationError, ConfigError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{_KEY}: {path} is not a model file that this psannlm can read") from error


def _given(section: Section) -> dict[str, Any]:
    """Return the keys of a section that were written and are not null, with groups as their own written keys."""
    found: dict[str, Any] = {}
    for key in sorted(section.model_fields_set):
        value = getattr(section, key)
        if isinstance(value, Section):
            found |= {f"{key}.{inner}": each for inner, each in _given(value).items()}
        elif value is not None:
            found[key] = value
    return found


def _differences(given: ModelConfig, theirs: ModelConfig, path: Path) -> dict[str, str]:
    messages = {}
    for key, value in _given(given).items():
        other: Any = theirs
        for part in key.split("."):
            other = getattr(other, part)
        if key not in _FREE and value != other:
            messages[key] = f"{value}, and {path} has {other}; leave the key out, or start without {_KEY}"
    return messages


def _merged(given: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """Return ``theirs`` with the written keys of ``given``."""
    plain = theirs.model_dump()
    for key, value in _given(given).items():
        *group, name = key.split(".")
        (plain[group[0]] if group else plain)[name] = value
    return ModelConfig.model_validate(plain)
