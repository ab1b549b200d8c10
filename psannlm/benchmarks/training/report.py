"""Results of the training benchmark: throughput, utilization, speedups, peak memory, and their plot."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psannlm.benchmarks.harness.interleaved import paired_ratio
from psannlm.benchmarks.training.candidates import Candidate, ThroughputSettings, config_of
from psannlm.io.atomic import write_bytes
from psannlm.io.figures import render_figure
from psannlm.reports.schemas.measured import Spread
from psannlm.reports.schemas.throughput import ThroughputMetrics, ThroughputRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Relative difference of parameter counts beyond which a reference model is not of equal size.
_SAME_SIZE = 0.01


@dataclass(frozen=True)
class Trained:
    """Figures of one candidate: ``step_s`` are the mean seconds of a step, by run; ``losses`` are those of all steps.

    ``first_step_s`` includes one-time work: compilation and first memory allocations.
    """

    candidate: Candidate
    description: str
    parameters: int
    flops_per_token: int
    first_step_s: float
    step_s: list[float]
    peak_bytes: int | None
    losses: list[float]

    @property
    def name(self) -> str:
        """Name of the candidate in tables."""
        return self.candidate.name


@dataclass(frozen=True)
class ThroughputReport:
    """Results of the benchmark; the first of ``rows`` is our model.

    Attributes:
        matrix_flops_per_s: matrix peak by run, in the precision of the training.
    """

    settings: ThroughputSettings
    device: str
    threads: int
    precision: str
    steps_per_run: int
    matrix_flops_per_s: list[float]
    rows: list[Trained]

    @property
    def ours(self) -> Trained:
        """The row of our model."""
        return self.rows[0]

    def tokens_per_s(self, row: Trained) -> Spread:
        """Return the training throughput in tokens per second."""
        return Spread.of([self.settings.tokens_per_step / seconds for seconds in row.step_s])

    def utilisation(self, row: Trained) -> Spread:
        """Return the model FLOPs utilization: operations per second over the matrix peak of the same round."""
        needed = row.flops_per_token * self.settings.tokens_per_step
        return Spread.of([needed / s / peak for s, peak in zip(row.step_s, self.matrix_flops_per_s, strict=True)])

    def speed_of_ours_over(self, row: Trained) -> Spread:
        """Return our throughput over another row's, run by run."""
        return paired_ratio(row.step_s, self.ours.step_s)

    def memory_of_ours_over(self, row: Trained) -> float | None:
        """Return our peak memory over another row's, or None if one is unknown."""
        if self.ours.peak_bytes is None or not row.peak_bytes:
            return None
        return self.ours.peak_bytes / row.peak_bytes

    def sine_cost(self, is_compiled: bool) -> Spread | None:
        """Return the relative extra time of a step with the sine over one with GELU; None if not measured."""
        same = [
            row for row in self.rows if row.candidate.maker == "psannlm" and row.candidate.is_compiled == is_compiled
        ]
        same = [row for row in same if row.candidate.grad_checkpoint == self.settings.grad_checkpoint]
        same = [row for row in same if not row.candidate.is_baseline]
        with_gelu = [row for row in same if row.candidate.activation == "GELU"]
        with_sine = [row for row in same if not row.candidate.activation]
        if not with_gelu or not with_sine:
            return None
        ratio = paired_ratio(with_sine[0].step_s, with_gelu[0].step_s)
        return Spread(ratio.median - 1, ratio.lowest - 1, ratio.highest - 1)

    @property
    def problems(self) -> list[str]:
        """Return the reasons to distrust the figures: a non-finite loss, or a reference model of another size."""
        found = [f"{row.name}: a loss is not finite" for row in self.rows if not all(map(math.isfinite, row.losses))]
        for row in self.rows:
            difference = abs(row.parameters / self.ours.parameters - 1)
            if (row.candidate.maker != "psannlm" or row.candidate.is_baseline) and difference > _SAME_SIZE:
                found.append(
                    f"{row.name} has {row.parameters:,} parameters, ours {self.ours.parameters:,}: a difference of "
                    f"{difference:.1%}, because its feed-forward width is a multiple of 16; use a larger model"
                )
        return found

    def metrics(self, timestamp: str, clock: str = "wall") -> ThroughputMetrics:
        """Return every figure as it is written; ``rows`` are flat, so that reports can collect them."""
        return ThroughputMetrics(
            **{
                **asdict(self.settings),
                "model": self.settings.model.model_dump(mode="json"),
                "against": ", ".join(self.settings.against) or None,
            },
            device=self.device,
            threads=self.threads,
            precision=self.precision,
            steps_per_turn=self.steps_per_run,
            matrix_flops_per_s=Spread.of(self.matrix_flops_per_s),
            rows=[self._row(row, timestamp) for row in self.rows],
            sine_cost={"plain": self.sine_cost(False), "compiled": self.sine_cost(True)},
            problems=self.problems,
            clock=clock,
        )

    def _row(self, row: Trained, timestamp: str) -> ThroughputRow:
        model, settings = config_of(row.candidate, self.settings), self.settings
        rate, utilisation = self.tokens_per_s(row), self.utilisation(row)
        return ThroughputRow(
            timestamp=timestamp,
            name=row.name,
            maker=row.candidate.maker,
            description=row.description,
            base=model.base,
            mlp=model.mlp or "",
            activation=row.candidate.activation,
            is_baseline=row.candidate.is_baseline,
            positional_encoding=model.positional_encoding,
            d_model=model.d_model,
            n_layers=model.n_layers,
            n_heads=model.n_heads,
            vocab_size=model.vocab_size or 0,
            parameters=row.parameters,
            seq_len=settings.seq_len,
            batch_tokens=settings.tokens_per_step,
            amp=settings.amp,
            precision=self.precision.split()[0].rstrip(":"),
            optimizer=settings.optimizer,
            compile=row.candidate.is_compiled,
            grad_checkpoint=row.candidate.grad_checkpoint,
            device=self.device,
            threads=self.threads,
            tokens_per_s=rate.median,
            tokens_per_s_lowest=rate.lowest,
            tokens_per_s_highest=rate.highest,
            step_s=statistics.median(row.step_s),
            first_step_s=row.first_step_s,
            flops_per_token=row.flops_per_token,
            utilisation=utilisation.median,
            peak_bytes=row.peak_bytes,
            ours_over_it=self.speed_of_ours_over(row),
            our_memory_over_its=self.memory_of_ours_over(row),
            first_loss=row.losses[0],
            last_loss=row.losses[-1],
            losses=row.losses,
        )


