"""The generation engine without a server, in a process of its own: throughput of a batch, and the right answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As in `psannlm generate`: decoding goes through thousands of very short parallel regions per second, and loses more by
# sleeping between them; MKL sums reproducibly.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "MKL_CBWR": "AUTO"}


@dataclass(frozen=True)
class Asked:
    """A request for a completion: prompt, most new tokens, and the settings of sampling."""

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    def fields(self, *, is_streamed: bool = True) -> dict[str, Any]:
        """Return the fields of the request."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stream": is_streamed,
        }


@dataclass(frozen=True)
class Expected:
    """What the engine generates: text, finish reason as the protocol names it, and number of new tokens."""

    text: str
    finish_reason: str
    n_tokens: int


class OwnEngine:
    """An engine of the model at ``path``; built in a subprocess by the benchmark.

    Args:
        path: a model file with a tokenizer.
        dtype: of the weights.
        is_compiled: whether decoding steps are compiled.
        device: to compute on.
    """

    def __init__(self, path: Path, dtype: str, is_compiled: bool, device: str) -> None:
        from psannlm.export.hf import require_tokenizer
        from psannlm.generation.engine import Engine
        from psannlm.models.artifact import load_model
        from psannlm.runtime.device import pick_device

        loaded = load_model(path)
        self.tokenizer = require_tokenizer(loaded)
        model = loaded.model.to(pick_device(device))
        self.engine = Engine(model, dtype=dtype, compile=is_compiled)  # type: ignore[arg-type]  # the command checks it

    def threads(self) -> int:
        """Return the number of threads that torch computes with."""
        import torch

        return torch.get_num_threads()

    def batch(self, asked: Sequence[Asked]) -> tuple[int, float]:
        """Decode all requests as one batch, up to the most tokens of the first; return new tokens and seconds."""
        from psannlm.generation.generate import complete_ids
        from psannlm.generation.row_text import encode_prompt

        prompts = [encode_prompt(self.tokenizer, one.prompt) for one in asked]
        began = time.perf_counter()
        completions = complete_ids(
            self.engine,
            self.tokenizer,
            prompts,
            max_new_tokens=asked[0].max_tokens,
            sampling=[_sampling(one) for one in asked],
        )
        seconds = time.perf_counter() - began
        return sum(len(completion.ids) for completion in completions), seconds

    def answers(self, asked: Sequence[Asked]) -> list[Expected]:
        """Return what each request generates, alone."""
        from psannlm.generation.generate import complete_ids
        from psannlm.generation.row_text import encode_prompt

        found = []
        for one in asked:
            prompt = encode_prompt(self.tokenizer, one.prompt)
            completion = complete_ids(
                self.engine, self.tokenizer, [prompt], max_new_tokens=one.max_tokens, sampling=_sampling(one)
            )[0]
            reason = "stop" if completion.finish_reason == "stop" else "length"
            found.append(Expected(completion.text, reason, len(completion.ids)))
        return found


def _sampling(asked: Asked) -> Any:
    from psannlm.generation.requests import SamplingConfig

    return SamplingConfig(temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed)
