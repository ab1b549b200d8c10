"""psannlm serve: a trained model behind HTTP, with OpenAI's completions API and a page."""

from __future__ import annotations

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from psannlm.commands.options import (
    DEFAULT_RUNS,
    DeviceOption,
    DtypeOption,
    EmaOption,
    chosen_device,
    find_model_file,
    require_existing,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    import torch

    from psannlm.generation.engine import Engine
    from psannlm.models.transformer import Transformer
    from psannlm.serving.http_process import HttpSettings
    from psannlm.serving.scheduler import Scheduler
    from psannlm.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

_KEY_FILE_BYTES = 4096
# Addresses that listen on all addresses of the machine.
_WILDCARDS = ("0.0.0.0", "::")

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Model file, checkpoint folder or run folder, of which the best checkpoint is taken; of a folder of runs, "
        "that of the run that saved last. Default: the newest run in runs.",
        show_default=False,
    ),
]
HostOption = Annotated[
    str,
    typer.Option(help="Address to listen on. One that other machines reach, such as 0.0.0.0, needs --api-key-file."),
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File whose first line is the API key that every request but /health must carry. Default: no key.",
    ),
]
AllowedHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Further name under which clients reach the server, such as that of a proxy; may be repeated.",
    ),
]
MaxBatchOption = Annotated[int, typer.Option(min=1, max=1024, help="Most sequences that are decoded at a time.")]
MaxQueueOption = Annotated[
    int, typer.Option(min=0, max=100_000, help="Most sequences that wait; further ones are refused with status 429.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Most new tokens that a request may ask for.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile decoding, which takes up to a minute and then decodes faster.")
]
SpeculateOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Draft tokens per step for speculative decoding, copied from the text so far; the output stays the same.",
    ),
]
StreamIntervalOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens per event of a stream. More of them leave more of the processor to the model. Default: 1 while up "
        "to 4 sequences decode, and 4 from 13 on.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--model-name", help="Name of the model in requests. Default: the name of CHECKPOINT, or of the newest run."
    ),
]
MetricsOption = Annotated[bool, typer.Option("--metrics", help="Serve metrics for Prometheus at /metrics.")]
PageOption = Annotated[bool, typer.Option("--no-page", help="Serve no page at /.")]


