"""A fresh process that reads a GGUF file with transformers or llama.cpp and writes what it computes.

Run as a script by ``gguf_verify.py``, with the path of a request in JSON. It imports nothing of psannlm, and a crash of
the library under test ends this process alone.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request_path: str) -> None:
    """Answer the request: logits as raw float32 files, everything else as one JSON file beside it."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    place = Path(request_path).parent
    answer = {"transformers": _ask_transformers, "llama_cpp": _ask_llama_cpp}[request["by"]](request, place)
    answer["psannlm_modules"] = sorted(name for name in sys.modules if name.split(".")[0] in ("psannlm", "psann"))
    (place / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _ask_transformers(request: dict[str, Any], place: Path) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    path = Path(request["path"])
    # transformers reads no size of a head for Qwen3, and takes the class's own default.
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.head_dim = request["head_dim"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        for number, window in enumerate(request["windows"]):
            logits = model(torch.tensor([window])).logits[0].float().contiguous()
            (place / f"logits_{number}.bin").write_bytes(logits.numpy().tobytes())
    ids: list[list[int]] = []
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        ids = tokenizer(request["texts"], add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
    return {"version": transformers.__version__, "ids": ids}


def _ask_llama_cpp(request: dict[str, Any], place: Path) -> dict[str, Any]:
    llama_cpp = importlib.import_module("llama_cpp")
    longest = max(map(len, request["prompts"])) + request["n_new"]
    # Keys and values in float32, as here; llama.cpp's default is float16.
    llama = llama_cpp.Llama(
        request["path"], n_ctx=longest, type_k=0, type_v=0, flash_attn=False, n_threads=1, verbose=False
    )
    suppressed = np.array(request["suppressed"], dtype=np.int64)
    rows = []
    for prompt in request["prompts"]:
        llama.reset()
        llama.eval(prompt)
        row: list[int] = []
        while len(row) < request["n_new"]:
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)
            ).copy()
            logits[suppressed] = -np.inf
            token = int(logits.argmax())
            if token == request["eos_id"]:
                break
            row.append(token)
            llama.eval([token])
        rows.append(row)
    encoded = [llama.tokenize(text.encode("utf-8"), add_bos=False, special=False) for text in request["texts"]]
    first = llama.tokenize(b"a", add_bos=True, special=False)[:1]
    return {"version": llama_cpp.__version__, "ids": encoded, "greedy": rows, "first_ids": first}


if __name__ == "__main__":
    main(sys.argv[1])
