"""A process that has loaded torch and transformers, and forks for each Python program that it is sent.

``python forking_process.py SOCKET`` listens on that path. A client sends the program, its arguments and its environment
in JSON with its stderr as an open file, closes its half of the connection, and reads the exit code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers import dynamic_module_utils


def main(path: str) -> None:
    """Serve one client after the other until the process is ended."""
    _load()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as rest:
                first, (stderr,), _, _ = socket.recv_fds(connection, 1, 1)
                request = json.loads(first + rest.read())
                child = os.fork()
                if child == 0:
                    os.dup2(stderr, 2)
                    os._exit(_run(request))
                os.close(stderr)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                connection.sendall(str(code).encode())


def _load() -> None:
    """Use what the programs use once, so that every module of it is loaded."""
    if find_spec("accelerate") is not None:
        import_module("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    for name in ("Llama", "Qwen3", "Arcee"):
        getattr(transformers, f"{name}ForCausalLM")
    with torch.inference_mode():
        transformers.LlamaForCausalLM(config).generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)


def _run(request: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(request["environment"])
    # Read from the environment when it was imported.
    dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    sys.argv = ["-c", *request["arguments"]]
    try:
        exec(request["program"], {"__name__": "__main__"})
    except BaseException:  # noqa: BLE001 - as the interpreter ends
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
