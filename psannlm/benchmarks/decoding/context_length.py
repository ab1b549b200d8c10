"""Decoding time by context length, with the memory-bandwidth roofline, and its plot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psannlm.benchmarks.harness.interleaved import Clock, Count, run_interleaved, shared_rounds
from psannlm.benchmarks.harness.roofline import memory_reader, step_bytes
from psannlm.generation.engine import Engine
from psannlm.io.atomic import write_bytes
from psannlm.io.figures import render_figure
from psannlm.models.kv_cache import KVCache
from psannlm.reports.schemas.decoding import GrowthPoint
from psannlm.runtime.progress import OnProgress, ignore_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXTS = (256, 512, 1024, 2048, 4096)
STEPS = 32
_MEASURED_COLOUR, _ROOFLINE_COLOUR = "#1f77b4", "#7f7f7f"


def longest_state(contexts: Sequence[int], n_steps: int = STEPS) -> int:
    """Return the tokens of a row after the longest of ``contexts`` was measured; 0 without contexts."""
    return max(contexts) + n_steps if contexts else 0


def measure_growth(
    engine: Engine,
    n_rows: int,
    contexts: Sequence[int],
    *,
    n_steps: int = STEPS,
    repeats: int,
    seed: int,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
    deadline: float | None = None,
) -> list[GrowthPoint]:
    """Time ``n_steps`` decoding steps of ``n_rows`` rows around each of ``contexts``, and memory reads of equal size.

    The result of a run is the median of its steps. Each run starts from the same tokens, ``n_steps / 2`` before the
    context length. All rows hold the same tokens, so that only one of them is prefilled. ``deadline``: see
    ``run_interleaved``.
    """
    device = engine.model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    if not contexts:
        return []

    def fill(context: int) -> Callable[[Count], _Held]:
        size = (max(1, context - n_steps // 2),)
        prompt = torch.randint(engine.model.config.vocab_size or 0, size, generator=generator).tolist()
        return lambda count: _Held.prefill(engine, prompt, n_rows, n_steps)

    filled = run_interleaved(
        {f"filling the cache up to {context:,}": fill(context) for context in contexts},
        1,
        warm_ups=0,
        clock=clock,
        on_progress=on_progress,
        deadline=deadline,
    )
    states = {context: held for context, [held] in zip(contexts, filled.values(), strict=True)}

    def steps(context: int) -> Callable[[Count], float]:
        return lambda count: states[context].time_steps(engine, n_steps, clock, count)

    candidates: dict[str, Callable[[Count], float]] = {}
    for context in contexts:
        candidates[f"context {context:,}"] = steps(context)
        reader = memory_reader(step_bytes(engine, n_rows, context), device, clock=clock)
        candidates[f"reading as much as context {context:,}"] = reader
    taken = run_interleaved(candidates, repeats, unit="steps", clock=clock, on_progress=on_progress, deadline=deadline)
    return [
        GrowthPoint.of(
            step_bytes(engine, n_rows, context),
            *shared_rounds(taken[f"reading as much as context {context:,}"], taken[f"context {context:,}"]),
            context=context,
            cache_bytes=states[context].state.n_bytes,
        )
        for context in contexts
    ]


@dataclass
class _Held:
    """A KV cache filled to ``length`` tokens per row, and the next token of each row."""

    state: KVCache
    tokens: Tensor
    length: int

    @classmethod
    @torch.inference_mode()
    def prefill(cls, engine: Engine, prompt: Sequence[int], n_rows: int, n_steps: int) -> _Held:
        logits, state = engine.prefill([prompt], n_steps)
        return cls(state.select([0] * n_rows), logits.argmax(dim=-1).repeat(n_rows), len(prompt))

    @torch.inference_mode()
    def time_steps(self, engine: Engine, n_steps: int, clock: Clock, count: Count) -> float:
        """Return the median seconds of a greedy step, its tokens copied to the host; starts at ``length`` each time."""
        self.state.lengths = [self.length] * len(self.state.lengths)
        self.state.offsets.fill_(self.length)
        tokens = self.tokens
        seconds = []
        for done in range(1, n_steps + 1):
            began = clock()
            tokens = engine.decode(tokens, self.state).argmax(dim=-1)
            tokens.tolist()
            seconds.append(clock() - began)
            count(done, n_steps)
        return statistics.median(seconds)


def draw_growth(path: Path, title: str, points: Sequence[GrowthPoint]) -> None:
    """Plot milliseconds per step by context length, with the memory-bandwidth roofline.

    Raises:
        PictureError: the picture cannot be drawn.
        StorageError: the picture cannot be written.
    """
    write_bytes(path, render_figure(lambda: _growth_figure(title, points)))


def _growth_figure(title: str, points: Sequence[GrowthPoint]) -> Figure:
    from matplotlib.figure import Figure

    contexts = [point.context for point in points]
    steps = [point.step_s for point in points]
    medians = [1e3 * step.median for step in steps]
    edges = [
        [1e3 * (step.median - step.lowest) for step in steps],
        [1e3 * (step.highest - step.median) for step in steps],
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        contexts,
        medians,
        yerr=edges,
        color=_MEASURED_COLOUR,
        linewidth=2,
        marker="o",
        capsize=4,
        label="measured, lowest to highest run",
    )
    rooflines = [1e3 * point.roofline_s for point in points]
    label = "roofline: reading weights and cache once"
    axes.plot(contexts, rooflines, color=_ROOFLINE_COLOUR, linewidth=2, linestyle="--", marker="s", label=label)
    for context, median, point in zip(contexts, medians, points, strict=True):
        text = f"{median:.3g} ms\n{point.fraction.median:.0%} of bandwidth"
        # The line rises: a label to the left of a point does not overlap it.
        side, shift = ("center", 0) if context == contexts[0] else ("right", 8)
        axes.annotate(text, (context, median), (shift, 9), textcoords="offset points", ha=side, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.25 * max(1e3 * step.highest for step in steps))
    axes.set_title(title)
    axes.set_xlabel("context (tokens of each row)")
    axes.set_ylabel("time of one decoding step (ms)")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left")
    return figure
