"""Import of a folder of Hugging Face transformers: Llama, Qwen3 or Arcee as a model file of psannlm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import ArtifactError, ConfigError, TokenizerError
from psannlm.export import custom_mapping
from psannlm.export.import_config import architecture_of, native_model_config
from psannlm.export.plain_mapping import our_name
from psannlm.io.filenames import utf8_path
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.io.readers import Unreadable, read_json
from psannlm.io.safetensors_header import parse_shapes, read_fields
from psannlm.models.artifact import save_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
# The tokenizers library's file first: older folders of Llama hold SentencePiece's alone.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_DTYPES = ("F32", "BF16", "F16")
# Buffers that older versions of transformers saved and that follow from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class ImportedModel:
    """A model read from a folder of transformers.

    Attributes:
        model: in evaluation mode on the CPU, in float32.
        tokenizer: None where it was left out.
        architecture: the model class that the folder names.
        notices: what differs in use, one sentence each.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    architecture: str
    notices: tuple[str, ...] = ()

    def save(self, path: Path) -> str:
        """Write the model file and return its SHA-256. Raises StorageError if it cannot be written."""
        return save_model(path, self.model, self.tokenizer, {"imported": {"architecture": self.architecture}})


def import_folder(folder: Path, *, with_tokenizer: bool = True) -> ImportedModel:
    """Read a folder of transformers, every number exactly. No code from it is run, and no pickle is read.

    Raises:
        ConfigError: it is not such a folder, its class is another, or it has a setting that our model cannot express.
        ArtifactError: a file is missing or damaged, does not fit ``config.json``, or does not fit into memory.
        TokenizerError: its tokenizer is of a kind that psannlm cannot hold; ``with_tokenizer=False`` leaves it out.
    """
    fields = _read_json(folder / CONFIG_FILE)
    try:
        architecture = architecture_of(fields)
        is_ours = architecture == custom_mapping.ARCHITECTURE
        config = resolve(_custom_model_config(fields) if is_ours else native_model_config(fields))
    except ConfigError as error:
        raise ConfigError(error.problems, source=str(folder / CONFIG_FILE)) from error
    files = weight_files(folder)
    model = _load(folder, files, config, custom_mapping.our_name if is_ours else our_name)
    if not with_tokenizer:
        return ImportedModel(model, None, architecture)
    tokenizer = _tokenizer(folder, config)
    return ImportedModel(model, tokenizer, architecture, tuple(_notices(folder, fields, tokenizer)))


def _custom_model_config(fields: dict[str, Any]) -> ModelConfig:
    """Return the configuration of a folder exported with custom code. Raises ConfigError where it is damaged."""
    try:
        return custom_mapping.model_config(fields)
    except KeyError as error:
        raise ConfigError(f"the setting {error} of {custom_mapping.ARCHITECTURE} is missing or unknown") from error
    except (ValidationError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a setting of {custom_mapping.ARCHITECTURE} is damaged: {reason:.300}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, without links to them being followed elsewhere by name.

    Raises:
        ConfigError: there is none.
        ArtifactError: the index is damaged or names a file outside the folder.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / WEIGHTS_FILE).exists():
            return [folder / WEIGHTS_FILE]
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        held = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        remedy = "load it with transformers and save it with save_pretrained"
        raise ConfigError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{held}; {remedy}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ArtifactError(f"{index} names {wrong[0]!r:.80}, which is not a safetensors file of the folder")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        refuse_pointer(path, ArtifactError)
        raise ConfigError(f"{path.parent} is not a folder of transformers: it has no {path.name}")
    try:
        # A cache of downloads holds links to its files.
        return read_json(path.resolve())
    except Unreadable as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _load(folder: Path, files: list[Path], config: ModelConfig, named: Callable[[str], str | None]) -> Transformer:
    """Return the model of a resolved ``config`` with the tensors of ``files``, whose headers are checked first."""
    names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        for theirs, shape in _read_shapes(path).items():
            ours = _wanted_name(path, theirs, config, named)
            if ours is None:
                continue
            if ours in shapes:
                raise ArtifactError(f"{folder} holds {theirs!r:.80} twice")
            names[theirs], shapes[ours] = ours, shape
    memory, n_bytes = machine_memory_bytes(), 4 * sum(map(math.prod, shapes.values()))
    if memory is not None and n_bytes > memory:
        raise ArtifactError(f"{folder} holds {n_bytes / 1e9:,.1f} GB of float32 tensors, and {describe_memory()}")
    model = _empty_model(folder, config, shapes)
    tensors: dict[str, Tensor] = {}
    for path in files:
        # Training and decoding start from float32; every bfloat16 and float16 number is one, so nothing is rounded.
        tensors |= {names[name]: tensor.float() for name, tensor in _read(path).items() if name in names}
    if config.tie_embeddings:
        _refuse_untied(folder, tensors)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _wanted_name(path: Path, theirs: str, config: ModelConfig, named: Callable[[str], str | None]) -> str | None:
    """Return our name of a tensor, or None of one that follows from the configuration."""
    if theirs.endswith(_DERIVED):
        return None
    ours = named(theirs)
    if ours is None:
        raise ConfigError(f"{path} holds {theirs!r:.80}, which no part of our model corresponds to")
    return ours


