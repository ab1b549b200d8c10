"""The model card of an exported folder: what the model is, how well it does, how to load it, what cannot load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psannlm import __version__
from psannlm.display import printable
from psannlm.export.hf import Loader, Target
from psannlm.export.verify import Verification
from psannlm.io.atomic import read_small
from psannlm.models.artifact import LoadedModel
from psannlm.training.checkpoint import STATE_FILE

_STATE_BYTES = 64 << 20


def model_card(
    name: str,
    checkpoint: Path,
    loaded: LoadedModel,
    target: Target,
    loaders: Sequence[Loader],
    verification: Verification | None,
) -> str:
    """Return the text of ``README.md``, with the front matter that the hub reads."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    facts = [
        ("base", f"{config.base}, feed-forward {config.mlp}, positions {config.positional_encoding}"),
        ("parameters", f"{n_parameters:,}"),
        ("shape", f"{config.n_layers} layers of width {config.d_model}, {config.n_heads} heads"),
        ("vocabulary", f"{config.vocab_size:,} ids"),
        ("context", f"{config.max_seq_len:,} tokens"),
        ("class", f"`{target.architecture}`" + (f", because of {target.reason}" if target.reason else "")),
        ("tokenizer fingerprint", f"`{tokenizer.fingerprint}`" if tokenizer is not None else "none"),
        *_training_facts(checkpoint, loaded.notes),
    ]
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts)
    trust = ", trust_remote_code=True" if target.is_custom else ""
    able = "\n".join(f"- {loader}" for loader in loaders)
    verified = "This folder was not verified." if verification is None else f"Verified: {verification}."
    code = (
        "\nThe folder holds its own Python code, `modeling_psannlm.py`: read it before you trust it. With psannlm "
        "installed, `import psannlm.hf` takes the place of `trust_remote_code=True`.\n"
        if target.is_custom
        else ""
    )
    tags = "".join(f"\n- {tag}" for tag in ("psannlm", *(("custom_code",) if target.is_custom else ())))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:{tags}
---

# {_cell(name)}

A language model trained with psannlm and exported by psannlm {__version__}.

| | |
|---|---|
{rows}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
{code}
## What can load it, and what cannot

{able}

{verified}

Text that spells a special token, such as `</s>`, is encoded as ordinary text (`split_special_tokens`).
"""


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _training_facts(checkpoint: Path, notes: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the checkpoint records of its training: steps, tokens, losses, and the hash of its text."""
    facts = [("trained", f"{notes['step']:,} steps, {notes['tokens']:,} tokens")] if _has_counts(notes) else []
    losses = {
        key: value for key, value in notes.items() if "loss" in key and isinstance(value, float) and value == value
    }
    facts += [(key.replace("_", " "), f"{value:.4f} nats per token") for key, value in losses.items()]
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    content = read_small(folder / STATE_FILE, _STATE_BYTES)
    if content is not None:
        try:
            fingerprint = json.loads(content)["state"]["corpus_sha256"]
        except (ValueError, LookupError, TypeError):
            fingerprint = None
        if isinstance(fingerprint, str):
            facts.append(("data fingerprint (SHA-256)", f"`{fingerprint}`"))
    return facts


def _has_counts(notes: dict[str, Any]) -> bool:
    return all(type(notes.get(key)) is int for key in ("step", "tokens"))
