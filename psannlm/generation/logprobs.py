"""Log probabilities of generated tokens and of their most likely alternatives.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.requests import TokenLogprob as TokenLogprob

MAX_LOGPROBS = 100


def require_logprobs(n_top: int | None) -> None:
    """Raise GenerationError unless ``n_top`` is None or a whole number from 0 to ``MAX_LOGPROBS``."""
    if n_top is None:
        return
    if isinstance(n_top, bool) or not isinstance(n_top, Integral) or not 0 <= n_top <= MAX_LOGPROBS:
        raise GenerationError(f"logprobs {n_top!r:.60} is not a whole number in 0 .. {MAX_LOGPROBS}")


def token_logprobs(logits: Tensor, chosen: Sequence[Sequence[int]], n_top: int) -> list[list[TokenLogprob]]:
    """Return the log probabilities of the tokens ``chosen`` (B, T) after each position of ``logits`` (B, T, V)."""
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(chosen, dtype=torch.long, device=logits.device)
    own = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()
    highest = logprobs.topk(min(n_top, logits.shape[-1]), dim=-1)
    top_values, top_ids = highest.values.tolist(), highest.indices.tolist()
    return [
        [
            TokenLogprob(token, own[row][at], tuple(zip(top_ids[row][at], top_values[row][at], strict=True)))
            for at, token in enumerate(tokens)
        ]
        for row, tokens in enumerate(chosen)
    ]
