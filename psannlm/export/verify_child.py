"""A fresh process that loads an exported folder with transformers alone and writes what it computes.

Run as a script by ``verify.py``, with the path of a request in JSON. It imports nothing of psannlm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(request_path: str) -> None:
    """Answer the request: logits as raw float32 files, everything else as one JSON file beside it."""
    transformers.logging.set_verbosity_error()
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    place = Path(request_path).parent
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=request["is_custom"])
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=torch.float32, trust_remote_code=request["is_custom"]
    ).eval()
    answer: dict[str, Any] = {
        "transformers": transformers.__version__,
        "architecture": type(model).__name__,
        "tokenizer_class": type(tokenizer).__name__,
        "specials": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    }
    with torch.inference_mode():
        for number, window in enumerate(request["windows"]):
            logits = model(torch.tensor([window])).logits[0].float().contiguous()
            (place / f"logits_{number}.bin").write_bytes(logits.numpy().tobytes())
        answer["alone"] = [_generate(model, [prompt], request, use_cache=True)[0] for prompt in request["prompts"]]
        answer["uncached"] = _generate(model, request["prompts"], request, use_cache=False)
        answer["padded"] = _generate(model, request["prompts"], request, use_cache=True)
    texts = request["texts"]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    answer["ids"] = encoded
    answer["decoded"] = tokenizer.batch_decode(encoded)
    answer["first_ids"] = [tokenizer(text)["input_ids"][:1] for text in texts[:8]]
    answer["psannlm_modules"] = sorted(name for name in sys.modules if name.split(".")[0] in ("psannlm", "psann"))
    (place / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _generate(model: Any, prompts: list[list[int]], request: dict[str, Any], *, use_cache: bool) -> list[list[int]]:
    """Return the new ids of each prompt, greedy, padded on the left, without the end."""
    longest = max(map(len, prompts))
    pad, eos = request["pad_id"], request["eos_id"]
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=request["n_new"],
        do_sample=False,
        use_cache=use_cache,
    )
    rows = [row[longest:] for row in found.tolist()]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


if __name__ == "__main__":
    main(sys.argv[1])