def serve(
    checkpoint: CheckpointArgument = None,
    ema: EmaOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: KeyOption = None,
    allowed_host: AllowedHostOption = None,
    max_batch: MaxBatchOption = 16,
    max_queue: MaxQueueOption = 64,
    max_tokens: MaxTokensOption = 512,
    dtype: DtypeOption = "float32",
    compile: CompileOption = False,
    speculate: SpeculateOption = 0,
    stream_interval: StreamIntervalOption = None,
    model_name: NameOption = None,
    metrics: MetricsOption = False,
    no_page: PageOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Serve a trained model over HTTP, to OpenAI clients and on a page.

    Ctrl-C or SIGTERM refuses new requests and ends once the open ones have ended, after 30 s at the latest.
    """
    from psannlm.serving.guard import is_loopback
    from psannlm.serving.sockets import bind_socket

    key = None if api_key_file is None else read_key(api_key_file)
    if key is None and not is_loopback(host):
        raise typer.BadParameter(f"other machines reach {host}: give --api-key-file too", param_hint="--host")
    # Before torch is imported, which takes seconds.
    with closing(bind_socket(host, port)) as bound:
        from psannlm.serving.http_process import HttpSettings, require_packages

        require_packages()
        from psannlm.display import printable
        from psannlm.models.kv_cache import MAX_DECODE_TOKENS
        from psannlm.runtime.malloc import trim_aggressively
        from psannlm.serving.scheduler import request_limits
        from psannlm.serving.sockets import start_listening

        if not speculate < MAX_DECODE_TOKENS:
            raise typer.BadParameter(f"{speculate} is more than {MAX_DECODE_TOKENS - 1}", param_hint="--speculate")
        trim_aggressively()
        picked = chosen_device(device, is_compiled=compile)
        path = find_model_file(checkpoint, DEFAULT_RUNS, hint="CHECKPOINT", ema=ema)
        model, tokenizer = _load(path, picked, max_batch, 4 if dtype == "float32" else 2)
        at = bound.getsockname()[1]

        def prepare() -> Scheduler:
            from psannlm.generation.engine import Engine

            engine = Engine(model, dtype=dtype, compile=compile, in_place=True)
            return _warm_scheduler(engine, tokenizer, max_batch, speculate, stream_interval)

        settings = HttpSettings(
            model=printable(model_name or _name(checkpoint, path)),
            tokenizer=tokenizer.to_bytes(),
            limits=request_limits(model, tokenizer),
            max_batch=max_batch,
            max_queue=max_queue,
            max_tokens=max_tokens,
            host=host,
            allowed_hosts=tuple(allowed_host or ()),
            key=key,
            has_metrics=metrics,
            has_page=not no_page,
            created=int(time.time()),
        )
        log.info(f"preparing {path}")
        start_listening(bound)
        _run(prepare, settings, bound, f"serving {settings.model} at {_address(host, at)}")


def _name(checkpoint: Path | None, found: Path) -> str:
    """Return the name of what was asked for, or of the run in which ``found`` is."""
    if checkpoint is not None:
        return checkpoint.resolve().name
    *folders, _ = found.relative_to(DEFAULT_RUNS).parts
    return folders[0] if folders else DEFAULT_RUNS.resolve().name


def _run(prepare: Callable[[], Scheduler], settings: HttpSettings, bound: socket, serving: str) -> None:
    """Serve until both processes have ended; ``serving`` is logged once requests are taken.

    Raises:
        WorkerError: the HTTP process failed.
        Exception: what ended the engine.
    """
    from psannlm.errors import WorkerError
    from psannlm.serving.engine_host import EngineHost
    from psannlm.serving.http_process import HttpProcess

    is_left = False
    try:
        with HttpProcess(settings, bound) as http:
            is_left = EngineHost(prepare, http.connection, lambda: log.info(serving)).run()
    except WorkerError as error:
        if is_left:
            log.error(str(error))
            _exit(1)
        raise
    log.info("ended")
    if is_left:
        _exit(0)


def _exit(code: int) -> NoReturn:
    """End the process at once: the interpreter cannot end beside a thread that still compiles."""
    logging.shutdown()
    os._exit(code)


def _load(path: Path, device: torch.device, max_batch: int, n_bytes: int) -> tuple[Transformer, Tokenizer]:
    """Return model and tokenizer. Raises an error where there is no tokenizer, or the cache would not fit."""
    from psannlm.errors import ArtifactError
    from psannlm.models.artifact import load_model
    from psannlm.serving.engine_host import refuse_oversize

    loaded = load_model(path)
    if loaded.tokenizer is None:
        raise ArtifactError(f"{path} has no tokenizer, which the server needs")
    loaded.model.to(device)
    refuse_oversize(loaded.model, max_batch, n_bytes)
    return loaded.model, loaded.tokenizer


def _warm_scheduler(
    engine: Engine, tokenizer: Tokenizer, max_batch: int, speculate: int, stream_interval: int | None
) -> Scheduler:
    from psannlm.serving.scheduler import Scheduler

    for notice in engine.notices:
        log.warning(notice)
    scheduler = Scheduler(engine, tokenizer, max_batch=max_batch, speculate=speculate, stream_interval=stream_interval)
    scheduler.warm_up()
    return scheduler


def _address(host: str, port: int) -> str:
    """Return the URL that reaches the server from this machine, with a note where it has other addresses."""
    if host in _WILDCARDS:
        return f"http://127.0.0.1:{port}/ and at this machine's other addresses; names of it need --allowed-host"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def read_key(path: Path) -> str:
    """Return the API key in the first line of a file. Raises ConfigError where it is missing, short or not ASCII."""
    from psannlm.errors import ConfigError

    require_existing("--api-key-file", path, what="file")
    try:
        with path.open("rb") as file:
            lines = file.read(_KEY_FILE_BYTES).decode("ascii", "replace").splitlines()
    except OSError as error:
        raise ConfigError(f"--api-key-file: {path}: {error.strerror}") from error
    key = lines[0].strip() if lines else ""
    if not (16 <= len(key) <= 1000 and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"--api-key-file: the first line of {path} is not a key of 16 or more ASCII characters; make one with: "
            "openssl rand -hex 32"
        )
    return key