def _empty_model(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Transformer:
    """Return the model without its tensors, once their names and shapes are known to fit."""
    if config.n_layers > len(shapes):
        raise ArtifactError(f"{folder} is configured with {config.n_layers} layers and holds {len(shapes)} tensors")
    try:
        model = build_model(config, device="meta")
    except (RuntimeError, OverflowError, TypeError) as error:  # torch on sizes beyond 64 bits
        raise ArtifactError(f"{folder} describes a model of impossible size") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings and "head.weight" in shapes:
        expected["head.weight"] = expected["embedding.weight"]
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            raise ArtifactError(f"{folder} does not fit its {CONFIG_FILE}: the tensor of {name} is missing")
        if name not in expected:
            raise ArtifactError(f"{folder} does not fit its {CONFIG_FILE}: {name} is not part of the model")
        if expected[name] != shapes[name]:
            raise ArtifactError(
                f"{folder} does not fit its {CONFIG_FILE}: {name} is {shapes[name]}, not {expected[name]}"
            )
    return model


def _refuse_untied(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Drop the output matrix of a model whose matrices are tied; refuse one that is not the embedding matrix."""
    head = tensors.pop("head.weight", None)
    if head is not None and not torch.equal(head, tensors["embedding.weight"]):
        raise ConfigError(
            f"{folder}: tie_word_embeddings is true in {CONFIG_FILE}, and lm_head.weight is another matrix than "
            "model.embed_tokens.weight; set tie_word_embeddings: false to keep both"
        )


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a file by name, from its header."""
    refuse_pointer(path, ArtifactError)
    if not path.is_file():
        raise ArtifactError(f"{path} is missing or not a regular file; {INDEX_FILE} names it")
    fields, _ = read_fields(path)
    for name, entry in fields.items():
        if name != "__metadata__" and isinstance(entry, dict) and entry.get("dtype") not in _DTYPES:
            raise ConfigError(
                f"{path}: {name!r:.80} is {entry.get('dtype')!r:.20}; float32, bfloat16 and float16 are read: save "
                "the model in one of them"
            )
    return parse_shapes(path, fields)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_path(path) as readable:
            tensors: dict[str, Tensor] = load_file(readable)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: its tensors cannot be read: {error}") from error
    return tensors


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    remedy = "import the weights alone with --no-tokenizer"
    path = next((folder / name for name in _TOKENIZER_FILES if (folder / name).exists()), None)
    if path is None:
        raise TokenizerError(f"{folder} has neither {' nor '.join(_TOKENIZER_FILES)}; {remedy}")
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; {remedy}") from error
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise TokenizerError(f"{path} has {tokenizer.vocab_size} ids, and the model only {config.vocab_size}; {remedy}")
    return tokenizer


def _notices(folder: Path, fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Return where begin and end of text have another id here than in the folder."""
    generation = folder / "generation_config.json"
    named = {**fields, **(_read_json(generation) if generation.exists() else {})}
    found = []
    for key, ours, does in (("bos_token_id", tokenizer.bos_id, "begin"), ("eos_token_id", tokenizer.eos_id, "end")):
        theirs = named.get(key)
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            (piece,) = tokenizer.pieces([ours])
            found.append(f"texts {does} here with id {ours} ({piece}), and the folder's {key} is {theirs!r:.80}")
    return found