def draw_throughput(path: Path, title: str, report: ThroughputReport) -> None:
    """Plot tokens per second, with the lowest and highest run, and peak memory where it is known, as bars.

    Raises:
        PictureError: the picture cannot be drawn.
        StorageError: the picture cannot be written.
    """
    write_bytes(path, render_figure(lambda: _throughput_figure(title, report), dpi=120))


def _throughput_figure(title: str, report: ThroughputReport) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = report.rows[::-1]
    has_memory = any(row.peak_bytes for row in rows)
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(rows)), layout="constrained")
    speed, *others = figure.subplots(1, 2 if has_memory else 1, sharey=True, squeeze=False)[0]
    rates = [report.tokens_per_s(row) for row in rows]
    edges = [[r.median - r.lowest for r in rates], [r.highest - r.median for r in rates]]
    names = [row.name for row in rows]
    colours = ["tab:blue" if row.candidate.maker == "psannlm" else "tab:gray" for row in rows]
    speed.barh(names, [rate.median for rate in rates], xerr=edges, color=colours)
    speed.set_xlabel("tokens/s")
    for memory in others:
        memory.barh(names, [(row.peak_bytes or 0) / 1e6 for row in rows], color=colours)
        memory.set_xlabel("peak memory, MB")
    for axes in (speed, *others):
        axes.xaxis.set_major_locator(MaxNLocator(5))
    figure.suptitle(title)
    return figure
