"""Perplexity cost of quantized weights, on text sampled from the float32 model.

For text sampled from the model at temperature 1, the mean of log p - log q over its tokens is the Kullback-Leibler
divergence of the quantized distribution q from the model's own p, whatever the model was trained on. The ratio of the
perplexities is its exponential.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from psannlm.benchmarks.harness.interleaved import Clock, Count, run_interleaved
from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import PackingCost
from psannlm.runtime.progress import OnProgress, ignore_progress

ROWS = 16
TOKENS_PER_ROW = 256


def packing_cost(losses: Tensor, packed_losses: Tensor) -> PackingCost:
    """Compare the losses of the same tokens, in nats."""
    extra = (packed_losses - losses).double()
    ratio = math.exp(extra.mean().item())
    error = extra.std(correction=0).item() / math.sqrt(extra.numel())
    mean, packed = losses.double().mean().item(), packed_losses.double().mean().item()
    return PackingCost(extra.numel(), math.exp(mean), math.exp(packed), ratio, ratio * error)


def measure_packing_cost(
    model: Transformer,
    packed: Engine,
    *,
    seed: int,
    n_rows: int = ROWS,
    n_tokens: int = TOKENS_PER_ROW,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
    deadline: float | None = None,
) -> PackingCost:
    """Sample ``n_rows`` texts from the float32 ``model`` and compute their loss with it and with the packed weights.

    Texts have ``n_tokens`` tokens, or as many as the model's context holds.
    """
    limit = model.config.max_seq_len
    length = n_tokens if limit is None else min(n_tokens, limit - 1)
    texts: list[Tensor] = []
    losses: dict[str, Tensor] = {}

    def write(count: Count) -> None:
        texts.append(sample_texts(Engine(model), n_rows, length, seed, count))

    def score(name: str, scored: Transformer) -> Callable[[Count], None]:
        def run(count: Count) -> None:
            losses[name] = token_losses(scored, texts[0], count)

        return run

    run_interleaved(
        {
            "sampling text": write,
            "perplexity of the model": score("float32", model),
            f"perplexity with {packed.dtype} weights": score("packed", packed.model),
        },
        1,
        warm_ups=0,
        unit="tokens",
        clock=clock,
        on_progress=on_progress,
        deadline=deadline,
    )
    return packing_cost(losses["float32"], losses["packed"])


@torch.inference_mode()
def sample_texts(engine: Engine, n_rows: int, length: int, seed: int, count: Count) -> Tensor:
    """Return (n_rows, 1 + length) ids on the host: a random first token, then tokens drawn at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = engine.model.config.vocab_size or 0
    first = torch.randint(vocab_size, (n_rows, 1), generator=generator)
    logits, state = engine.prefill(first.tolist(), length)
    columns = [first[:, 0]]
    for done in range(1, length + 1):
        # On the host: the generator of a GPU would draw other numbers.
        drawn = torch.multinomial(logits.float().softmax(dim=-1).cpu(), 1, generator=generator)[:, 0]
        columns.append(drawn)
        count(done * n_rows, length * n_rows)
        if done < length:
            logits = engine.decode(drawn.to(logits.device), state)
    return torch.stack(columns, dim=1)


@torch.inference_mode()
def token_losses(model: Transformer, ids: Tensor, count: Count) -> Tensor:
    """Return the losses (B T,) in nats of all tokens of ``ids`` (B, 1 + T) but each row's first, on the host."""
    losses = []
    for done, row in enumerate(ids.to(model.embedding.weight.device), start=1):
        logits = model.logits(model.hidden_states(row[None, :-1]))[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").cpu())
        count(done * (ids.shape[1] - 1), ids.shape[0] * (ids.shape[1] - 1))
    return torch.cat(losses)
