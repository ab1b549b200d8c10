"""Compiled steps on disk: the next process loads a step instead of tracing and compiling the model again."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import psannlm
from psannlm.errors import StorageError
from psannlm.io.atomic import write_bytes
from psannlm.io.cache import cache_folder
from psannlm.kernels.compile import compiled
from psannlm.kernels.cpu_decoding import load_decoding_library
from psannlm.kernels.torch_private import (
    LOAD_ERRORS,
    can_compile_ahead,
    compiled_ahead,
    dump_compiled,
    inductor_settings,
    load_compiled,
    load_realize,
)

# Files of one or two MB each; the least recently used ones are removed.
_MAX_FILES = 48
# Parts of the package that a step is traced through.
_TRACED = ("generation", "kernels", "models", "runtime")


def compiled_step(
    step: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., Any]:
    """Return ``step(model, *args)`` compiled for arguments like ``args``, from the user's cache where it has it.

    Nothing guards it: call it with arguments of the same shapes, and with the same model. The cache holds no weights.

    Args:
        step: a function whose only free variables are constants.
        options: of the compiler.
    """
    if not can_compile_ahead():
        return compiled(step, fullgraph=True, options=options)
    load_decoding_library()
    path = cache_folder() / "steps" / f"{_fingerprint(step, model, args, options)}.bin"
    modules = {"model": model}
    if (loaded := _load(path, modules, options)) is not None:
        return loaded
    load_realize()
    ahead = compiled_ahead(step, (model, *args), options)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(path, dump_compiled(ahead, modules))
        # Under a umask that lets the group write it would not be read.
        path.chmod(0o600)
        _remove_oldest(path.parent)
    except (OSError, StorageError):
        # A full disk, or a home without write permission: the next process compiles again.
        pass
    return ahead


def _load(path: Path, modules: dict[str, nn.Module], options: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the step of a file, or None where there is none that can be used; it is then written again."""
    if not _is_own(path):
        return None
    try:
        loaded = load_compiled(path.read_bytes(), modules, options)
    except (OSError, *LOAD_ERRORS):
        return None
    with suppress(OSError):
        os.utime(path)
    return loaded


def _is_own(path: Path) -> bool:
    """Whether a file is there that this user wrote and no other can change: what is unpickled can run code."""
    try:
        status, folder = path.lstat(), path.parent.stat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return True
    return all(place.st_uid == os.getuid() and not place.st_mode & 0o022 for place in (status, folder))


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-_MAX_FILES]:
        path.unlink(missing_ok=True)


def _fingerprint(step: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return a hash of all that the compiled code depends on, the values of tensors left out."""
    parts: list[object] = [torch.__version__, sys.version, torch.get_num_threads(), _source_hash()]
    parts += [_described(torch.cpu.get_capabilities()), torch.is_inference_mode_enabled()]
    parts += [_described(inductor_settings()), _described(options), _described(args)]
    parts += [_described(cell.cell_contents) for cell in step.__closure__ or ()]
    parts += _module_parts(model)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _source_hash() -> str:
    found = hashlib.sha256()
    for name in _TRACED:
        files = Path(psannlm.__path__[0], name).rglob("*")
        for path in sorted(path for path in files if path.suffix in (".py", ".cpp")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _module_parts(model: nn.Module) -> Iterator[object]:
    of_torch = vars(nn.Module()).keys()
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in of_torch}
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        yield name, type(module).__qualname__, module.training, _described(own), _described(tensors)


def _described(value: object) -> object:
    """Return what a trace can read of a value: of a tensor all but its numbers."""
    if isinstance(value, Tensor):
        layout = value.stride() if value.layout == torch.strided else value.layout
        return "tensor", str(value.dtype), tuple(value.shape), str(layout), value.device.type
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, Mapping):
        return sorted((str(key), _described(item)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
