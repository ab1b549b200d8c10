"""psannlm serve: a trained model behind HTTP, with OpenAI's completions API and a page."""

from __future__ import annotations

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psannlm.commands.options import DeviceOption, DtypeOption, EmaOption, find_model_file, require_existing

if TYPE_CHECKING:
    from psannlm.serving.scheduler import Scheduler

log = logging.getLogger(__name__)

_KEY_FILE_BYTES = 4096
# Addresses that listen on all addresses of the machine.
_WILDCARDS = ("0.0.0.0", "::")

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="Model file, checkpoint folder or run folder, of which the best checkpoint is taken."
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
NameOption = Annotated[
    str | None,
    typer.Option("--model-name", help="Name of the model in requests. Default: the name of CHECKPOINT."),
]
MetricsOption = Annotated[bool, typer.Option("--metrics", help="Serve metrics for Prometheus at /metrics.")]
PageOption = Annotated[bool, typer.Option("--no-page", help="Serve no page at /.")]


def serve(
    checkpoint: CheckpointArgument,
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
    model_name: NameOption = None,
    metrics: MetricsOption = False,
    no_page: PageOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Serve a trained model over HTTP, to OpenAI clients and on a page.

    Ctrl-C or SIGTERM refuses new requests and ends once the open ones have ended, after 30 s at the latest.
    """
    from psannlm.display import printable
    from psannlm.errors import ArtifactError, ConfigError, install_extra
    from psannlm.models.artifact import load_model
    from psannlm.models.kv_cache import MAX_DECODE_TOKENS
    from psannlm.runtime.device import pick_device, require_compiler
    from psannlm.runtime.malloc import trim_aggressively

    try:
        from psannlm.serving.app import Service
        from psannlm.serving.guard import HostRule, is_loopback
        from psannlm.serving.metrics import Metrics
        from psannlm.serving.server import HttpServer, bind_socket, refuse_oversize
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("starlette", "uvicorn", "sse_starlette", "prometheus_client"):
            raise ConfigError(f"the server needs {error.name}; {install_extra('serve')}") from error
        raise
    if not speculate < MAX_DECODE_TOKENS:
        raise typer.BadParameter(f"{speculate} is more than {MAX_DECODE_TOKENS - 1}", param_hint="--speculate")
    key = None if api_key_file is None else read_key(api_key_file)
    if key is None and not is_loopback(host):
        raise typer.BadParameter(f"other machines reach {host}: give --api-key-file too", param_hint="--host")
    # Bodies are parsed and encoded in threads, each of which would keep the memory of its largest one.
    trim_aggressively()
    picked = pick_device(device)
    if compile:
        require_compiler(picked, "--compile", "leave it out")
    path = find_model_file(checkpoint, checkpoint, hint="CHECKPOINT", ema=ema)
    with closing(bind_socket(host, port)) as bound:
        loaded = load_model(path)
        tokenizer = loaded.tokenizer
        if tokenizer is None:
            raise ArtifactError(f"{path} has no tokenizer, which the server needs")
        loaded.model.to(picked)
        refuse_oversize(loaded.model, max_batch, 4 if dtype == "float32" else 2)
        at = bound.getsockname()[1]

        def prepare() -> Scheduler:
            from psannlm.generation.engine import Engine
            from psannlm.serving.scheduler import Scheduler

            engine = Engine(loaded.model, dtype=dtype, compile=compile)
            for notice in engine.notices:
                log.warning(notice)
            scheduler = Scheduler(engine, tokenizer, max_batch=max_batch, max_queue=max_queue, speculate=speculate)
            scheduler.warm_up()
            return scheduler

        service = Service(
            model=printable(model_name or checkpoint.resolve().name),
            tokenizer=tokenizer,
            context=loaded.model.config.max_seq_len or 0,
            max_tokens=max_tokens,
            scheduler=lambda: None,
            metrics=Metrics() if metrics else None,
            has_page=not no_page,
            created=int(time.time()),
        )
        shown = f"[{host}]" if ":" in host else host
        elsewhere = ""
        if host in _WILDCARDS:
            shown, elsewhere = "127.0.0.1", " and at this machine's other addresses; names of it need --allowed-host"
        log.info(f"preparing {path}")
        is_left = HttpServer(
            service,
            prepare,
            bound,
            HostRule(host, tuple(allowed_host or ())),
            key,
            lambda: log.info(f"serving {service.model} at http://{shown}:{at}/{elsewhere}"),
        ).run()
    log.info("ended")
    if is_left:
        # The interpreter cannot end beside a thread that still compiles.
        logging.shutdown()
        os._exit(0)


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
